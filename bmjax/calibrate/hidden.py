"""Hidden states of rows between the parts of a model, in memory-mapped files.

A stream's states before a part and those after it are two files, so that a part that was interrupted is computed again
from the first. A trace keeps the states before every part, for a backward pass.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.io.atomic import replacing_file
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import sharding

Batches = Sequence[Batch[jax.Array]]


class Hidden:
    """Hidden states [B, T, D] of batches of one shape, by part and batch. Position p is what part p reads."""

    def __init__(self, folder: Path, name: str, batches: Batches, width: int, dtype: Any, mesh: Mesh, kept: int = 2):
        """kept: positions that are kept at a time; position p takes the place of position p - kept."""
        self.batches, self._mesh, self._kept = batches, mesh, kept
        self._shape = (len(batches), *batches[0].tokens.shape, width)
        self._paths = [folder / f"{name}.{i}.states" for i in range(kept)]
        self._maps: list[np.memmap | None] = [None] * kept
        self._dtype = np.dtype(dtype)
        folder.mkdir(parents=True, exist_ok=True)

    def _map(self, position: int) -> np.memmap:
        slot = position % self._kept
        array = self._maps[slot]
        if array is None:
            path, size = self._paths[slot], int(np.prod(self._shape)) * self._dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                with path.open("wb") as file:
                    getattr(os, "posix_fallocate", lambda fd, _, n: os.ftruncate(fd, n))(file.fileno(), 0, size)
            array = self._maps[slot] = np.memmap(path, self._dtype, "r+", shape=self._shape)
        return array

    def read(self, position: int, index: int) -> jax.Array:
        """Return the states of a batch that part `position` reads, on the mesh."""
        states = np.array(self._map(position)[index])  # a copy: the file may be written while the device reads
        return jax.device_put(states, sharding(self._mesh, ("batch", "length", None), states.shape))

    def write(self, position: int, index: int, states: jax.Array) -> None:
        """Keep the states of a batch that part `position` will read."""
        self._map(position)[index] = np.asarray(states)

    def flush(self, position: int) -> None:
        """Put the states that part `position` reads on disk."""
        self._map(position).flush()


def save_array(path: Path, array: jax.Array) -> None:
    """Write an array that `np.load` can map; it is on disk, whole, when this returns."""
    with replacing_file(path) as file:
        np.save(file, np.asarray(array))
