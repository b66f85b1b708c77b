"""The key/value cache: a slot for every row, which grows and shrinks in buckets so that few shapes are compiled.

The engine calls it. All functions are compiled by shape and never hold parameters, so models of one shape share them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from bmjax.model.attention.cached import Pieces, Slots, each, on_mesh, pack, write
from bmjax.model.config import ModelConfig
from bmjax.parallel.memory import free_host_memory
from bmjax.parallel.mesh import constrain, fitting_spec, mesh_in_scope, on_each_device, split_axes

PAGES = 128  # tokens: a slot's length is a multiple, for the kernels that read it by pages

Cache = list[Slots]  # of every layer


class Buckets(NamedTuple):
    """The sizes that a cache may have: programs are compiled for each of them.

    Attributes:
        width_step: how many times as many rows the next width has.
        least_length: tokens of the shortest slots.
        length_step: how many times as long the next ones are.
    """

    width_step: int = 4
    least_length: int = 128
    length_step: int = 2

    def widths(self, slots: int, row_shards: int) -> list[int]:
        """Return the numbers of rows that are computed together: ..., a sixteenth, a quarter, all slots."""
        sizes = [slots]
        while sizes[0] % (self.width_step * row_shards) == 0:
            sizes.insert(0, sizes[0] // self.width_step)
        return sizes

    def lengths(self, context: int) -> list[int]:
        """Return the lengths that slots may have: 128, 256, 512, ..., at last the whole context."""
        longest = -(-context // PAGES) * PAGES
        sizes = [min(self.least_length, longest)]
        while sizes[-1] < longest:
            sizes.append(min(self.length_step * sizes[-1], longest))
        return sizes


MANY = Buckets()
# For a process that serves or evaluates: fewer programs to compile, of which each computes some rows for nothing.
FEW = Buckets(width_step=8, least_length=256, length_step=4)
FEWEST = Buckets(width_step=16, least_length=256, length_step=4)


def bucket(count: int, sizes: Sequence[int]) -> int:
    """Return the first of the sizes that holds so many, or the last."""
    return next((size for size in sizes if count <= size), sizes[-1])


def token_bytes(config: ModelConfig, dtype: Any, quantized: bool) -> int:
    """Return what a token takes in all layers together."""
    a_head = config.head_dim + 4 if quantized else config.head_dim * jnp.dtype(dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * a_head


def free_memory() -> int:
    """Return the bytes that a cache may take on a device by default: most of what is free, on CPUs half of it."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return free_host_memory() // 2 // jax.local_device_count()


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def allocate(config: ModelConfig, width: int, length: int, dtype: Any, quantized: bool, columns: bool) -> Cache:
    """Make empty slots for `width` rows of `length` tokens."""
    nothing = jnp.zeros((width, length, config.num_kv_heads, config.head_dim), dtype)
    return [on_mesh(pack(nothing, nothing, dtype, quantized, columns)) for _ in range(config.num_layers)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def no_hidden(config: ModelConfig, width: int, dtype: Any) -> Array:
    """Make hidden states [B, D] of rows that have none yet."""
    return constrain(jnp.zeros((width, config.hidden_size), dtype), "batch", None)


@partial(jax.jit, static_argnums=(2, 3))
def resized(slots: Slots, rows: Array | None, length: int, columns: bool) -> Slots:
    """Return one layer's slots of `rows` (None: all, in their order), cut or padded to `length` tokens."""

    def resize(axis: int, x: Array) -> Array:
        S = x.shape[axis]
        x = jax.lax.slice_in_dim(x, 0, min(S, length), axis=axis)
        x = x if rows is None else jnp.take(x, rows, axis=1)
        return jnp.pad(x, [(0, max(length - S, 0) if i == axis else 0) for i in range(4)])

    return on_mesh(each(resize, columns, slots))


def resize(cache: Cache, rows: np.ndarray | None, length: int, columns: bool) -> None:
    """Replace the cache's slots by those of `rows`, `length` tokens each; a layer at a time, to bound memory."""
    for i, slots in enumerate(cache):
        # The old slots of a layer are free before the next layer's new ones are made.
        cache[i] = jax.block_until_ready(resized(slots, rows, length, columns))


@jax.jit
def rows_of(h_BD: Array, rows: Array) -> Array:
    """Return the hidden states of rows."""
    return constrain(jnp.take(h_BD, rows, axis=0), "batch", None)


def append(slots: Slots, new: Slots, lengths_B: Array, columns: bool) -> Slots:
    """Put W new tokens of every row into its slot, behind the first `lengths_B`; on a mesh each device its rows'."""

    def local(slots: Slots, new: Slots, lengths_B: Array) -> Slots:
        # slots [K/tensor, B/(data fsdp), S, H], new [K/tensor, B/(data fsdp), W, H], lengths [B/(data fsdp)]
        rows_B = jnp.arange(len(lengths_B))
        zeros_B = jnp.zeros_like(rows_B)
        pieces = Pieces(rows_B, zeros_B, rows_B, lengths_B, zeros_B + new.v.shape[2])
        return each(lambda axis, old, x: write(axis, columns, old, x, pieces, len(rows_B)), columns, slots, new)

    mesh = mesh_in_scope()
    if mesh is None:
        return local(slots, new, lengths_B)
    axes = ("kv_heads", "batch", None, None)
    specs = [jax.tree.map(lambda x: fitting_spec(mesh, axes, x.shape), part) for part in (slots, new)]
    rows = fitting_spec(mesh, ("batch",), lengths_B.shape)
    return on_each_device(local, (*specs, rows), specs[0])(slots, new, lengths_B)


def _insert(slots: Slots, new: Slots, pieces: Pieces, count: Array, columns: bool) -> Slots:
    """Put pieces of R rows of new tokens into slots; on a mesh each device those that go to its rows."""

    def local(slots: Slots, new: Slots, pieces: Pieces, count: Array) -> Slots:
        # slots [K/tensor, B/(data fsdp), S, H], new [K/tensor, R, W, H]: all R rows on every device
        if row_axes:
            pieces = pieces._replace(slot=pieces.slot - jax.lax.axis_index(row_axes) * slots.v.shape[1])
        return each(lambda axis, old, x: write(axis, columns, old, x, pieces, count), columns, slots, new)

    mesh = mesh_in_scope()
    row_axes: tuple[str, ...] = ()
    if mesh is None:
        return local(slots, new, pieces, count)
    row_axes = split_axes(fitting_spec(mesh, ("batch",), slots.v.shape[1:2]))
    kept = jax.tree.map(lambda x: fitting_spec(mesh, ("kv_heads", "batch", None, None), x.shape), slots)
    arriving = jax.tree.map(lambda x: fitting_spec(mesh, ("kv_heads", None, None, None), x.shape), new)
    whole = PartitionSpec()
    return on_each_device(local, (kept, arriving, whole, whole), kept)(slots, new, pieces, count)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=6)
def insert(
    cache: Cache, h_BD: Array, new: Cache, h_RTD: Array, pieces: Pieces, count: Array, columns: bool
) -> tuple[Cache, Array]:
    """Put `count` pieces of prompts into the cache, and the hidden state of each piece's last token into h_BD."""
    cache = [_insert(slots, chunk, pieces, count, columns) for slots, chunk in zip(cache, new, strict=True)]
    h_PD = h_RTD[pieces.row, pieces.offset + pieces.size - 1]
    slot_P = jnp.where(jnp.arange(len(pieces.slot)) < count, pieces.slot, len(h_BD))
    return cache, constrain(h_BD.at[slot_P].set(h_PD.astype(h_BD.dtype), mode="drop"), "batch", None)


@jax.jit
def take(cache: Cache, slot: Array) -> Cache:
    """Return one slot of every layer."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1), cache)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
def copy(cache: Cache, h_BD: Array, source: Array, target: Array, columns: bool) -> tuple[Cache, Array]:
    """Copy a slot and its hidden state into another slot."""
    zero = jnp.zeros(1, jnp.int32)

    def copied(slots: Slots) -> Slots:
        pieces = Pieces(zero, zero, target[None], zero, zero + slots.v.shape[2])
        return _insert(slots, take([slots], source)[0], pieces, jnp.int32(1), columns)

    return [copied(slots) for slots in cache], constrain(h_BD.at[target].set(h_BD[source]), "batch", None)
