"""Many files under a low limit of open files."""

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bmjax.io import open_files
from bmjax.io.open_files import OpenFiles
from bmjax.io.safetensors import Reader, SharedWriter, open_checkpoint


@pytest.fixture
def limit():
    """A soft limit that leaves room for a few files more than are open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_most_open_files_follows_the_systems_limit(limit, monkeypatch):
    monkeypatch.setattr(open_files.os, "listdir", lambda folder: ["0"] * 10)
    limit(400)
    assert open_files.most_open_files() == 100
    limit(16)
    assert open_files.most_open_files() == open_files.LEAST
    monkeypatch.setattr(open_files.os, "listdir", lambda folder: ["0"] * 300)
    limit(400)
    assert open_files.most_open_files() == 50


def test_more_shards_than_files_may_be_open(tmp_path: Path, limit) -> None:
    """Written, read and put on disk by several threads, 300 files one way and 300 the other."""
    import os

    tensors = {f"t{i:03}": np.full(8, i, np.float32) for i in range(300)}
    limit(len(os.listdir("/proc/self/fd")) + 200)
    with SharedWriter(tmp_path, [(n, t.dtype, t.shape) for n, t in tensors.items()], 32) as writer, \
            ThreadPoolExecutor(4) as pool:  # fmt: skip
        list(pool.map(lambda name: writer.write(name, 0, tensors[name]), tensors))
        list(pool.map(writer.flush, tensors))
    checkpoint, reader = open_checkpoint(tmp_path), Reader()
    assert len({info.file for info in checkpoint.tensors.values()}) == 300

    def read(name: str) -> bool:
        out = np.empty(8, np.float32)
        reader.read(checkpoint.tensors[name], 0, out)
        return bool((out == tensors[name]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [*tensors, *tensors]))
    reader.close()


def test_a_file_in_use_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(open_files, "most_open_files", lambda: 2)
    for i in range(6):
        (tmp_path / str(i)).write_bytes(bytes([i]))
    pool = OpenFiles(lambda path: os.open(path, os.O_RDONLY))
    with pool.use(tmp_path / "0") as first:
        for i in range(1, 6):
            with pool.use(tmp_path / str(i)) as other:
                assert os.pread(other, 1, 0) == bytes([i])
        assert os.pread(first, 1, 0) == b"\0"
    before = len(os.listdir("/proc/self/fd"))
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2
