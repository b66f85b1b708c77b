"""The commands: help that lists every key, mistakes as one line with exit code 2, and that they do what they say."""

import dataclasses
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
from bmjax.cli.commands import COMMANDS
from bmjax.merge.__main__ import main as merge_main
from bmjax.version import __version__
from tests.conftest import sums, write_rows
from tests.test_config import keys_of

ROOT = Path(__file__).resolve().parents[2]
WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def complete(name: str, config) -> list[str]:
    """A command line of `name` with all that it must have; every word is `config`."""
    options = [flag for row in COMMANDS[name].options if row.keywords.get("required") for flag in row.flags]
    values = {"--topology": "v5p:4x4x4", "--to": "hf"}
    return [name, *(str(config) for _ in COMMANDS[name].words), *(f"{flag}={values[flag]}" for flag in options)]


def replace(monkeypatch, name: str, call) -> None:
    """Have the command `name` do something else once it is parsed."""
    monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(COMMANDS[name], call=call))


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(f"student: s\ndata: d\nsteps: 1\noutput: {tmp_path / 'out'}\n")
    return file


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(capsys, name, flag):
    code, out, err = call(capsys, name, flag)
    assert (code, err) == (0, "")
    words = " ".join([name, *COMMANDS[name].words])
    assert out.startswith(f"usage: bmjax {words}") and ("\nexamples:\n" in out or name == "merge")
    assert all(line.startswith(f"  bmjax {name} ") for line in re.findall(r"^  bmjax .*", out, re.MULTILINE))
    for row in COMMANDS[name].options:
        assert re.search(rf"^  {row.flags[0]}\b", out, re.MULTILINE), row.flags


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_lists_every_key(capsys, name):
    _, out, _ = call(capsys, name, "--help")
    lines = out.partition("overridden as a.b=value:\n")[2].splitlines()
    assert set(keys_of(COMMANDS[name].settings_class())) == {line.split(":")[0].strip() for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_of_every_command(capsys, config, name):
    settings = "settings are given as key=value, " if COMMANDS[name].overrides else ""
    for unknown in (["--zzzz", "3"], ["--zzzz=3"], ["-z"]):
        code, out, err = call(capsys, *complete(name, config), *unknown)
        flag = unknown[0].partition("=")[0]
        assert (code, out) == (2, "")
        assert err == f"bmjax: error: unknown option '{flag}'; {settings}see bmjax {name} --help\n"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.options])
def test_misspelt_option_names_the_nearest(capsys, config, name):
    flag = COMMANDS[name].options[-1].flags[0]
    code, out, err = call(capsys, *complete(name, config), flag + "x")
    assert (code, out) == (2, "") and err.endswith(f"; did you mean '{flag}'?\n")


@pytest.mark.parametrize("name", [name for name, row in COMMANDS.items() if row.overrides and name != "init"])
def test_unknown_key_of_every_command(capsys, tmp_path, name):
    config = tmp_path / "short.yaml"
    config.write_text("merge_method: linear\n" if name == "merge" else "")  # an empty recipe is told as such
    code, out, err = call(capsys, *complete(name, config), "zzz.y=3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    source = config if COMMANDS[name].words else "settings"  # `bmjax demo` reads no file of the user's
    assert err.startswith(f"bmjax: error: {source}: unknown key 'zzz'; known here: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_words_of_every_command(capsys, config, name):
    words = COMMANDS[name].words
    options = complete(name, config)[1 + len(words) :]
    for count in range(len(words)):
        code, out, err = call(capsys, name, *[config] * count, *options)
        missing = " and ".join(words[count:]) + (" is" if count == len(words) - 1 else " are")
        assert (code, out) == (2, "")
        assert err == f"bmjax: error: bmjax {name}: {missing} missing; see bmjax {name} --help\n"


@pytest.mark.parametrize(
    "name", [name for name, row in COMMANDS.items() if row.words and name not in ("init", "completion")]
)
def test_missing_file_of_every_command(capsys, tmp_path, name):
    missing = tmp_path / "nowhere.yaml"
    code, out, err = call(capsys, *complete(name, missing))
    assert (code, out, err.count("\n")) == (2, "", 1)
    line = f"{missing}: no such file" if name != "convert" else f"{missing}: not what `bmjax convert --to orbax` writes"
    assert err.startswith(f"bmjax: error: {line}")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_overview_on_request(capsys, arguments):
    code, out, _ = call(capsys, *arguments)
    assert code == 0 and out.startswith("usage: bmjax COMMAND")
    assert call(capsys) == (2, out, "")


def test_overview_names_all_commands(capsys):
    code, out, _ = call(capsys)
    assert code == 2 and __version__ in out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name


def test_help_of_a_command_by_the_word_help(capsys):
    assert call(capsys, "help", "train") == call(capsys, "train", "--help")


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"bmjax {__version__}\n", "")


@pytest.mark.parametrize("arguments, line", [
    (["trian", "x.yaml"], "unknown command 'trian'; did you mean 'train'?"),
    (["--verson"], "unknown option '--verson'; see bmjax --help"),
    (["train", "steps=3"], "bmjax train: CONFIG is missing; see bmjax train --help"),
    (["train", "CONFIG", "--steps", "3"], "unknown option '--steps'; settings are given as key=value"),
    (["train", "CONFIG", "--output", "x"], "unknown option '--output'; settings are given as key=value"),
    (["train", "CONFIG", "more"], "'more': expected key=value or key.sub=value"),
    (["train", "CONFIG", "stpes=3"], "CONFIG: unknown key 'stpes'; did you mean 'steps'?"),
    (["train", "CONFIG", "steps=ten"], "CONFIG: steps: expected a whole number, found text 'ten'"),
    (["train", "CONFIG", "student=./nowhere"], "./nowhere: no such model directory"),
    (["run", "CONFIG", "--output"], "--output: a value must follow"),
    (["run", "CONFIG", "--outpu", "x"], "unknown option '--outpu'"),
    (["plan", "CONFIG"], "bmjax plan: --topology is missing; see bmjax plan --help"),
    (["merge", "CONFIG", "out", "--check=3"], "--check: takes no value, found '3'"),
    (["merge", "CONFIG", "dtype=float32"], "bmjax merge: OUT is missing; see bmjax merge --help"),
    (["convert", "a", "b"], "bmjax convert: --to is missing; see bmjax convert --help"),
    (["convert", "a", "b", "--to"], "--to: a value must follow"),
    (["convert", "a", "b", "--to", "gguf"], "--to: expected hf or orbax, found 'gguf'"),
    (["convert", "a", "b", "c", "--to", "hf"], "'c': a word too many; see bmjax convert --help"),
    (["convert", "./nowhere", "./dst", "--to", "orbax"], "./nowhere: no such model directory"),
    (["eval", "CONFIG"], "CONFIG: unknown key 'student'"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, config, arguments, line):
    code, out, err = call(capsys, *[str(config) if a == "CONFIG" else a for a in arguments])
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bmjax: error: " + line.replace("CONFIG:", f"{config}:"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("error, line", [
    (OSError(errno.ENOSPC, "No space left", "run/metrics.jsonl"),
     "run/metrics.jsonl: No space left; free some space, or write to another place"),
    (PermissionError(errno.EACCES, "Permission denied", "a\nb\x1b[2J"),
     "a b [2J: Permission denied; get the right to it, or choose another place"),
])  # fmt: skip
def test_disk_error_is_one_clean_line(capsys, monkeypatch, config, name, error, line):
    def fail(options):
        raise error

    replace(monkeypatch, name, fail)
    monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(cli.COMMANDS[name], settings=None))
    assert call(capsys, *complete(name, config)) == (2, "", f"bmjax: error: {line}\n")


@pytest.mark.parametrize("name, line", [
    ("train", "stopped; the same command continues from there"),
    ("merge", "interrupted; OUT is as it was, and the same command goes on with the merge"),
    ("convert", "stopped; DST is as it was"),
])  # fmt: skip
def test_interrupt_says_what_becomes_of_the_output(capsys, monkeypatch, config, name, line):
    def interrupt(options):
        raise KeyboardInterrupt

    replace(monkeypatch, name, interrupt)
    assert call(capsys, *complete(name, config)) == (130, "", f"bmjax: {line}\n")
    if name == "merge":
        assert merge_main(complete(name, config)[1:]) == 130


def test_internal_error_keeps_its_traceback(monkeypatch, config):
    replace(monkeypatch, "train", lambda options: {}["fault"])
    with pytest.raises(KeyError):
        cli.main(["train", str(config)])


@pytest.mark.parametrize("option", [["--output", "runs/x"], ["--output=runs/x"]])
def test_words_options_and_keys_in_any_order(monkeypatch, option):
    calls = []
    replace(monkeypatch, "run", lambda options: calls.append((options.settings.seed, options.output)))
    config = str(ROOT / "configs" / "own_problems.yaml")
    assert cli.main(["run", config, *option, "seed=7"]) == 0
    assert cli.main(["run", *option, config, "seed=7"]) == 0
    assert cli.main(["run", "seed=7", *option, config]) == 0
    assert cli.main(["run", "seed=7", config, *option]) == 0
    assert cli.main(["run", config]) == 0
    assert calls[:4] == [(7, "runs/x")] * 4 and calls[4][1] is None


def test_paths_may_hold_an_equals_sign(monkeypatch):
    calls = []
    replace(monkeypatch, "merge", lambda options: calls.append((options.recipe, options.out, options.overrides)))
    assert cli.main(["merge", "seed=1", "runs/lr=1/r.yaml", "--quiet", "runs/lr=1/out", "dtype=float32"]) == 0
    assert calls == [("runs/lr=1/r.yaml", "runs/lr=1/out", ["seed=1", "dtype=float32"])]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_is_read_by_its_command(file):
    family = file.stem.partition("_")[0]
    families = {"own": "run", "real": "run", "tinyr1": "train", "qwen2": "train", "teach": "select"}
    name = {"teach_science": "collect"}.get(file.stem) or families.get(family, family)
    assert COMMANDS[name].settings_class().read(file).model_dump()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_light(name):
    """The start-up of a help: no arrays, no models, and 0.6 s of processor time at the most."""
    code = (
        "import sys, time; from bmjax.cli.main import main; code = main(sys.argv[1:]); "
        "print(time.process_time(), *{name.split('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, *modules = done.stderr.split()
    assert float(seconds) < 0.6 and not {"jax", "transformers", "datasets", "httpx"} & {*modules}


def test_train_eval_and_convert_write_their_outputs(capsys, student, train_file, tmp_path):
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
