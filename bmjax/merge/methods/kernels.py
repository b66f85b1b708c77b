"""What kernels take, and what many of them compute: pure functions of some rows of one tensor in every model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bmjax.merge.lazy import Array, jnp, lax


class Block(NamedTuple):
    """Some rows of one tensor in every model: what a kernel sees.

    Arrays are float32 [rows, columns] in the Hugging Face layout, whose last axis is the row (in_features of a matrix).
    A vector is one row. There may be more rows than the tensor has: they are 0 in every model, and a kernel gives 0 or
    false there.

    base: None for a method without one. branches: the other models. models: those that parameters name, as `rebase`, or
    as `name.0`, `name.1` where a parameter names one a branch. start: index of the first entry in the flattened tensor,
    uint32 [2], high and low half.
    """

    base: Any
    branches: Sequence[Array]
    models: Mapping[str, Array]
    start: Any


Masks = Sequence[Array]
Kernel = Callable[..., Any]


def deltas(x: Block) -> list[Array]:
    """Return the task vector of each branch: its difference from the base, or from `rebase` where a recipe has that."""
    origin = x.models.get("rebase", x.base)
    return [branch - origin for branch in x.branches]


def add(arrays: Sequence[Array]) -> Array:
    """Return the sum, taken in order."""
    return functools.reduce(lambda a, b: a + b, arrays)


def dot(factors: Sequence[Any] | Array, arrays: Sequence[Array]) -> Array:
    """Return sum(factor * array), taken in order."""
    return add([factor * array for factor, array in zip(factors, arrays, strict=True)])


def add_kept(masks: Masks, arrays: Sequence[Array] | Array) -> Array:
    """Return the sum of the arrays, each where its mask is true."""
    return add([jnp.where(kept, array, 0.0) for kept, array in zip(masks, arrays, strict=True)])


def moved(x: Block, factors: Array) -> tuple[Array, None]:
    """Compute base + sum(factor * change). A kernel."""
    return x.base + dot(factors, deltas(x)), None


def magnitudes(x: Block) -> list[Array]:
    """Return |change| of every branch."""
    return [jnp.abs(delta) for delta in deltas(x)]


def random_bits(x: Block, key: Array) -> Array:
    """Return 24 random bits for each entry of a block, as a float32 in [0, 1): a hash of the key and the entry's index.

    key: uint32 [2]. The hash mixes the index, adds the key and mixes again. Each mixing is multiply and xor-shift, with
    constants that Wellons' hash prospector found to have least bias. The first one serves the keys of all models of a
    block. It takes a twentieth of the time of `jax.random`.
    """
    rows, columns = x.branches[0].shape
    local = lax.broadcasted_iota(jnp.uint32, (rows, columns), 0) * jnp.uint32(columns)
    local = local + lax.broadcasted_iota(jnp.uint32, (rows, columns), 1)
    low = x.start[1] + local
    # The high half is that of the block's first entry or the next: two numbers, mixed outside of the loop over entries.
    high = jnp.where(low < local, _mix(x.start[0] + 1), _mix(x.start[0]))
    bits = _mix(((_mix(low) + high) ^ key[1]) + key[0])
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
