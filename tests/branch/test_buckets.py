"""A training wholly from and to a bucket: the same result as on disk, also when it is killed on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import bmjax
from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import train
from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.weights.bucket_checkpoint import is_whole
from tests.branch.multiprocess import finish, start
from tests.branch.test_runs import run, settings, weights

pytestmark = pytest.mark.usefixtures("buckets")


def filled(scheme: str, folder: str, student, train_file) -> str:
    """A folder of a bucket with the student and the data."""
    url = f"{scheme}://bucket/{folder}"
    bucket.send_folder(student, f"{url}/student")
    bucket.send(train_file, f"{url}/data/train.jsonl")
    return url


@pytest.fixture(params=["s3", "gs"])
def root(request, tmp_path, student, train_file) -> str:
    return filled(request.param, tmp_path.name, student, train_file)


@pytest.fixture
def s3(tmp_path, student, train_file) -> str:
    return filled("s3", tmp_path.name, student, train_file)


def in_bucket(root: str, **changes) -> TrainSettings:
    return settings(f"{root}/student", f"{root}/data", f"{root}/run", **changes)


def test_a_training_goes_on_from_one_in_a_bucket(s3):
    run(in_bucket(s3))
    first = f"{s3}/first"
    run(settings(f"{s3}/student", f"{s3}/data", first, until=2))
    said = run(settings(f"{first}/hf", f"{s3}/data", f"{s3}/second", continue_from=first))
    assert any(line.startswith("going on from step 2 of ") for line in said)
    assert weights(bucket.local(f"{s3}/second/hf")) == weights(bucket.local(f"{s3}/run/hf"))
    lines = bucket.read(f"{s3}/second/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_training_in_a_bucket_gives_what_one_on_disk_does(root, student, train_file, tmp_path):
    run(settings(student, train_file, tmp_path / "run", keep=1, mesh={"data": 2, "fsdp": 4}))
    # It stops half-way, and goes on from its checkpoint on another mesh and on another machine.
    run(in_bucket(root, steps=2, mesh={"data": 2, "fsdp": 4}, keep=1))
    assert "resuming at step 2" in run(in_bucket(root, keep=1, mesh={"data": 2, "fsdp": 4}))
    assert weights(bucket.local(f"{root}/run/hf")) == weights(tmp_path / "run/hf")

    inside = bucket.names_in(f"{root}/run")
    assert not any(name.startswith(("checkpoints/2/", ".lock")) for name in inside)
    assert is_whole(f"{root}/run/checkpoints/4")
    lines = bucket.read(f"{root}/run/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    result = json.loads(bucket.read(f"{root}/run/result.json"))
    assert result["hf"] == "hf" and result["steps"] == 4
    assert run(in_bucket(root, keep=1, mesh={"data": 2, "fsdp": 4})) == [f"{root}/run: already trained, 4 steps"]

    bmjax.convert(f"{root}/run/checkpoints/4", f"{root}/converted", to="hf")
    assert weights(bucket.local(f"{root}/converted")) == weights(tmp_path / "run/hf")
    with pytest.raises(UserError, match="converted: exists already"):
        bmjax.convert(f"{root}/run", f"{root}/converted", to="hf")
    assert not any(name.startswith(("gs:", "s3:")) for name in os.listdir())


@pytest.mark.slow
def test_a_checkpoint_is_restored_on_another_mesh_and_an_unfinished_one_removed(s3, student, train_file, tmp_path):
    run(in_bucket(s3, steps=2, mesh={"fsdp": 8}))
    bucket.write(f"{s3}/run/checkpoints/3/arrays/x/zarr.json", b"{}")
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert "resuming at step 2" in run(in_bucket(s3, mesh=mesh))
    assert bucket.folders(f"{s3}/run/checkpoints") == ["2", "4"]
    run(settings(student, train_file, tmp_path / "run", mesh=mesh))
    ours, reference = (json.loads(path.read_text()) for path in (
        bucket.local(f"{s3}/run/result.json"), tmp_path / "run/result.json"))  # fmt: skip
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)

    # A process died while it sent the model: it is written again.
    whole = weights(bucket.local(f"{s3}/run/hf"))
    for name in ("result.json", "hf/config.json"):
        bucket.remove(f"{s3}/run/{name}")
    bucket.write(f"{s3}/run/hf/{bucket.UNFINISHED}", b"")
    assert "resuming at step 4" in run(in_bucket(s3, mesh=mesh))
    assert weights(bucket.local(f"{s3}/run/hf")) == whole and not bucket.is_unfinished(f"{s3}/run/hf")
    bucket.write(f"{s3}/run/converted/{bucket.UNFINISHED}", b"")
    bmjax.convert(f"{s3}/run", f"{s3}/run/converted", to="hf")
    assert weights(bucket.local(f"{s3}/run/converted")) == whole

    bucket.remove(f"{s3}/run/result.json")
    with pytest.raises(UserError, match=r"learning_rate: it had 0\.001, now 0\.1"):
        run(in_bucket(s3, learning_rate=0.1))
    name = next(n for n in bucket.names_in(f"{s3}/run/checkpoints/4") if "/c/" in n)
    bucket.remove(f"{s3}/run/checkpoints/4/{name}")
    with pytest.raises(UserError, match=f"{s3}/run/checkpoints/4: the checkpoint is damaged"):
        run(in_bucket(s3, mesh=mesh))


def test_a_scheme_without_checkpoints_is_refused_before_the_first_step(student, train_file):
    with pytest.raises(UserError, match=r"not in memory://"):
        train(settings(student, train_file, "memory://bucket/run"), lambda line: None, progress=False)


@pytest.mark.slow
def test_a_training_that_is_killed_five_times_ends_the_same(root, student, train_file, tmp_path, buckets):
    run(settings(student, train_file, tmp_path / "run", steps=40, mesh={"data": 8}))
    values = in_bucket(root, steps=40, mesh={"data": 8}).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "train.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "bmjax", "train", str(tmp_path / "train.yaml")]
    rng = random.Random(0)
    for kill in range(5):
        process = subprocess.Popen(command)
        aim = rng.randint(3 + 6 * kill, 8 + 6 * kill)  # the checkpoint to wait for
        ended = time.monotonic() + 180
        while time.monotonic() < ended and process.poll() is None:
            steps = [int(step) for step in bucket.folders(f"{root}/run/checkpoints") if step.isdigit()]
            if steps and max(steps) >= aim:
                break
            time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -9
    assert subprocess.run(command).returncode == 0
    assert weights(bucket.local(f"{root}/run/hf")) == weights(tmp_path / "run/hf")
    lines = bucket.read(f"{root}/run/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 41)]


@pytest.mark.slow
def test_hosts_without_a_common_disk_train_as_one(root, student, train_file, tmp_path):
    """Two processes with a cache each, killed after a checkpoint and started again."""
    run(settings(student, train_file, tmp_path / "run", steps=12, mesh={"fsdp": 8}))
    values = in_bucket(root, steps=12, mesh={"fsdp": 8}).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "train.yaml").write_text(json.dumps(values))
    started = start(tmp_path / "train.yaml", 2, caches=tmp_path / "caches")
    while not any(int(step) >= 4 for step in bucket.folders(f"{root}/run/checkpoints")):
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.3)
    for process in started:
        process.kill()
    finish(started)
    ended = finish(start(tmp_path / "train.yaml", 2, caches=tmp_path / "caches"))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "resuming at step" in ended[0][1]
    ours, reference = (json.loads(path.read_text()) for path in (
        bucket.local(f"{root}/run/result.json"), tmp_path / "run/result.json"))  # fmt: skip
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    lines = bucket.read(f"{root}/run/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 13)]
