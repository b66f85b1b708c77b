"""The batch: packed rows of tokens as one value, from the loader to the loss. A jitted step takes it as a pytree."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import numpy as np

A = TypeVar("A", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch(Generic[A]):
    """Rows of one or more documents each: three arrays [B, T], in host memory (np.ndarray) or on a mesh (jax.Array)."""

    tokens: A  # int32
    segment_ids: A  # int32, 1.. per document of a row, 0 for padding
    loss_mask: A  # uint8 (integers of another width will do), 1 where the token is a target

    @property
    def real_tokens(self) -> int:
        """Number of tokens that belong to a document."""
        return int(np.count_nonzero(self.segment_ids))
