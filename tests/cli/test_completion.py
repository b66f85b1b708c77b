"""Completion of the command line: bash completes commands, options and keys; the other shells get the same words."""

import subprocess

import pytest

from bmjax.cli import main as cli
from bmjax.cli.commands import COMMANDS
from bmjax.cli.completion import SHELLS, script
from tests.test_config import keys_of


@pytest.fixture(scope="module")
def bash():
    return script("bash", COMMANDS)


def complete(bash: str, *words: str) -> list[str]:
    """What bash offers when Tab is pressed behind the last word."""
    line = f"COMP_WORDS=(bmjax {' '.join(words)}); COMP_CWORD={len(words)}; _bmjax; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{bash}\n{line}"], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("words, offered", [
    (["tr"], ["train"]),
    (["co"], ["collect", "convert", "completion"]),
    (["train", "config.yaml", "lear"], ["learning_rate="]),
    (["train", "config.yaml", "--ch"], ["--check"]),
    (["collect", "config.yaml", "teacher.base"], ["teacher.base_url="]),
    (["merge", "--ov"], ["--overwrite"]),
    (["train", "output", "=", "ru"], []),
    (["trian", "x"], []),
])  # fmt: skip
def test_bash_offers(bash, words, offered):
    assert complete(bash, *words) == offered


def test_every_command_and_key_is_in_the_script(bash):
    assert set(complete(bash, "''")) == {"help", *COMMANDS}
    keys = set(keys_of(COMMANDS["train"].settings_class()))
    assert {word.rstrip("=") for word in complete(bash, "train", "''") if word.endswith("=")} == keys


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == script(shell, COMMANDS).rstrip() and "learning_rate" in text and "overwrite" in text


def test_another_shell_is_a_mistake(capsys):
    assert cli.main(["completion", "ksh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
