"""Completion of the command line: the shells complete commands, options and keys."""

import re
import shutil
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


def test_zsh_gets_the_words_of_bash(bash):
    text = script("zsh", COMMANDS)
    values = dict(re.findall(r"^ +(\S+)\) values=\((.*)\) ;;$", text, re.MULTILINE))
    assert values == dict(re.findall(r'^ +(\S+)\) words="(.*)" ;;$', bash, re.MULTILINE))
    assert values.keys() == COMMANDS.keys()
    # A ~/.zshrc need not have called compinit before.
    assert text.index("compinit") < text.index("compdef _bmjax")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_defines_the_completion():
    text = script("zsh", COMMANDS) + "\nprint $_comps[bmjax]"
    done = subprocess.run(["zsh", "-f", "-c", text], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("_bmjax", "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "offered"), [("tr", "train\t"), ("train lear", "learning_rate="), ("eval --ch", "--check")]
)
def test_fish_offers(tmp_path, line, offered):
    file = tmp_path / "bmjax.fish"
    file.write_text(script("fish", COMMANDS))
    command = f'source {file}; complete -C "bmjax {line}"'
    done = subprocess.run(["fish", "--no-config", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(offered)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == script(shell, COMMANDS).rstrip() and "learning_rate" in text and "overwrite" in text


def test_another_shell_is_a_mistake(capsys):
    assert cli.main(["completion", "ksh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
