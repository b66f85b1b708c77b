"""--quiet and --json of every command: nothing but errors, and one JSON object on standard output."""

import dataclasses
import json

import pytest

from bmjax.cli import main as cli
from bmjax.cli.commands import COMMANDS
from bmjax.cli.parser import Outcome
from bmjax.log import progress_bar, stage, write_line
from tests.cli.test_main import call, complete, replace


def work(options) -> Outcome:
    """What a command may do: lines, a stage and a bar while it works, and prints of libraries."""
    write_line("a remark")
    with stage("a stage", write_line), progress_bar("a bar", "steps", 2) as bar:
        bar.update(2)
    print("a print")
    return Outcome(["a line"], {"count": 1, "path": options.config if "config" in options else ""})


@pytest.fixture
def working(monkeypatch, tmp_path):
    """The command line of a command that does `work`."""

    def line(name: str) -> list[str]:
        replace(monkeypatch, name, work)
        monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(cli.COMMANDS[name], settings=None))
        return complete(name, tmp_path / "config.yaml")

    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_of_every_command(capsys, working, name):
    line = working(name)
    code, out, err = call(capsys, *line)
    assert code == 0 and out == "a print\na line\n" and "a remark\n" in err
    assert call(capsys, *line, "--quiet") == call(capsys, *line, "-q") == (0, "a print\n", "")
    assert call(capsys, *line)[2].count("a remark") == 1  # the next command of the process is heard again


JSON = [name for name, command in COMMANDS.items() if command.json]


def test_json_where_scripts_want_results():
    assert {"train", "merge", "collect", "judge", "select", "eval", "run", "convert", "plan"} <= {*JSON}


@pytest.mark.parametrize("name", JSON)
def test_json_is_all_of_standard_output(capsys, working, name):
    code, out, err = call(capsys, *working(name), "--json")
    assert code == 0 and out.count("\n") == 1 and json.loads(out)["count"] == 1
    assert "a print\n" in err and "a remark\n" in err
    assert call(capsys, *working(name), "--json", "--quiet")[1:] == (out, "a print\n")


def test_a_problem_follows_the_outcome(capsys, working, monkeypatch):
    line = working("collect")
    replace(monkeypatch, "collect", lambda options: Outcome(value={"failed": 1}, problem="1 request failed"))
    assert call(capsys, *line, "--json") == (2, '{"failed": 1}\n', "bmjax: error: 1 request failed\n")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    import subprocess
    import sys

    shell = f"{sys.executable} -m bmjax completion bash | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("# Completion")


def test_results_of_commands_as_json(capsys, tmp_path, monkeypatch):
    from tests.test_wrong_uses import write_model

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        write_model(tmp_path / name, seed)
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [base, math]\n")
    code, out, err = call(capsys, "merge", "recipe.yaml", "out", "--json", "--quiet")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["output"] == "out" and result["tensors"] == 2 and "total" in result
    code, out, err = call(capsys, "merge", "recipe.yaml", "new", "--check", "--json")
    assert code == 0 and any(line.startswith("write new") for line in json.loads(out)["check"])
    assert cli.main(["merge", "recipe.yaml", "new", "--check", "-q"]) == 0 and capsys.readouterr().out == ""
