"""The passes that methods make over a tensor, compiled: what both engines share.

Each is jitted once for a kernel and its keywords, and compiled once a shape. Arrays arrive as they are stored and are
cast to float32 inside; entries from `valid` on are padding and count for nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bmjax.merge.methods.method import Block, Kernel
from bmjax.merge.quantile import add_each

Static = tuple[tuple[str, Any], ...]


def static(keywords: Mapping[str, Any]) -> Static:
    """Keywords as a key of the cache."""
    return tuple(sorted(keywords.items()))


def block(base: Any, branches: Sequence[Any], models: Mapping[str, Any], start: int = 0) -> Block:
    """A block of stored arrays whose first entry has the flat index `start`."""
    return Block(base, tuple(branches), dict(models), np.array([start >> 32, start & 0xFFFFFFFF], np.uint32))


@functools.cache
def as_numbers(kernel: Kernel) -> Kernel:
    """A kernel of bool arrays, as one of float32 arrays of 0 and 1."""

    def numbers(x: Block, *arguments: Any, **static: Any) -> list[jax.Array]:
        return [mask.astype(jnp.float32) for mask in kernel(x, *arguments, **static)]

    return numbers


@functools.cache
def values(kernel: Kernel, keywords: Static) -> Callable[..., Any]:
    """(block, numbers) -> what the kernel gives."""

    @jax.jit
    def run(x: Block, numbers: Sequence[Any]) -> Any:
        return kernel(_float32(x), *numbers, **dict(keywords))

    return run


@functools.cache
def row_sums(kernel: Kernel, keywords: Static) -> Callable[..., jax.Array]:
    """(block, numbers, valid) -> the row sums of every array that the kernel gives, float32 [K, rows]."""

    @jax.jit
    def run(x: Block, numbers: Sequence[Any], valid: Any) -> jax.Array:
        arrays = kernel(_float32(x), *numbers, **dict(keywords))
        return _sum_rows(arrays, valid)

    return run


@functools.cache
def column_sums(kernel: Kernel, keywords: Static) -> Callable[..., jax.Array]:
    """(block, numbers, valid) -> the column sums of every array, float32 [K, 1, columns]."""

    @jax.jit
    def run(x: Block, numbers: Sequence[Any], valid: Any) -> jax.Array:
        arrays = kernel(_float32(x), *numbers, **dict(keywords))
        return jnp.stack([jnp.sum(_valid(a, valid, 0), axis=0, keepdims=True) for a in arrays])

    return run


@functools.cache
def brackets(kernel: Kernel, keywords: Static) -> Callable[..., Any]:
    """(block, numbers, valid, low [K, R], high [K, R]) -> (values [K] arrays, whether strictly within a bracket [K],
    and how many of each row are < low, <= low and <= high: float32 [K * R * 3, rows])."""

    @jax.jit
    def run(x: Block, numbers: Sequence[Any], valid: Any, low: jax.Array, high: jax.Array) -> Any:
        arrays = [_valid(a, valid, np.inf) for a in kernel(_float32(x), *numbers, **dict(keywords))]
        inside, tests = [], []
        for k, a in enumerate(arrays):
            pairs = [(low[k, r], high[k, r]) for r in range(low.shape[1])]
            inside.append(functools.reduce(jnp.logical_or, [(a > lo) & (a < hi) for lo, hi in pairs]))
            tests += [test for lo, hi in pairs for test in (a < lo, a <= lo, a <= hi)]
        return arrays, inside, _sum_rows([test.astype(jnp.float32) for test in tests], valid)

    return run


@functools.cache
def result(kernel: Kernel, keywords: Static, dtype: Any) -> Callable[..., Any]:
    """(block, numbers, valid) -> (leaf in `dtype`, row sums float32 [K, rows] of what `steps.Stats` holds)."""

    @jax.jit
    def run(x: Block, numbers: Sequence[Any], valid: Any) -> Any:
        x = _float32(x)
        leaf, kept = kernel(x, *numbers, **dict(keywords))
        out = leaf.astype(dtype)
        return out, _sum_rows(_statistics(x, leaf, out, kept), valid)

    return run


def _statistics(x: Block, leaf: jax.Array, out: jax.Array, kept: Sequence[jax.Array] | None) -> list[jax.Array]:
    reference = x.branches[0] if x.base is None else x.base
    origin = x.models.get("rebase", reference)
    changes = [branch - origin for branch in x.branches]
    products = [u * v for i, u in enumerate(changes) for v in changes[i:]]
    up = functools.reduce(jnp.logical_or, [c > 0 for c in changes])
    down = functools.reduce(jnp.logical_or, [c < 0 for c in changes])
    masks = [] if kept is None else list(kept)
    flags = [up & down, ~jnp.isfinite(out.astype(jnp.float32)), *masks]
    return [*products, reference**2, (leaf - reference) ** 2, *(flag.astype(jnp.float32) for flag in flags)]


def _float32(x: Block) -> Block:
    return Block(*jax.tree.map(lambda a: a.astype(jnp.float32), tuple(x[:3])), x.start)


def _valid(a: jax.Array, valid: Any, otherwise: float) -> jax.Array:
    """`a` with its padding, the entries of flat index `valid` and above, replaced."""
    if valid is None:
        return a
    index = lax.broadcasted_iota(jnp.int32, a.shape, 0) * a.shape[1] + lax.broadcasted_iota(jnp.int32, a.shape, 1)
    return jnp.where(index < valid, a, otherwise)


def _sum_rows(arrays: Sequence[jax.Array], valid: Any) -> jax.Array:
    # One reduction for all reads each array once, which XLA's CPU compiler also spreads over the cores.
    arrays = [_valid(a, valid, 0) for a in arrays]
    padded = arrays * 2 if len(arrays) == 1 else arrays
    rows = lax.reduce(padded, [np.float32(0)] * len(padded), add_each, (1,))
    return jnp.stack(rows[: len(arrays)])
