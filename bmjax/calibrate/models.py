"""The models of a step, read part by part: the embedding, one layer after another, the head.

Memory holds one layer of every model, as it is stored, sharded over the mesh. A large embedding or head stays in its
file: it is read block by block where all models are needed, and whole of one model at a time. Models that are small
together stay in memory after their first reading.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint
from bmjax.merge.engine import chunks
from bmjax.model import parts
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, unflatten
from bmjax.parallel import turns
from bmjax.parallel.mesh import sharding
from bmjax.weights import hf

Tree = dict[str, Any]
Index = tuple[slice, ...]
KEPT_BYTES = 2**31  # of all models of a step together
CHUNK = 2**24  # entries of a parameter that are merged at a time


class Models:
    """A step's models by name, the base first; `checksums` gets those of the tensors that were read."""

    def __init__(self, directories: Mapping[str, Path], config: ModelConfig, mesh: Mesh) -> None:
        """Open the models; UserError for one that is not of `config`'s sizes."""
        self.config, self.mesh = config, mesh
        self.checkpoints: dict[str, Checkpoint] = {}
        for name, directory in directories.items():
            self.checkpoints[name] = hf.open_params(directory, config)
        self.checksums: dict[str, dict[str, str]] = {name: {} for name in directories}
        self.nbytes = sum(info.nbytes for c in self.checkpoints.values() for info in c.tensors.values())
        self._kept: dict[tuple[str, int], Tree] = {}

    @property
    def branches(self) -> list[str]:
        """The names of all models but the base."""
        return list(self.checkpoints)[1:]

    def load(self, part: int) -> list[Tree]:
        """Return a part's parameters of every model, the base first, in their stored types. A large one is `OnDisk`."""
        return [self.load_one(name, part) for name in self.checkpoints]

    def load_one(self, name: str, part: int) -> Tree:
        """Return a part's parameters of one model, as `load` does."""
        if (name, part) in self._kept:
            return self._kept[name, part]
        keeps, is_layer = self.nbytes <= KEPT_BYTES, 1 <= part <= self.config.num_layers

        def leaf(row: Param) -> Any:
            stays = not keeps and not is_layer and math.prod(row.shape) > CHUNK
            return OnDisk(self, name, row) if stays else self.read(name, row)

        tree = unflatten((row.path, leaf(row)) for row in parts.rows(self.config, part))
        if keeps:
            self._kept[name, part] = tree
        return tree

    def read(self, name: str, row: Param, index: Index = ()) -> jax.Array:
        """Read a parameter, or the block of it that `index` selects, and place it on the mesh."""
        checkpoint, key = self.checkpoints[name], row.hf_key
        tensor = hf.read_tensor(checkpoint, key, index[::-1] if row.transposed else index)
        if not index and tensor.dtype == checkpoint.tensors[key].numpy_dtype and key not in self.checksums[name]:
            self.checksums[name][key] = checksum(tensor)
        leaf = tensor.T if row.transposed else tensor
        return jax.make_array_from_callback(leaf.shape, sharding(self.mesh, row.axes, leaf.shape), lambda at: leaf[at])

    def check_finite(self, part: int) -> None:
        """Raise a UserError that names model and tensor where a part holds NaN or infinity."""
        for name in self.checkpoints:
            for row in parts.rows(self.config, part):
                if not all(np.isfinite(self.read(name, row, index)).all() for index in pieces(row, None)):
                    raise UserError(
                        f"model '{name}': tensor '{row.hf_key}' holds NaN or infinity; the training run is broken"
                    )


@dataclass(frozen=True)
class OnDisk:
    """A model's parameter that stays in its file; indexing with one of its `pieces` reads that."""

    models: Models
    name: str
    row: Param

    def __getitem__(self, index: Index) -> jax.Array:
        return self.models.read(self.name, self.row, index)


def whole(params: Tree) -> Tree:
    """Return parameters with those that are on disk read."""
    return jax.tree.map(
        lambda leaf: leaf.models.read(leaf.name, leaf.row) if isinstance(leaf, OnDisk) else leaf, params
    )


def pieces(row: Param, leaf: Any) -> list[Index]:
    """Return the blocks in which a parameter is merged, rows of its tensor in the file.

    An array is cut on CPUs alone: XLA holds every product of a large parameter whole there.
    """
    rows, height = row.hf_shape[0], row.hf_shape[0]
    if not isinstance(leaf, jax.Array) or jax.default_backend() == "cpu":
        height = max(1, CHUNK * rows // math.prod(row.shape))
    starts = range(0, rows, height)
    return [block[:: -1 if row.transposed else 1] for block in (
        (slice(start, min(start + height, rows)), *(slice(0, size) for size in row.hf_shape[1:])) for start in starts
    )]  # fmt: skip


def fitting(index: Index, shape: tuple[int, ...]) -> Index:
    """Return the index of a block in an array of this shape that broadcasts over the parameter."""
    return tuple(slice(0, 1) if n == 1 else i for n, i in zip(shape, index, strict=True))


def piece(array: Any, index: Index) -> jax.Array:
    """Return a block of a parameter, or of an array that broadcasts over it."""
    if isinstance(array, OnDisk):
        return array[index]
    if all(size in (1, part.stop - part.start) for size, part in zip(array.shape, index, strict=True)):
        return array
    block: jax.Array = turns.finished(array[fitting(index, array.shape)])
    return block


def checksum(tensor: np.ndarray) -> str:
    """Return the checksum of a tensor, as the file engine computes it."""
    flat, step = tensor.reshape(-1), chunks.CHUNK
    return chunks.digest(chunks.block_digest(flat[i : i + step]) for i in range(0, max(1, len(flat)), step))


def checksums_of(model: Checkpoint, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the checksum of every tensor by name; those that are not `known` are read."""
    return {name: known.get(name) or checksum(model.read(name)) for name in sorted(model.tensors)}
