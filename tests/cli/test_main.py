"""The commands: help that lists every key, mistakes as one line with exit code 2, and that they do what they say."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy

from bmjax.cli import main as cli
from bmjax.version import __version__
from tests.conftest import sums, write_rows
from tests.test_config import keys_of

ROOT = Path(__file__).resolve().parents[2]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("command", cli.CALLS)
def test_help_lists_every_key(capsys, command):
    code, out, err = call(capsys, command, "--help")
    assert code == 0 and not err
    assert out.startswith(f"usage: bmjax {command} CONFIG")
    found = {line.split(":")[0].strip() for line in out.partition("overridden as a.b=value:\n")[2].splitlines()}
    assert set(keys_of(cli._settings_of(command))) == found
    for example in cli.EXAMPLES[command]:
        assert example in out and example.startswith(f"bmjax {command} ")


@pytest.mark.parametrize(
    "arguments", [["merge", "--help"], ["convert", "--help"], ["convert", "-h"], ["--help"], ["-h"], ["help"]]
)
def test_other_help(capsys, arguments):
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    out = capsys.readouterr().out
    assert code == 0 and "usage:" in out and len(out.splitlines()) > 5


def test_without_a_command_the_intro_names_all_of_them(capsys):
    code, out, _ = call(capsys)
    assert code == 2 and __version__ in out
    for command in [*cli.CALLS, "merge", "convert"]:
        assert re.search(rf"^  {command} ", out, re.MULTILINE), command


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"bmjax {__version__}\n", "")


@pytest.mark.parametrize("arguments, line", [
    (["trian", "x.yaml"], "unknown command 'trian'; did you mean 'train'?"),
    (["train"], "bmjax train: the CONFIG file is missing; see bmjax train --help"),
    (["train", "steps=3"], "bmjax train: the CONFIG file is missing; see bmjax train --help"),
    (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
    (["train", "CONFIG", "--steps", "3"], "unknown option '--steps'; settings are given as key=value"),
    (["train", "CONFIG", "--output", "x"], "unknown option '--output'; settings are given as key=value"),
    (["train", "CONFIG", "more"], "'more': expected key=value or key.sub=value"),
    (["train", "CONFIG", "stpes=3"], "CONFIG: unknown key 'stpes'; did you mean 'steps'?"),
    (["train", "CONFIG", "steps=ten"], "CONFIG: steps: expected a whole number, found text 'ten'"),
    (["train", "CONFIG", "student=./nowhere"], "'./nowhere': no such directory"),
    (["run", "CONFIG", "--output"], "--output: a value must follow"),
    (["convert", "a", "b"], "bmjax convert: --to hf or --to orbax is missing"),
    (["convert", "a", "b", "--to"], "--to: a value must follow"),
    (["convert", "a", "b", "--to", "gguf"], "--to: expected hf or orbax, found 'gguf'"),
    (["convert", "a", "--to", "hf"], "bmjax convert: expected SRC and DST, found 1 paths"),
    (["convert", "a", "b", "--force", "--to=hf"], "unknown option '--force'; see bmjax convert --help"),
    (["convert", "./nowhere", "./dst", "--to", "orbax"], "'./nowhere': no such directory"),
    (["eval", "CONFIG"], "CONFIG: unknown key 'student'"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, arguments, line):
    config = tmp_path / "train.yaml"
    config.write_text(f"student: s\ndata: d\nsteps: 1\noutput: {tmp_path / 'out'}\n")
    code, out, err = call(capsys, *[str(config) if a == "CONFIG" else a for a in arguments])
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bmjax: error: " + line.replace("CONFIG:", f"{config}:"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "bmjax: stopped; the same command continues where it was"),
    (OSError(errno.ENOSPC, "No space left", "run/metrics.jsonl"), 2, "bmjax: error: run/metrics.jsonl: No space left"),
    (PermissionError(errno.EACCES, "Permission denied", "run"), 2, "bmjax: error: run: Permission denied"),
])  # fmt: skip
def test_what_stops_a_command_from_outside_is_one_line(capsys, monkeypatch, tmp_path, error, code, line):
    def fail(settings, output):
        raise error

    monkeypatch.setitem(cli.CALLS, "train", fail)
    config = tmp_path / "train.yaml"
    config.write_text("student: s\ndata: d\nsteps: 1\noutput: o\n")
    assert call(capsys, "train", config) == (code, "", line + "\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setitem(cli.CALLS, "train", lambda settings, output: {}["fault"])
    config = tmp_path / "train.yaml"
    config.write_text("student: s\ndata: d\nsteps: 1\noutput: o\n")
    with pytest.raises(KeyError):
        cli.main(["train", str(config)])


@pytest.mark.parametrize("option", [["--output", "runs/x"], ["--output=runs/x"]])
def test_run_takes_its_output_before_or_after_the_config(monkeypatch, option):
    seen = []
    monkeypatch.setitem(cli.CALLS, "run", lambda settings, output: seen.append((settings.seed, output)))
    config = str(ROOT / "configs" / "own_problems.yaml")
    assert cli.main(["run", config, *option, "seed=7"]) == 0
    assert cli.main(["run", *option, config, "seed=7"]) == 0
    assert cli.main(["run", config]) == 0
    assert seen[:2] == [(7, "runs/x")] * 2 and seen[2][1] is None


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_is_read_by_its_command(file):
    family = file.stem.partition("_")[0]
    command = {"own": "run", "real": "run", "tinyr1": "train", "qwen2": "train"}.get(family, family)
    assert cli._settings_of(command).read(file).model_dump()


def test_train_eval_and_convert_do_what_they_say(capsys, student, train_file, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        f"student: {student}\ndata: {train_file}\noutput: {tmp_path / 'run'}\nsteps: 2\nbatch: 4\nseq_len: 128\n"
        "learning_rate: 1e-3\nmesh: {data: 1}\ncompute_dtype: float32\n"
    )
    code, out, err = call(capsys, "train", config, "log_every=2")
    assert code == 0 and not out
    assert next(line for line in err.splitlines() if line.startswith("step")).startswith("step 2/2 epoch ")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2

    traces = write_rows(tmp_path / "held_out.jsonl", sums(3, seed=4))
    task = tmp_path / "eval.yaml"
    task.write_text(
        f"model: {tmp_path / 'run' / 'hf'}\noutput: {tmp_path / 'scores'}\nseq_len: 128\n"
        f"tasks:\n  sums: {{traces: {traces}}}\n"
    )
    code, out, err = call(capsys, "eval", task)
    score = json.loads((tmp_path / "scores" / "scores.json").read_text())["sums"]
    assert code == 0 and out.startswith(f"sums: loss {score['loss']:.4f} nats/token")

    assert call(capsys, "convert", tmp_path / "run" / "hf", tmp_path / "orbax", "--to", "orbax")[0] == 0
    assert call(capsys, "convert", tmp_path / "orbax", tmp_path / "back", "--to=hf")[0] == 0
    before, after = (
        safetensors.numpy.load_file(d / "model.safetensors") for d in (tmp_path / "run" / "hf", tmp_path / "back")
    )
    assert {k: (v.dtype, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in after.items()
    }
    code, _, err = call(capsys, "convert", tmp_path / "orbax", tmp_path / "back", "--to", "hf")
    assert code == 2 and "exists already" in err


def test_python_m_bmjax_is_bmjax(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bmjax", "train", "nowhere.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "bmjax: error: nowhere.yaml: no such file\n")
