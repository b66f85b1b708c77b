"""The embedding's lookup on a mesh: tokens travel to the table's parts, never the table. The model calls it.

A device holds a part of the vocabulary (along `tensor`) and of the width (along `fsdp` and `context`). It looks up its
part of the width for the tokens of all devices along these axes, and they exchange width for tokens. The backward pass
goes the other way, so the table's gradient is computed where the table's part is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, on_each_device, split_axes


class Layout(NamedTuple):
    """Mesh axes that split tokens [B, T] and a matrix with the dimensions vocabulary and width."""

    tokens: PartitionSpec = PartitionSpec()
    matrix: PartitionSpec = PartitionSpec()
    vocab: str | None = None  # the axis that splits the vocabulary
    embed: tuple[str, ...] = ()  # the axes that split the width; some of them may split the tokens, too
    token_axes: tuple[str, ...] = ()  # all axes that split the tokens


def layout(tokens_shape: Sequence[int], matrix_shape: Sequence[int], matrix_axes: Sequence[str]) -> Layout:
    """Return the layout on the mesh in scope of an embedding or a head, by its logical axes."""
    mesh = mesh_in_scope()
    if mesh is None:
        return Layout()
    tokens = fitting_spec(mesh, ("batch", "length"), tokens_shape)
    matrix = fitting_spec(mesh, matrix_axes, matrix_shape)
    mesh_axes = dict(zip(matrix_axes, matrix, strict=True))
    return Layout(tokens, matrix, mesh_axes["vocab"], split_axes((mesh_axes["embed"],)), split_axes(tokens))


def _width_axes(split: Layout) -> list[tuple[str, int | None]]:
    """Return the axes that split the width, each with the dimension of the tokens [B, T] that it splits, too."""
    dimensions = {axis: i for i, part in enumerate(split.tokens) for axis in split_axes((part,))}
    return [(axis, dimensions.get(axis)) for axis in split.embed]


def _local_rows(split: Layout, size: int, tokens: Array) -> Array:
    # The rows of the local table (of `size` rows) for the tokens that this device looks up; tokens of another device's
    # part of the vocabulary become `size`, one row too far.
    # tokens [B/(data fsdp), T/context]: those of the devices with other parts of the width are gathered,
    # so that the axes in split.embed no longer split them
    for axis, dimension in _width_axes(split):
        if dimension is not None:
            tokens = lax.all_gather(tokens, axis, axis=dimension, tiled=True)
    if split.vocab is None:
        return tokens
    tokens = tokens - lax.axis_index(split.vocab) * size
    return jnp.where((tokens >= 0) & (tokens < size), tokens, size)


@jax.custom_vjp
def lookup(embedding_VD: Array, tokens_BT: Array) -> Array:
    """Return the table's rows of the tokens [B, T, D], in its dtype. The gradient is summed in float32."""
    return _lookup_forward(embedding_VD, tokens_BT)[0]


def _lookup_forward(embedding_VD: Array, tokens_BT: Array):
    split = layout(tokens_BT.shape, embedding_VD.shape, ("vocab", "embed"))

    def local(table: Array, tokens: Array) -> Array:
        # table [V/tensor, D/(fsdp context)], tokens [B/(data fsdp), T/context]
        x = jnp.take(table, _local_rows(split, len(table), tokens), axis=0, mode="fill", fill_value=0)
        # x [B/data, T, D/(fsdp context)], 0 for the tokens of other parts of the vocabulary
        x = lax.psum(x, split.vocab or ())  # exact: all but one summand are 0
        for axis, dimension in reversed(_width_axes(split)):  # the last axis splits the width most finely
            if dimension is None:
                x = lax.all_gather(x, axis, axis=2, tiled=True)
            else:
                x = lax.all_to_all(x, axis, split_axis=dimension, concat_axis=2, tiled=True)
        return x  # [B/(data fsdp), T/context, D]

    on_devices = on_each_device(local, (split.matrix, split.tokens), PartitionSpec(*split.tokens, None))
    return on_devices(embedding_VD, tokens_BT), (embedding_VD, tokens_BT)


def _lookup_backward(saved: Any, dx_BTD: Array):
    embedding_VD, tokens_BT = saved
    split = layout(tokens_BT.shape, embedding_VD.shape, ("vocab", "embed"))

    def local(table: Array, tokens: Array, dx: Array) -> Array:
        # table [V/tensor, D/(fsdp context)], tokens [B/(data fsdp), T/context], dx [B/(data fsdp), T/context, D]
        rows = _local_rows(split, len(table), tokens)  # [B/data, T]
        for axis, dimension in _width_axes(split):
            if dimension is None:
                width = dx.shape[2] // lax.axis_size(axis)
                dx = lax.dynamic_slice_in_dim(dx, lax.axis_index(axis) * width, width, axis=2)
            else:
                dx = lax.all_to_all(dx, axis, split_axis=2, concat_axis=dimension, tiled=True)
        # dx [B/data, T, D/(fsdp context)]
        sums = jnp.zeros(table.shape, jnp.float32).at[rows].add(dx.astype(jnp.float32), mode="drop")
        return lax.psum(sums, tuple(axis for axis in split.token_axes if axis not in split.embed)).astype(table.dtype)

    in_specs = (split.matrix, split.tokens, PartitionSpec(*split.tokens, None))
    return on_each_device(local, in_specs, split.matrix)(embedding_VD, tokens_BT, dx_BTD), None


lookup.defvjp(_lookup_forward, _lookup_backward)
