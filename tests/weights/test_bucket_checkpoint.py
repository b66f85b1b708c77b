"""Checkpoints in a bucket: whole when every process of one start has written its part, whoever else still writes."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from bmjax.io import bucket
from bmjax.weights import bucket_checkpoint
from bmjax.weights.bucket_checkpoint import BucketCheckpoints, is_whole

pytestmark = pytest.mark.usefixtures("buckets")
SHAPES = {"x": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


def filled(value: float) -> dict[str, Any]:
    return {"x": jax.device_put(np.full((8, 3), value, np.float32), SHAPES["x"].sharding)}


@pytest.fixture(params=["s3", "gs"])
def url(request, tmp_path) -> str:
    return f"{request.param}://bucket/{tmp_path.name}"


def write_as(process: int, checkpoints: BucketCheckpoints, value: float, monkeypatch) -> None:
    """Write step 3 as one of two processes that train together, filled with a value."""
    with monkeypatch.context() as patch:
        patch.setattr(bucket_checkpoint, "is_main", lambda: process == 0)
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: process)
        patch.setattr(checkpoints, "latest", lambda: None)  # it looked before the others had written
        checkpoints.save(3, filled(value), {"value": value})
        assert checkpoints._thread is not None
        checkpoints._thread.join()
        checkpoints._thread = None  # the other process is not there to be waited for
    assert checkpoints._error is None


def test_a_process_of_an_earlier_start_neither_counts_nor_mixes_its_arrays(url, monkeypatch):
    earlier, later = (BucketCheckpoints(url, keep=2) for _ in range(2))
    write_as(0, later, 2.0, monkeypatch)
    write_as(1, earlier, 1.0, monkeypatch)
    assert not is_whole(f"{url}/3") and later.latest() is None
    write_as(1, later, 2.0, monkeypatch)
    write_as(1, earlier, 1.0, monkeypatch)
    assert is_whole(f"{url}/3") and later.latest() == 3
    state, meta = later.restore(SHAPES)
    assert meta == {"value": 2.0} and np.unique(state["x"]).tolist() == [2.0]


def test_a_checkpoint_that_names_no_run_is_read(url):
    checkpoints = BucketCheckpoints(url, keep=2)
    checkpoints.save(5, filled(4.0), {"tokens": 7})
    checkpoints.close()
    # As the first ones were laid out: arrays and marks in the step itself.
    facts = json.loads(bucket.read(f"{url}/5/meta.json"))
    run = facts.pop("run")
    for name in bucket.names_in(f"{url}/5/{run}"):
        bucket.write(f"{url}/5/{name}", bucket.read(f"{url}/5/{run}/{name}"))
    bucket.remove(f"{url}/5/{run}")
    bucket.write(f"{url}/5/meta.json", json.dumps(facts).encode())
    state, meta = BucketCheckpoints(url, keep=2).restore(SHAPES)
    assert meta == {"tokens": 7} and np.unique(state["x"]).tolist() == [4.0]
