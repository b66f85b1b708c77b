"""Training checkpoints in a bucket: zarr arrays written by tensorstore's own drivers, each process its part.

Orbax renames a directory to say that it is whole, which S3 has no way to do. Here every process writes its part into
STEP/RUN, and STEP/RUN/done/PROCESS after it. The first one writes STEP/meta.json, which names RUN: a step is whole when
all of them are there. RUN is drawn anew at every start, so that a process of an earlier start that still writes (a pod
was killed, but not this one yet) neither counts as done nor mixes its arrays with others'. checkpoint.py opens this for
a directory that is a URL.
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bmjax.config import UserError, first_line
from bmjax.io import bucket
from bmjax.parallel.processes import is_main, shared_token, wait_for_all
from bmjax.urls import url_of
from bmjax.weights.checkpoint_base import Checkpoints, damaged, leaf_name, named_leaves

LARGEST_CHUNK = 2**28  # bytes of an object; S3 takes at most 5 GiB at a time
META = "meta.json"


class BucketCheckpoints(Checkpoints):
    """The checkpoints of a training run in a bucket.

    keep: how many of the newest stay; one more does while it is replaced. keep_every: checkpoints of a multiple of so
    many steps stay, too.
    """

    directory: str

    def __init__(self, directory: str, keep: int, keep_every: int | None = None) -> None:
        self.directory, self._keep, self._keep_every = directory, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._run = shared_token()
        _key_value_store(directory)  # refuses a scheme that tensorstore has no driver for
        if is_main():
            for step in bucket.folders(directory):
                if step.isdigit() and not is_whole(f"{directory}/{step}"):
                    bucket.remove(f"{directory}/{step}")
        wait_for_all("bmjax/checkpoints")

    def _save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        # Copies on the host, so that the arrays may be donated to the next step.
        parts = {
            name: (leaf, [(s.index, np.array(s.data)) for s in leaf.addressable_shards if s.replica_id == 0])
            for name, leaf in named_leaves(state).items()
        }
        facts = {**facts, "run": self._run, "processes": jax.process_count()}
        self._thread = threading.Thread(target=self._write, args=(step, parts, facts), name="bmjax-checkpoint")
        self._thread.start()

    def _write(self, step: int, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write this process's part of a step, and last that it is there."""
        import tensorstore as ts

        url = f"{self.directory}/{step}"
        folder = f"{url}/{self._run}"
        try:
            self._remove_old()  # in this thread, for a step has thousands of files where many devices train
            arrays = {
                name: ts.open(_array(folder, name, leaf), open=True, create=True) for name, (leaf, _) in parts.items()
            }
            writes = [
                arrays[n].result()[index].write(data) for n, (_, blocks) in parts.items() for index, data in blocks
            ]
            for write in writes:
                write.result()
            if is_main():
                bucket.write(f"{url}/{META}", json.dumps(facts).encode())
            bucket.write(f"{folder}/done/{jax.process_index()}", b"")
        except Exception as error:
            self._error = error

    def latest(self) -> int | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            error, self._error = self._error, None
            if error is not None:
                raise UserError(
                    f"{self.directory}: cannot write a checkpoint: {first_line(error)}; the earlier ones are intact, "
                    "run again to resume"
                )
            wait_for_all("bmjax/checkpoint-written")
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """Return the steps that are whole."""
        steps = [int(name) for name in bucket.folders(self.directory) if name.isdigit()]
        return [step for step in sorted(steps) if is_whole(f"{self.directory}/{step}")]

    def _remove_old(self) -> None:
        if is_main():
            for step in self._steps()[: -self._keep]:
                if not self._keep_every or step % self._keep_every:
                    # First what says that it is whole.
                    bucket.remove(f"{self.directory}/{step}/{META}")
                    bucket.remove(f"{self.directory}/{step}")

    def _facts(self, step: int) -> dict[str, Any]:
        return facts_of(f"{self.directory}/{step}")

    def _load(self, step: int, abstract_state: Any) -> Any:
        return load(f"{self.directory}/{step}", abstract_state)

    def close(self) -> None:
        self.latest()
        self._remove_old()


def is_whole(url: str) -> bool:
    """Return whether a step was written by all processes of its training."""
    data = bucket.read(f"{url}/{META}")
    if data is None:
        return False
    facts = json.loads(data)
    return len(bucket.names_in(f"{_folder(url, facts)}/done")) == facts["processes"]


def _folder(url: str, facts: Mapping[str, Any]) -> str:
    """Return where the arrays and marks of a step are. The first checkpoints named no run: in the step itself."""
    return f"{url}/{facts['run']}" if "run" in facts else url


def facts_of(url: str) -> dict[str, Any]:
    """Return what was saved with a step: meta, leaves (dtype and shape by name), run and number of processes."""
    data = bucket.read(f"{url}/{META}")
    if data is None:
        raise UserError(f"{url}: not a checkpoint of a training: no {META}")
    return json.loads(data)


def load(url: str, abstract_state: Any) -> Any:
    """Read arrays of a step as a pytree of jax.ShapeDtypeStruct with shardings asks for them, each process its part."""
    import tensorstore as ts

    leaves, folder = named_leaves(abstract_state), _folder(url, facts_of(url))
    try:
        stores = {name: ts.open(_array(folder, name, leaf, reading=True), open=True) for name, leaf in leaves.items()}
        reads: dict[str, dict[Any, Any]] = {}
        for name, leaf in leaves.items():
            store, reads[name] = stores[name].result(), {}
            for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
                key = str(index)
                if key not in reads[name]:
                    reads[name][key] = store[index].read()

        def array(name: str, leaf: Any) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                return np.asarray(reads[name][str(index)].result(), leaf.dtype)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)

        arrays = {name: array(name, leaf) for name, leaf in leaves.items()}
    except Exception as error:
        raise damaged(url, error) from None
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_state)
    return jax.tree_util.tree_unflatten(treedef, [arrays[leaf_name(path)] for path, _ in paths])


def _array(folder: str, name: str, leaf: Any, reading: bool = False) -> dict[str, Any]:
    """Return tensorstore's description of an array. It is stored in the parts that devices hold, or smaller ones."""
    store = {"driver": "zarr3", "kvstore": _key_value_store(f"{folder}/arrays/{name}")}
    if reading:
        return {**store, "fill_missing_data_reads": False, "recheck_cached_data": False}
    chunk = list(leaf.sharding.shard_shape(leaf.shape))
    for axis in range(len(chunk)):
        # A factor of the device's part: no two processes write the same object.
        while chunk[axis] > 1 and math.prod(chunk) * leaf.dtype.itemsize > LARGEST_CHUNK:
            factor = next(n for n in range(2, chunk[axis] + 1) if chunk[axis] % n == 0)
            chunk[axis] //= factor
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    metadata = {"shape": list(leaf.shape), "data_type": np.dtype(leaf.dtype).name, "chunk_grid": grid}
    return {**store, "metadata": metadata, "store_data_equal_to_fill_value": True}


def _key_value_store(url: str) -> dict[str, Any]:
    """Return tensorstore's description of a folder of a bucket."""
    scheme, _, rest = (url_of(url) or "").partition("://")
    name, _, path = rest.partition("/")
    if scheme == "gs":
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
        return {"driver": "gcs", "bucket": name, "path": f"{path}/"}
    if scheme == "s3":
        store: dict[str, Any] = {"driver": "s3", "bucket": name, "path": f"{path}/"}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # the default looks for files first, and complains of each
            store["aws_credentials"] = {"type": "environment"}
        # Tensorstore does not read the variable of S3-like services that the AWS tools know.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            store |= {"endpoint": endpoint, "aws_region": region}
        return store
    raise UserError(f"{url}: checkpoints can be kept on disk, in gs:// and in s3://, not in {scheme}://")
