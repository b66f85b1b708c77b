"""The batch: packed rows of tokens as one value, from the loader to the loss.

`branch.loader` makes batches, `qwen2.loss_sum` and `calibrate` read them, and a jitted step takes one as a pytree.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bmjax.parallel.mesh import sharding

A = TypeVar("A", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch(Generic[A]):
    """Rows of one or more documents each: three arrays [B, T], in host memory (np.ndarray) or on a mesh (jax.Array).

    tokens: int32. segment_ids: int32, 1.. per document of a row, 0 for padding. loss_mask: uint8, 1 where the token is
    a target; integers of another width will do.
    """

    tokens: A
    segment_ids: A
    loss_mask: A

    @property
    def real_tokens(self) -> int:
        """Number of tokens that belong to a document."""
        return int(np.count_nonzero(self.segment_ids))


def batch_sharding(mesh: Mesh, rows: int, length: int) -> NamedSharding:
    """Return the layout of a batch [rows, length]: rows split over data and fsdp, tokens over context."""
    return sharding(mesh, ("batch", "length"), (rows, length))


def place_batch(mesh: Mesh, batch: Batch[np.ndarray]) -> Batch[jax.Array]:
    """Put a batch on the mesh; every process holds the same one in host memory."""
    layout = batch_sharding(mesh, *batch.tokens.shape)
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, layout, array.__getitem__), batch)
