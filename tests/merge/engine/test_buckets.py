"""A merge wholly from and to a bucket: the same result as on disk, also when it is killed on the way."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bmjax
from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io import bucket
from tests.merge.engine.test_files import MODELS, snapshot
from tests.merge.reference import hf_dir

pytestmark = pytest.mark.usefixtures("buckets")
TIES = {
    "merge_method": "ties", "base_model": "backbone", "models": ["math", "code", "science"],
    "parameters": {"density": 0.5},
}  # fmt: skip


@pytest.fixture(params=["s3", "gs", "memory"])
def root(request, tmp_path, monkeypatch) -> str:
    """A folder of a bucket with the four models, which are in the current directory, too."""
    url = f"{request.param}://bucket/{tmp_path.name}"
    for name, tensors in MODELS.items():
        hf_dir(tmp_path / "here" / name, tensors)
        bucket.send_folder(tmp_path / "here" / name, f"{url}/{name}")
    monkeypatch.chdir(tmp_path / "here")
    return url


def in_bucket(recipe: dict, root: str) -> dict:
    return recipe | {"sources": {name: f"{root}/{name}" for name in MODELS}}


def objects(url: str) -> dict[str, bytes]:
    return {name: bucket.read(f"{url}/{name}") for name in bucket.names_in(url)}


def test_a_merge_in_a_bucket_gives_what_one_on_disk_does(root, tmp_path):
    merge(TIES, "out")
    merge(in_bucket(TIES, root), f"{root}/out")
    ours, reference = objects(f"{root}/out"), snapshot(tmp_path / "here/out")
    assert ours.keys() == reference.keys()
    assert ours["model.safetensors"] == reference["model.safetensors"]
    assert ours["config.json"] == reference["config.json"]
    report = json.loads(ours["merge_report.json"])
    assert report["sources"]["math"]["directory"] == f"{root}/math"
    assert "gs:" not in " ".join(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match="out: exists and is not empty; choose another output directory, or add"):
        bmjax.merge(in_bucket(TIES, root), f"{root}/out")


def test_models_named_by_their_urls(root):
    recipe = TIES | {
        "base_model": f"{root}/backbone",
        "models": [f"{root}/{name}" for name in ("math", "code", "science")],
    }
    merge(TIES, "out")
    merge(recipe, f"{root}/out")
    assert objects(f"{root}/out")["model.safetensors"] == Path("out/model.safetensors").read_bytes()


def test_a_model_that_is_not_there_is_named(root):
    with pytest.raises(UserError, match=f"{root}/none: no such model directory in the bucket"):
        merge(TIES | {"sources": {"math": f"{root}/none"}}, f"{root}/out")
    assert objects(f"{root}/out") == {}


def test_a_merge_that_died_while_it_was_sent_is_made_again_by_the_same_command(root, monkeypatch):
    class Dies(BaseException):
        pass

    system = bucket._open(root)

    def put_file(local, remote, *arguments, real=system.put_file, **options):
        if remote.endswith("config.json"):
            raise Dies
        return real(local, remote, *arguments, **options)

    merge(TIES, "out")
    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(system, "put_file", put_file)
        merge(in_bucket(TIES, root), f"{root}/out")
    assert "model.safetensors" in objects(f"{root}/out") and "config.json" not in objects(f"{root}/out")
    merge(in_bucket(TIES, root), f"{root}/out")
    assert objects(f"{root}/out").keys() == {path.name for path in Path("out").iterdir()}
    bucket.write(f"{root}/notes/todo.txt", b"mine")
    with pytest.raises(UserError, match="notes: exists and is not a model directory"):
        merge(in_bucket(TIES, root), f"{root}/notes")


@pytest.mark.slow
def test_a_merge_that_is_killed_five_times_ends_the_same(root, tmp_path, buckets):
    """Before the models are there, while they are merged, and while the result is being sent."""
    if root.startswith("memory"):
        pytest.skip("a bucket in memory has one process")
    merge(TIES, "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(in_bucket(TIES, root)))
    command = [sys.executable, "-m", "bmjax.merge", str(tmp_path / "recipe.yaml"), f"{root}/out"]
    began = time.monotonic()
    whole = [*command[:-1], f"{root}/whole"]
    assert subprocess.run(whole).returncode == 0
    seconds, rng, killed = time.monotonic() - began, random.Random(0), 0
    for kill in range(5):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        if kill % 2:
            time.sleep(seconds * rng.uniform(0.5, 0.95))
        else:
            assert any("sending" in line for line in process.stderr)
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if "config.json" in objects(f"{root}/out"):  # it was quicker: once more, over it
            command = [*command, *(["--overwrite"] if "--overwrite" not in command else [])]
    assert killed >= 3
    assert subprocess.run(command).returncode == 0
    assert objects(f"{root}/out")["model.safetensors"] == (tmp_path / "here/out/model.safetensors").read_bytes()
