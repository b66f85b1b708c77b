"""Trackers get every step once, and a dead one never stops a training."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import bmjax
from bmjax.branch import trackers
from bmjax.branch.settings import TrainSettings
from bmjax.branch.trackers import Tracker, check_installed, tracking
from bmjax.config import UserError


def settings(tmp_path, **keys):
    return TrainSettings.read({"student": "s", "data": "d", "output": str(tmp_path / "run"), **keys})


class FakeWandb:
    """A service that keeps runs by id, as Weights & Biases does."""

    def __init__(self, fail=""):
        self.fail, self.runs = fail, {}

    def init(self, project, name, config, id, resume):
        if self.fail == "init":
            raise RuntimeError("no network\nat all")
        assert resume == "allow" and config["wandb"] == project
        steps = self.runs.setdefault(id, [])

        def log(numbers, step):
            if self.fail == "log":
                raise OSError("gone")
            steps.append((step, numbers["loss"]))

        def finish():
            if self.fail == "finish":
                threading.Event().wait(60)

        return SimpleNamespace(step=steps[-1][0] + 1 if steps else 0, log=log, finish=finish)


class FakeMlflow:
    """A tracking server that, as MLflow's, keeps twice what it is sent twice."""

    def __init__(self):
        self.steps, self.status, self.experiments = {}, {}, {}
        self.entities = SimpleNamespace(
            Metric=lambda key, value, time, step: SimpleNamespace(key=key, value=value, step=step)
        )

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment, run_name):
        identity = f"run{len(self.steps)}"
        self.steps[identity], self.status[identity] = [], "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=identity))

    def update_run(self, identity, status):
        self.status[identity] = status

    def get_metric_history(self, identity, key):
        return [metric for metric in self.steps[identity] if metric.key == key]

    def log_param(self, identity, key, value):
        assert key != "output" or value

    def log_batch(self, identity, metrics):
        self.steps[identity] += metrics

    def set_terminated(self, identity):
        self.status[identity] = "FINISHED"


def write_steps(config, begin, steps, log):
    with tracking(config, begin, log) as write:
        for step in steps:
            write(step, {"loss": 1.0 / step})


def test_a_resumed_training_sends_no_step_twice(tmp_path, monkeypatch):
    wandb, mlflow, said = FakeWandb(), FakeMlflow(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = settings(tmp_path, wandb="p", mlflow="e")
    write_steps(config, 0, range(1, 6), said.append)
    write_steps(config, 3, range(4, 9), said.append)  # killed after 5, its last checkpoint was 3
    ((identity, steps),) = wandb.runs.items()
    assert [step for step, _ in steps] == list(range(1, 9))
    ((run, metrics),) = mlflow.steps.items()
    assert [metric.step for metric in metrics] == list(range(1, 9)) and mlflow.status[run] == "FINISHED"
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"wandb": identity, "mlflow": run}
    assert not [line for line in said if not line.startswith("TensorBoard")]


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_dead_tracker_is_one_line(tmp_path, monkeypatch, fail):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail))
    monkeypatch.setattr(trackers, "GRACE", 0.3)
    monkeypatch.setattr(Tracker.close, "__defaults__", (0.3,))
    said: list[str] = []
    began = time.monotonic()
    write_steps(settings(tmp_path, wandb="p"), 0, range(1, 4), said.append)
    assert time.monotonic() - began < 20
    (line,) = [line for line in said if line.startswith("wandb")]
    reason = {"init": "no network", "log": "gone", "finish": "it did not end within 0.3 s"}[fail]
    assert line == f"wandb: off, {reason}; the training goes on, metrics.jsonl has every step"


def test_a_slow_tracker_is_left(monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    said: list[str] = []
    release = threading.Event()
    sink = SimpleNamespace(write=lambda step, numbers: release.wait(60), close=lambda: None)
    tracker = Tracker("slow", lambda: sink, said.append)
    for step in range(1, 9):
        tracker.write(step, {"loss": 1.0})
    tracker.close(0.1)
    release.set()
    assert said == ["slow: off, 3 steps wait for it; the training goes on, metrics.jsonl has every step"]


def test_a_tracker_that_is_not_installed_is_refused_before_the_training(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"{name}: the package is not installed; run pip install '.\[{name}\]'"):
            check_installed(settings(tmp_path, **{name: "p"}))


def test_tensorboard_shows_a_training_once(student, train_file, tmp_path, monkeypatch):
    from tensorboardX import event_file_writer

    monkeypatch.setattr(event_file_writer.time, "time", lambda: 1e9)  # both trainings begin in one second
    from tensorboardX.proto.event_pb2 import Event

    keys = {
        "student": str(student), "data": str(train_file), "output": str(tmp_path / "run"), "steps": 3, "seq_len": 64,
        "batch": 4, "packing": False, "compute_dtype": "float32", "save_every": 2, "mesh": {"data": 1}, "until": 2,
    }  # fmt: skip
    bmjax.train(keys)
    bmjax.train(keys | {"until": None})
    losses, purged = [], []
    for file in sorted((tmp_path / "run/tensorboard").glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            losses += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "train/loss"]
            purged += [event.step] if event.HasField("session_log") else []
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines] and len(lines) == 3
    assert purged == [1, 3]
