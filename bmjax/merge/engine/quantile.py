"""Exact order statistics of float32 numbers without sorting them all.

There are two algorithms, because neither serves the other's engine:

- `order_statistics`, for arrays in memory, sharded or not: 32 counting passes build the value bit by bit. Devices
  exchange counts only. Over files each pass computes every chunk again: at four bits a pass, merges by ties and
  arcee_fusion took 1.5 times as long.
- `bracket_search`, for tensors read in chunks: brackets estimated from a sample, then one pass that counts what lies
  below them and takes all values within. Over a sharded array those values would have to go to the host.

Neither result depends on the order of the elements or on how they are laid out.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bmjax.merge.lazy import Array, jnp, lax

MAX_ELEMENTS = 2**31 - 1
SIGMAS = 3.5  # half the width of a bracket, in standard deviations of a sample's quantile


def rank(q: float, n: int) -> int:
    """Return the index floor(q * (n - 1)) of the q-quantile in `n` sorted values."""
    return math.floor(q * (n - 1))


# Arrays in memory


def order_statistics(x: Array, ranks: Sequence[int] | Array) -> Array:
    """Return the values that `sort(ravel(x))` has at `ranks`, float32 [len(ranks)], exactly.

    The bits of floats, read as integers, have the order of the floats once those of negative ones are turned round.
    Works under jit, where ranks are run-time inputs, and on sharded arrays.

    x: float32 of any shape, 1 to `MAX_ELEMENTS` elements, no NaN. -0.0 counts as 0.0. ranks: 0-based. Raises ValueError
    for another number of elements and for ranks that are out of range.
    """
    if not 0 < x.size <= MAX_ELEMENTS:
        raise ValueError(f"order_statistics: {x.size} elements, expected 1 to {MAX_ELEMENTS}")
    if not isinstance(ranks, jnp.ndarray) and any(not 0 <= r < x.size for r in ranks):
        raise ValueError(f"order_statistics: ranks {list(ranks)} outside 0..{x.size - 1}")
    bits = _ordered(lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32))
    wanted = jnp.asarray(ranks, jnp.int32)

    def next_bit(i: Array, pattern: Array) -> Array:
        # The answer is the largest pattern that at most `rank` elements lie below; the first bit is the sign.
        candidate = pattern ^ (jnp.int32(1) << (31 - i))
        counts = lax.platform_dependent(jnp.atleast_1d(bits), candidate, cpu=_counts_by_rows, default=_counts_at_once)
        return jnp.where(counts <= wanted, candidate, pattern)

    pattern = lax.fori_loop(0, 32, next_bit, jnp.full(wanted.shape, np.iinfo(np.int32).min))
    return lax.bitcast_convert_type(_ordered(pattern), jnp.float32)


def _ordered(bits: Array) -> Array:
    """Turn float patterns into integers of the same order, and back: those of negative floats run the other way."""
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _counts_at_once(bits: Array, limits: Array) -> Array:
    """Return how many elements are below each of `limits` [R], int32 [R]."""
    # Each sum is one scalar all-reduce however the array is sharded; GPU and TPU compilers fuse them into one pass.
    return jnp.stack([jnp.sum(bits < limits[k], dtype=jnp.int32) for k in range(limits.size)])


def _counts_by_rows(bits: Array, limits: Array) -> Array:
    # XLA's CPU compiler runs one reduction with several results in parallel and vectorized, which it does not do for
    # plain sums of comparisons: 30 times the speed. The barrier keeps it from joining the two sums into one.
    masks = tuple((bits < limits[k % limits.size]).astype(jnp.int32) for k in range(max(2, limits.size)))
    rows = lax.reduce(masks, (np.int32(0),) * len(masks), add_pairs, (bits.ndim - 1,))
    return jnp.sum(jnp.stack(lax.optimization_barrier(rows)).reshape(len(masks), -1), axis=-1)[: limits.size]


def add_pairs(x: Sequence[Array], y: Sequence[Array]) -> tuple[Array, ...]:
    """Add two tuples of arrays: the combination of a `lax.reduce` that sums several arrays at once."""
    return tuple(a + b for a, b in zip(x, y, strict=True))


# Tensors read in chunks


class NotFiniteError(Exception):
    """A search met NaN."""


def bracket_search(
    size: int,
    ranks: Sequence[Sequence[int]],
    samples: Sequence[np.ndarray],
    spread: float,
    count: Callable[[np.ndarray, np.ndarray], Sequence[tuple[list[np.ndarray], np.ndarray]]],
) -> list[np.ndarray]:
    """Return the values of large arrays at each one's ranks, float32, exactly, by passes over their chunks.

    size: entries of an array. ranks, samples: of each array. spread: factor of the brackets' width. count: a pass with
    the brackets low, high, float32 [B], B ranks in all. It gives for each chunk values of every array, among them all
    strictly within its brackets, and how many entries are < low, <= low and <= high, [B * 3]. A value that its bracket
    missed gets a wider one. Raises NotFiniteError where brackets without ends miss a value.
    """
    wanted = [(array, rank) for array, array_ranks in enumerate(ranks) for rank in array_ranks]
    values: list[float | None] = [None] * len(wanted)
    ordered, spread = [np.sort(a, axis=None) for a in samples], SIGMAS * spread
    while None in values:
        pairs = zip(wanted, values, strict=True)
        brackets = [_bracket(r, size, ordered[a], spread) if v is None else (v, v) for (a, r), v in pairs]
        low, high = np.array(brackets, np.float32).T
        chunks = count(low, high)
        counts = np.sum([below for _, below in chunks], axis=0).reshape(-1, 3)
        picks = [np.sort(np.concatenate(parts)) for parts in zip(*(within for within, _ in chunks), strict=True)]
        for i, (array, rank) in enumerate(wanted):
            if values[i] is None:
                values[i] = _pick(rank, picks[array], low[i], high[i], counts[i])
        if None in values and not np.isfinite([low, high]).any():
            raise NotFiniteError
        spread *= 8
    in_order = iter(values)
    return [np.array([next(in_order) for _ in array_ranks], np.float32) for array_ranks in ranks]


def _bracket(rank: int, size: int, ordered: np.ndarray, spread: float) -> tuple[float, float]:
    share = (rank + 0.5) / size
    position = share * len(ordered)
    reach = spread * math.sqrt(len(ordered) * share * (1 - share)) + 3
    below, above = math.floor(position - reach), math.ceil(position + reach)
    low = float(ordered[below]) if below >= 0 else -math.inf
    return low, float(ordered[above]) if above < len(ordered) else math.inf


def _pick(rank: int, picks: np.ndarray, low: float, high: float, counts: np.ndarray) -> float | None:
    """Return the value of `rank`, None where it lies outside the bracket.

    counts: of entries < low, <= low and <= high. picks: sorted, holds all values strictly between.
    """
    under, first, last = (int(count) for count in counts)
    if under <= rank < first:
        return float(low)
    start, end = np.searchsorted(picks, low, "right"), np.searchsorted(picks, high, "left")
    if first <= rank < first + end - start:
        return float(picks[start + rank - first])
    return float(high) if first + end - start <= rank < last else None
