"""The compiled programs of the passes that methods make over a tensor, for both engines.

Each is jitted once for a kernel and its keywords, and compiled once a shape. Arrays arrive as they are stored and are
cast to float32 inside. A block may end in padding, entries that are 0 in every model: kernels give 0 or false there.
Programs take a block, and operands as `tensor.at` makes them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bmjax.merge.engine.device import platform
from bmjax.merge.engine.quantile import add_pairs
from bmjax.merge.methods.kernels import Block, Kernel


def block(base: Any, branches: Sequence[Any], models: Mapping[str, Any], start: int = 0) -> Block:
    """Make a block of stored arrays whose first entry has the flat index `start`."""
    return Block(base, tuple(branches), dict(models), np.array([start >> 32, start & 0xFFFFFFFF], np.uint32))


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make`, whose programs are kept for the platform that they are made on."""
    kept = functools.cache(lambda on, *arguments, **static: make(*arguments, **static))
    return functools.wraps(make)(lambda *arguments, **static: kept(platform(), *arguments, **static))


@_kept
def values(
    kernel: Kernel, reorder: bool = False, then: Callable[[Any], Any] | None = None, /, **static: Any
) -> Callable[..., Any]:
    """Compile (block, operands) -> what the kernel gives, or what `then` makes of it.

    reorder: sums may be taken in any order.
    """

    def run(x: Block, operands: Sequence[Any]) -> Any:
        result = kernel(_float32(x), *operands, **static)
        return result if then is None else then(result)

    return _compiled(run, reorder)


@_kept
def of_rank() -> Callable[..., jax.Array]:
    """Compile (values, their rows sorted after a 0, least ranks) -> the mask of entries of that rank or above.

    values, least ranks: [rows, columns]; sorted rows: [rows, columns + 1]. An entry has rank r or above where it is
    greater than the one of rank r - 1, and is kept at rank 0 where it is greater than 0.
    """

    def run(values: jax.Array, zero_and_sorted: jax.Array, ranks: jax.Array) -> jax.Array:
        return values > jnp.take_along_axis(zero_and_sorted, ranks, axis=-1, mode="promise_in_bounds")

    # A program of its own, because inside a loop with other work a lookup keeps that from being vector code.
    return _compiled(run)


@_kept
def brackets(kernel: Kernel, owners: tuple[int, ...], /, **static: Any) -> Callable[..., Any]:
    """Compile (block, operands, low [B], high [B]) -> (inside, counts), for brackets of the kernel's K arrays.

    owners: of which array a bracket is. inside: the mask of entries that are strictly within a bracket in some array.
    counts: how many entries of each row are < low, <= low and <= high, int32 [B * 3, rows].
    """

    def run(x: Block, operands: Sequence[Any], low: jax.Array, high: jax.Array) -> Any:
        arrays = kernel(_float32(x), *operands, **static)
        inside, tests = jnp.zeros(arrays[0].shape, jnp.bool_), []
        for i, k in enumerate(owners):
            inside |= (arrays[k] > low[i]) & (arrays[k] < high[i])
            tests += [arrays[k] < low[i], arrays[k] <= low[i], arrays[k] <= high[i]]
        return inside, sum_rows(tests)

    return _compiled(run)


@_kept
def leaves(kernel: Kernel, dtype: Any, /, **static: Any) -> Callable[..., Any]:
    """Compile (block, operands) -> (leaf in `dtype`, packed masks of what is kept).

    Branch b's mask is bit b % 8 of uint8 array b // 8. There are none where all is kept.
    """

    def run(x: Block, operands: Sequence[Any]) -> Any:
        leaf, kept = kernel(_float32(x), *operands, **static)
        # Packed, because every output is computed from the start: one more, not one for each branch.
        masks = [] if kept is None else [kept[b : b + 8] for b in range(0, len(kept), 8)]
        packed = [functools.reduce(jnp.bitwise_or, [m.astype(jnp.uint8) << i for i, m in enumerate(g)]) for g in masks]
        return leaf.astype(dtype), packed

    return _compiled(run)


@_kept
def statistics() -> Callable[..., Any]:
    """Compile (block, leaf, packed masks) -> (row sums of what `report.statistics.Stats` holds, float32 [K, rows]).

    A program of its own: its sums may be taken in any order, which makes them twice as fast.
    """

    def run(x: Block, leaf: jax.Array, packed: Sequence[jax.Array]) -> Any:
        x = _float32(x)
        kept = [(packed[b // 8] >> (b % 8)) & 1 for b in range(len(x.branches))] if packed else []
        reference = x.branches[0] if x.base is None else x.base
        origin = x.models.get("rebase", reference)
        changes = [branch - origin for branch in x.branches]
        products = [u * v for i, u in enumerate(changes) for v in changes[i:]]
        moved = leaf.astype(jnp.float32) - reference
        largest, least = functools.reduce(jnp.maximum, changes), functools.reduce(jnp.minimum, changes)
        # Counts as floats, exact in rows of less than 2**24 entries, because one reduction for all reads each array
        # once.
        conflicts = jnp.where((largest > 0) & (least < 0), 1.0, 0.0)
        return (sum_rows([*products, reference**2, moved**2, conflicts, *(k.astype(jnp.float32) for k in kept)]),)

    return _compiled(run, reorder=True)


def _compiled(run: Callable[..., Any], reorder: bool = False) -> Callable[..., Any]:
    return jax.jit(run, compiler_options=_options(reorder))


@_kept
def _options(reorder: bool) -> dict[str, Any] | None:
    """Return options for XLA's CPU compiler, None on other platforms and where a version does not know them.

    It must not hand parts of a loop to a library, which splits it at every operation: a quarter of the speed. With
    `reorder`, sums may be taken in any order.
    """
    if platform() != "cpu":
        return None
    options: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}
    if reorder:
        fast = ("enable_fast_math", "fast_math_honor_nans", "fast_math_honor_infs", "fast_math_honor_division")
        options |= {f"xla_cpu_{name}": True for name in fast}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
    except Exception:  # whatever a version raises for an option that it does not know
        return None
    return options


def _float32(x: Block) -> Block:
    base, branches, models = jax.tree.map(lambda a: a.astype(jnp.float32), tuple(x[:3]))
    return Block(base, branches, models, x.start)


def sum_columns(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the column sums of every array, float32 [K, 1, columns]."""
    return jnp.stack([jnp.sum(a, axis=0, keepdims=True) for a in arrays])


def sum_rows(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the row sums of every array, float32 [K, rows], or int32 of bool arrays."""
    # One reduction for all reads each array once. XLA's CPU compiler makes vector code of sums of integers, and of
    # sums of floats in any order; not of both in one: a tenth of the speed.
    if arrays[0].dtype == jnp.bool_:
        arrays = [a.astype(jnp.int32) for a in arrays]
    padded = [*arrays, *arrays] if len(arrays) == 1 else list(arrays)
    rows = lax.reduce(padded, [np.zeros((), arrays[0].dtype)] * len(padded), add_pairs, (1,))
    return jnp.stack(rows[: len(arrays)])
