"""metrics.jsonl holds each step once, the printed line holds what a step was, FLOPs are counted right."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bmjax.branch import loop
from bmjax.branch.loop import Run, metrics_log, peak_flops
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import flops_per_token
from bmjax.log import silent
from bmjax.model.config import ModelConfig

CONFIG = ModelConfig(100, 8, 16, 2, 2, 1, 4, 64)
VALUES = {"loss": 2.5, "targets": 9.0, "grad_norm": 0.75, "move": 0.0123}


def write(output, start, steps, stop, log=silent, log_every=1):
    """Record steps start+1..stop of a training of `steps` steps on two devices, in epochs of four."""
    settings = TrainSettings(student="-", data="-", output=str(output), steps=steps, log_every=log_every)
    loader = SimpleNamespace(length=64, steps_per_epoch=4)
    plan = SimpleNamespace(config=CONFIG, mesh=SimpleNamespace(size=2))
    with metrics_log(Run(settings, None, loader, plan, steps, steps, {}, log, progress=True), start) as write_metrics:
        for step in range(start + 1, stop + 1):
            write_metrics(step, 1e-3, 200, VALUES)


def read(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_each_step_once(tmp_path):
    output = tmp_path / "run"
    write(output, 0, 8, 5)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in mid-line
    write(output, 4, 8, 8)
    assert [line["step"] for line in read(output)] == list(range(1, 9))
    last = read(output)[-1]
    assert last["epoch"] == 2.0 and last["learning_rate"] == 1e-3 and last["tokens"] == 200 and last["loss"] == 2.5
    assert last["tokens_per_second"] == pytest.approx(200 / last["seconds"])


def test_lines_say_what_a_step_was(tmp_path):
    lines = []
    write(tmp_path, 0, 5, 5, lines.append, log_every=2)
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    for part in ("epoch 0.50", "loss 2.5000", "lr 1.00e-03", "grad 0.750", "move 0.0123", "tok/s", "eta 0m"):
        assert part in lines[0]
    assert "mfu" not in lines[0]


def test_eta_leaves_the_first_steps_compilation_out(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])  # start, then the ends of steps 1, 2, 3
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # not that of other threads
    lines = []
    write(tmp_path, 0, 33, 3, lines.append)
    assert lines[1].endswith("eta 1m02s") and lines[2].endswith("eta 1m00s")
    assert read(tmp_path)[0]["seconds"] == 100.0


def test_mfu_where_the_device_is_known(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # not that of other threads
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e6)
    write(tmp_path, 0, 2, 2)
    want = 200 * flops_per_token(CONFIG, 64) / 2.0 / (1e6 * 2)  # on 2 devices
    assert read(tmp_path)[1]["mfu"] == pytest.approx(want)


def test_peaks_of_known_devices():
    # Makers' data sheets, dense bf16.
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU v5p") == 459e12 and peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU v4") == 275e12 and peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("cpu") is peak_flops("NVIDIA L40S") is None


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_six_a_parameter_plus_causal_attention(tied):
    V, D, F, L, NH, KH, T = 1000, 64, 160, 3, 4 * 16, 2 * 16, 512
    config = ModelConfig(V, D, F, L, 4, 2, 16, T, tied=tied)
    products = L * (D * NH + 2 * D * KH + NH * D + 3 * D * F) + D * V
    attention = sum(2 * 2 * NH * (t + 1) for t in range(T)) / T * 3 * L  # scores and values, forward and twice back
    assert flops_per_token(config, T) == pytest.approx(6 * products + attention, rel=0.01)
    assert np.isfinite(flops_per_token(config, T))
