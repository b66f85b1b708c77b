"""What a training leaves and how it goes on: locks, exports of checkpoints, more steps, rates that teach nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bmjax
from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import describe, train
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint


def settings(student: Path, data: Path, output: Path, **changes) -> TrainSettings:
    values = {
        "student": str(student), "data": str(data), "output": str(output), "steps": 4, "batch": 8, "seq_len": 128,
        "packing": False, "learning_rate": 1e-3, "schedule": "constant", "warmup": 1, "compute_dtype": "float32",
        "save_every": 2, "log_every": 100,
    }  # fmt: skip
    return TrainSettings.model_validate(values | changes)


def run(chosen: TrainSettings) -> list[str]:
    said: list[str] = []
    train(chosen, said.append, progress=False)
    return said


def weights(directory: Path) -> dict[str, bytes]:
    model = open_checkpoint(directory)
    return {name: model.read(name).tobytes() for name in model.tensors}


def test_any_kept_checkpoint_is_exported(student, train_file, tmp_path):
    run(settings(student, train_file, tmp_path / "run", export_every=2))
    run(settings(student, train_file, tmp_path / "short", steps=2))
    for source, expected in (
        (tmp_path / "run/checkpoints/2", tmp_path / "short/hf"),
        (tmp_path / "run/checkpoints/4", tmp_path / "run/hf"),
        (tmp_path / "run", tmp_path / "run/hf"),
    ):
        out = tmp_path / f"out-{source.name}"
        bmjax.convert(source, out, to="hf")
        assert weights(out) == weights(expected)
        assert (out / "config.json").read_text() == (expected / "config.json").read_text()
        assert (out / "tokenizer.json").exists()
    assert weights(tmp_path / "run/exports/2") == weights(tmp_path / "short/hf")
    assert not (tmp_path / "run/exports/4").exists()  # it is hf
    with pytest.raises(UserError, match="out-run: exists already"):
        bmjax.convert(tmp_path / "run", tmp_path / "out-run", to="hf")


def test_frozen_parameters_are_in_an_exported_checkpoint(student, train_file, tmp_path):
    run(settings(student, train_file, tmp_path / "run", freeze=["embed/*"], template="qwen"))
    bmjax.convert(tmp_path / "run", tmp_path / "out", to="hf")
    assert weights(tmp_path / "out") == weights(tmp_path / "run/hf")
    assert (tmp_path / "out/chat_template.jinja").read_text() == (tmp_path / "run/hf/chat_template.jinja").read_text()


@pytest.mark.parametrize("key", ["steps", "epochs"])
def test_a_finished_run_goes_on_when_it_grows(student, train_file, tmp_path, key):
    run(settings(student, train_file, tmp_path / "run"))
    whole = run(settings(student, train_file, tmp_path / "whole", steps=6))
    per_epoch = 6 / float(re.search(r"step 6/6 epoch ([\d.]+)", "\n".join(whole))[1])
    longer = {"steps": 6} if key == "steps" else {"steps": None, "epochs": 5.9 / per_epoch}
    assert "resuming at step 4" in run(settings(student, train_file, tmp_path / "run", **longer))
    assert weights(tmp_path / "run/hf") == weights(tmp_path / "whole/hf")
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schedule": "cosine"}, "steps: it had 4, now 6; schedule: cosine ended there, only constant goes on"),
        ({"schedule": "constant", "warmup": 0.5}, r"warmup: 0.5 is a share of them; set warmup: 2 \(steps\) to go on"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(student, train_file, tmp_path, changes, problem):
    run(settings(student, train_file, tmp_path / "run", **changes))
    with pytest.raises(UserError, match=problem):
        run(settings(student, train_file, tmp_path / "run", **changes, steps=6))
    if "warmup" in changes:
        assert "resuming at step 4" in run(settings(student, train_file, tmp_path / "run", steps=6, warmup=2))
    with pytest.raises(UserError, match=r"steps: it had \d, now 3"):
        run(settings(student, train_file, tmp_path / "run", **changes | {"steps": 3, "warmup": 2}))


def test_results_name_paths_relative_to_the_run(student, train_file, tmp_path):
    result = train(settings(student, train_file, tmp_path / "run", steps=1), lambda line: None, progress=False)
    assert result["hf"] == str(tmp_path / "run/hf")
    assert json.loads((tmp_path / "run/result.json").read_text())["hf"] == "hf"
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(settings(student, train_file, tmp_path / "moved", steps=1), lambda line: None, progress=False)
    assert again["hf"] == str(tmp_path / "moved/hf")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps": 1, "warmup": 0.1}, "the learning rate is 0 in the only step"),
        ({"steps": 3, "learning_rate": 0}, "the learning rate is 0 in all 3 steps"),
        ({"steps": 3, "warmup": 100}, r"the learning rate reaches 2e-05 of 0.001 in 3 steps \(warmup 100"),
        ({"steps": 3, "warmup": 1}, None),
    ],
)
def test_a_rate_that_teaches_nothing_is_said(student, train_file, tmp_path, changes, line):
    said = [text for text in run(settings(student, train_file, tmp_path / "run", **changes)) if "learning rate" in text]
    assert bool(said) == (line is not None)
    if line is not None:
        assert len(said) == 1 and re.match(line, said[0])


def test_a_second_run_in_the_same_output_stops_at_once(student, train_file, tmp_path):
    command = [
        sys.executable, "-m", "bmjax", "train", str(tmp_path / "train.yaml"), "steps=400", "seq_len=128",
        "num_processes=1",
    ]  # fmt: skip
    values = settings(student, train_file, tmp_path / "run").model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "train.yaml").write_text(json.dumps(values))
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert second.stderr.strip() == (
        f"bmjax: error: {tmp_path / 'run'}: another training is writing here; wait for it or choose another output"
    )


def test_a_refused_run_leaves_no_directory(student, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "Q"}\n')
    with pytest.raises(UserError, match="row 1: expected messages"):
        run(settings(student, tmp_path / "rows.jsonl", tmp_path / "new/run"))
    assert not (tmp_path / "new").exists()


def test_check_refuses_what_training_would(student, train_file, tmp_path):
    run(settings(student, train_file, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match=r"learning_rate: it had 0\.001, now 0\.01"):
        describe(settings(student, train_file, tmp_path / "run", steps=2, learning_rate=1e-2))
    with pytest.raises(UserError, match=r"until: 1 steps, but .* holds step 2"):
        describe(settings(student, train_file, tmp_path / "run", steps=2, until=1))
