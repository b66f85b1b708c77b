"""The embedding's lookup on a mesh: tokens travel to the table's parts, never the table.

A device holds a part of the vocabulary (along `tensor`) and of the width (along `fsdp` and `context`). It looks up its
part of the width for the tokens of all devices along these, and they exchange width for tokens; backward the same way
round, so the table's gradient is made where the table's part is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, split_axes


class _Split(NamedTuple):
    """vocab: the mesh axis that splits the table's rows, or None. embed: the axes that split its columns, each with the
    dimension of the tokens [B, T] that it splits, too, or None. tokens: all axes that split those."""

    vocab: str | None
    embed: tuple[tuple[str, int | None], ...]
    tokens: tuple[str, ...]


def lookup(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the table [B, T, D], in its dtype, on the mesh in scope. The gradient is summed in float32."""
    return _lookup(embedding_VD, jnp.asarray(tokens_BT))


def _on_mesh(local: Any, in_specs: Any, out_specs: Any) -> Any:
    """`local` on every device's part; as it is where there is one device."""
    if mesh_in_scope() is None:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _specs(table_shape: tuple[int, ...], tokens_shape: tuple[int, ...]) -> tuple[_Split, Any, Any]:
    mesh = mesh_in_scope()
    if mesh is None:
        return _Split(None, (), ()), PartitionSpec(), PartitionSpec()
    table = fitting_spec(mesh, ("vocab", "embed"), table_shape)
    tokens = fitting_spec(mesh, ("batch", "length"), tokens_shape)
    dimension = {axis: number for number, part in enumerate(tokens) for axis in split_axes((part,))}
    embed = tuple((axis, dimension.get(axis)) for axis in split_axes(table[1:]))
    return _Split(table[0], embed, split_axes(tokens)), table, tokens


def _places(split: _Split, size: int, tokens: jax.Array) -> jax.Array:
    """Rows of the local table for the tokens that are looked up here; `size`, one too many, for those of others."""
    for axis, dimension in split.embed:
        if dimension is not None:
            tokens = lax.all_gather(tokens, axis, axis=dimension, tiled=True)
    if split.vocab is None:
        return tokens
    tokens = tokens - lax.axis_index(split.vocab) * size
    return jnp.where((tokens >= 0) & (tokens < size), tokens, size)


@jax.custom_vjp
def _lookup(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return _forward(embedding_VD, tokens_BT)[0]


def _forward(embedding_VD: jax.Array, tokens_BT: jax.Array):
    split, table_spec, token_spec = _specs(embedding_VD.shape, tokens_BT.shape)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        places = _places(split, len(table), tokens)
        x = jnp.take(table, places, axis=0, mode="fill", fill_value=0)
        if split.vocab:
            x = lax.psum(x, split.vocab)  # exact: all but one are 0
        for axis, dimension in reversed(split.embed):  # the last one splits the width most finely
            if dimension is None:
                x = lax.all_gather(x, axis, axis=2, tiled=True)
            else:
                x = lax.all_to_all(x, axis, split_axis=dimension, concat_axis=2, tiled=True)
        return x

    out_spec = PartitionSpec(*token_spec, None)
    run = _on_mesh(local, (table_spec, token_spec), out_spec)
    return run(embedding_VD, tokens_BT), (embedding_VD, tokens_BT)


def _backward(saved: Any, dx_BTD: jax.Array):
    embedding_VD, tokens_BT = saved
    split, table_spec, token_spec = _specs(embedding_VD.shape, tokens_BT.shape)

    def local(table: jax.Array, tokens: jax.Array, dx: jax.Array) -> jax.Array:
        places = _places(split, len(table), tokens)
        for axis, dimension in split.embed:
            if dimension is None:
                width = dx.shape[2] // lax.axis_size(axis)
                dx = lax.dynamic_slice_in_dim(dx, lax.axis_index(axis) * width, width, axis=2)
            else:
                dx = lax.all_to_all(dx, axis, split_axis=2, concat_axis=dimension, tiled=True)
        sums = jnp.zeros(table.shape, jnp.float32).at[places].add(dx.astype(jnp.float32), mode="drop")
        others = tuple(axis for axis in split.tokens if axis not in dict(split.embed))
        return (lax.psum(sums, others) if others else sums).astype(table.dtype)

    dx_spec = PartitionSpec(*token_spec, None)
    run = _on_mesh(local, (table_spec, token_spec, dx_spec), table_spec)
    return run(embedding_VD, tokens_BT, dx_BTD), None


_lookup.defvjp(_forward, _backward)
