"""The compiled programs over one part of a model: forward, merging, and their gradients.

Each is compiled once for all layers. Parameters arrive as they are stored; `cast` gives them the type to compute in.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bmjax.calibrate.hidden import Hidden
from bmjax.calibrate.models import Index, Tree, fitting, piece, pieces, whole
from bmjax.model import parts
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, get, unflatten
from bmjax.parallel import turns
from bmjax.parallel.mesh import sharding

Path = tuple[str, ...]
# Each branch's contribution to a block of a parameter, float32, from the block's index and the models' own blocks.
ShareOfBlock = Callable[[Index, Sequence[jax.Array]], Sequence[jax.Array]]
# Of a part, each branch's contribution to a parameter: whole, float32, or block by block where it is large.
Shares = Mapping[Path, Sequence[jax.Array] | ShareOfBlock]


@functools.partial(turns.jit, static_argnums=0)
def _cast(dtype: Any, params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def cast(dtype: Any, params: Any) -> Any:
    """Return parameters in `dtype`; those that are on disk are read."""
    return _cast(dtype, whole(params))


embed = functools.partial(turns.jit, static_argnums=(0, 3))(parts.embed)
layer = functools.partial(turns.jit, static_argnums=0)(parts.layer)
losses_by_token = functools.partial(turns.jit, static_argnums=0)(parts.losses_by_token)


def advance(config: ModelConfig, part: int, params: Tree, hidden: Hidden, dtype: Any) -> None:
    """Take hidden states through the embedding or a layer. params: of the part, in `dtype`."""
    for i, batch in enumerate(hidden.batches):
        if part == 0:
            states = embed(config, params, batch.tokens, dtype)
        else:
            window = parts.window(config, part)
            states = layer(config, params, hidden.read(part, i), batch.segment_ids, window)
        hidden.write(part + 1, i, states)


def merge(paths: Sequence[Path], models: Sequence[Tree], shares: Shares, factors: Sequence[Tree]) -> Tree:
    """Return base + sum of factor * contribution of a part, float32.

    Arguments:
        paths: of the part's parameters.
        models: the part of the base and of every branch.
        shares: the contributions, whole; a parameter without takes its changes, divided by the number of branches.
        factors: of every branch, of shapes that broadcast over the parameters.
    """
    leaves = []
    for path in paths:
        arrays = [get(tree, path) for tree in models]
        contributions: Any = shares.get(path, ())
        leaves.append((path, _merge_arrays(arrays, contributions, [get(factor, path) for factor in factors])[1]))
    return unflatten(leaves)


def chunks(row: Param, models: Sequence[Tree], shares: Shares, factors: Sequence[Tree]) -> Iterator[tuple[Index, Any]]:
    """Yield the blocks of a parameter, and of each the arrays that `merge_chunk` takes. Arguments as of `merge`."""
    leaves, coefficients = ([get(tree, row.path) for tree in trees] for trees in (models, factors))
    contributions = shares.get(row.path, ())
    for index in pieces(row, leaves[0]):
        blocks = [piece(leaf, index) for leaf in leaves]
        if callable(contributions):
            of_block = list(contributions(index, blocks))
        else:
            of_block = [piece(share, index) for share in contributions]
        yield index, [blocks, of_block, [piece(factor, index) for factor in coefficients]]


def _merge_arrays(
    models: Sequence[jax.Array], shares: Sequence[jax.Array], factors: Sequence[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """Return what each branch gives to a parameter, and the merged parameter; float32."""
    base, *branches = (leaf.astype(jnp.float32) for leaf in models)
    contributions = shares or [(branch - base) / len(branches) for branch in branches]
    given = [share * factor for share, factor in zip(contributions, factors, strict=True)]
    return given, base + sum(given)


@turns.jit
def merge_chunk(models: Any, shares: Any, factors: Any) -> jax.Array:
    """Return a merged block, float32."""
    return _merge_arrays(models, shares, factors)[1]


@turns.jit
def merge_chunk_with_sums(models: Any, shares: Any, factors: Any) -> tuple[jax.Array, jax.Array]:
    """Return a merged block, and sums over the last axis, float32 [1 + 2 N, ...].

    They are the squared move from the base, and of every branch what it gave, squared, and its entries that are not 0.
    """
    given, leaf = _merge_arrays(models, shares, factors)
    moved = leaf - models[0].astype(jnp.float32)
    terms = [moved**2, *(g**2 for g in given), *((g != 0).astype(jnp.float32) for g in given)]
    return leaf, jnp.stack([jnp.sum(term, axis=-1) for term in terms])


def assemble(row: Param, blocks: Iterable[tuple[Index, jax.Array]], dtype: Any, mesh: Mesh) -> jax.Array:
    """Return a parameter in `dtype`, on the mesh, of its blocks. Of these, only one is in memory at a time."""
    array = None
    for index, block in blocks:
        if block.shape == row.shape:
            return cast(dtype, block)
        array = np.empty(row.shape, dtype) if array is None else array
        array[index] = block
    assert array is not None  # a parameter has a row
    return jax.make_array_from_callback(row.shape, sharding(mesh, row.axes, row.shape), lambda at: array[at])


def merge_part(
    rows: Sequence[Param], models: Sequence[Tree], shares: Shares, factors: Sequence[Tree], dtype: Any, mesh: Mesh
) -> Tree:
    """Return `merge` in `dtype`, of which no gradient is wanted."""
    return unflatten(
        (
            row.path,
            assemble(row, ((i, merge_chunk(*a)) for i, a in chunks(row, models, shares, factors)), dtype, mesh),
        )
        for row in rows
    )


def pull_back_part(
    rows: Sequence[Param], models: Sequence[Tree], shares: Shares, factors: Sequence[Tree], gradients: Tree, mesh: Mesh
) -> list[Tree]:
    """Return the gradients of a part's coefficients, float32, from the gradients of its merged parameters.

    It works block by block. Other arguments as of `merge`.
    """
    leaves: list[list[Any]] = [[] for _ in factors]
    for row in rows:
        totals = [np.zeros(get(factor, row.path).shape, np.float32) for factor in factors]
        for index, arrays in chunks(row, models, shares, factors):
            blocks = _pull_back_chunk(*arrays, piece(get(gradients, row.path), index))
            if arrays[0][0].shape == row.shape:
                totals = blocks
                break
            for total, block in zip(totals, blocks, strict=True):
                total[fitting(index, total.shape)] += np.asarray(block)
        for of_branch, total in zip(leaves, totals, strict=True):
            layout = sharding(mesh, row.axes, total.shape)
            of_branch.append((row.path, turns.finished(jax.device_put(total, layout))))
    return [unflatten(of_branch) for of_branch in leaves]


@turns.jit
def _pull_back_chunk(models: Any, shares: Any, factors: Any, gradient: jax.Array) -> list[jax.Array]:
    """Return the gradients of a block's coefficients from the gradient of the merged block."""
    merged = lambda factors: _merge_arrays(models, shares, factors)[1]  # noqa: E731
    gradients: list[jax.Array] = jax.vjp(merged, factors)[1](gradient.astype(jnp.float32))[0]
    return gradients


@functools.partial(turns.jit, static_argnums=(0, 1, 2))
def pull_back_layer(
    config: ModelConfig, paths: Sequence[Path], dtype: Any, models: Any, shares: Shares, factors: Any, x_BTD: jax.Array,
    batch: Batch[jax.Array], window: Any, dy_BTD: jax.Array,
) -> tuple[list[Tree], jax.Array]:  # fmt: skip
    """Return the gradients of a merged layer's coefficients and input, of the output's `dy`."""

    def run(factors: Any, x_BTD: jax.Array) -> jax.Array:
        params = cast(dtype, merge(paths, models, shares, factors))
        return parts.layer(config, params, x_BTD, batch.segment_ids, window)

    return jax.vjp(run, factors, x_BTD)[1](dy_BTD)
