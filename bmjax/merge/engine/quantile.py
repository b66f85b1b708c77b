"""Exact order statistics of float32 numbers without sorting: built bit by bit, from counts.

The bits of floats, read as integers, have the order of the floats (negative ones turned round). 32 counting passes find
the k-th smallest value exactly; devices exchange counts only, never elements, and the result depends neither on the
order of the elements nor on how they are laid out.
"""

import math
from collections.abc import Sequence

import numpy as np

from bmjax.merge.lazy import Array, jnp, lax

MAX_ELEMENTS = 2**31 - 1


def rank(q: float, n: int) -> int:
    """The index floor(q * (n - 1)) of the q-quantile in `n` sorted values."""
    return math.floor(q * (n - 1))


def order_statistics(x: Array, ranks: Sequence[int] | Array) -> Array:
    """The values that `sort(ravel(x))` has at `ranks`, float32 [len(ranks)], exactly.

    x: float32 of any shape, at least one element, no NaN. -0.0 counts as 0.0. ranks: 0-based. Works under jit (ranks
    are then run-time inputs) and on sharded arrays.
    """
    if not 0 < x.size <= MAX_ELEMENTS:
        raise ValueError(f"order_statistics: {x.size} elements, expected 1 to {MAX_ELEMENTS}")
    if not isinstance(ranks, jnp.ndarray) and any(not 0 <= r < x.size for r in ranks):
        raise ValueError(f"order_statistics: ranks {list(ranks)} outside 0..{x.size - 1}")
    bits = _ordered(lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32))
    wanted = jnp.asarray(ranks, jnp.int32)

    def next_bit(i: Array, found: Array) -> Array:
        # The answer is the largest pattern that at most `rank` elements lie below; the first bit is the sign.
        candidate = found ^ (jnp.int32(1) << (31 - i))
        return jnp.where(_counts(bits, candidate) <= wanted, candidate, found)

    found = lax.fori_loop(0, 32, next_bit, jnp.full(wanted.shape, np.iinfo(np.int32).min))
    return lax.bitcast_convert_type(_ordered(found), jnp.float32)


def _ordered(bits: Array) -> Array:
    """Float patterns as integers of the same order, and back: those of negative floats run the other way."""
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _counts(bits: Array, limits: Array) -> Array:
    """How many elements are below each of `limits` [R], int32 [R]."""
    return lax.platform_dependent(jnp.atleast_1d(bits), limits, cpu=_counts_by_rows, default=_counts_at_once)


def _counts_at_once(bits: Array, limits: Array) -> Array:
    # Each sum is one scalar all-reduce however the array is sharded; GPU and TPU compilers fuse them into one pass.
    return jnp.stack([jnp.sum(bits < limits[k], dtype=jnp.int32) for k in range(limits.size)])


def _counts_by_rows(bits: Array, limits: Array) -> Array:
    # XLA's CPU compiler runs one reduction with several results in parallel and vectorized, which it does not do for
    # plain sums of comparisons: 30 times the speed. The barrier keeps it from joining the two sums into one.
    masks = tuple((bits < limits[k % limits.size]).astype(jnp.int32) for k in range(max(2, limits.size)))
    rows = lax.reduce(masks, (np.int32(0),) * len(masks), add_each, (bits.ndim - 1,))
    return jnp.sum(jnp.stack(lax.optimization_barrier(rows)).reshape(len(masks), -1), axis=-1)[: limits.size]


def add_each(x: Sequence[Array], y: Sequence[Array]) -> tuple[Array, ...]:
    """The combination of a `lax.reduce` that sums several arrays at once."""
    return tuple(a + b for a, b in zip(x, y, strict=True))
