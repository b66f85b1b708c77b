"""Attention of new tokens to cached keys and values: the next token of every row, or the next chunk of a prompt.

The generation engine calls it, through `Qwen2.attend`. A row's tokens lie in its slot in order, so a cached key's index
is its position. In plain XLA only the slots' bucketed length is read; paged.py has the kernels of TPUs and GPUs.
Letters beyond the model's: W tokens that are written now, G query heads of a key/value head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.model.attention import tiles
from bmjax.model.attention.tiles import MASKED, einsum
from bmjax.parallel.mesh import constrain

LARGEST_SCORES = 2**22  # numbers a head, above which a chunk's scores are computed in tiles
_INT8 = 127.0


class Slots(NamedTuple):
    """One layer's keys and values of all rows, [K, B, S, H]; int8 numbers have scales [K, B, S, 1].

    On CPUs keys lie in columns, [K, B, H, S] and [K, B, 1, S]: small products take a quarter of the time so.
    """

    k: Array
    v: Array
    k_scales: Array | None = None
    v_scales: Array | None = None


def each(function: Callable[..., Array], columns: bool, *slots: Slots) -> Slots:
    """Return `function(axis, *arrays)` of the arrays of slots, with the axis of their tokens. columns: keys lie so."""
    axes = (3 if columns else 2, 2) * 2
    parts = zip(*slots, strict=True)
    arrays = [None if part[0] is None else function(axis, *part) for axis, part in zip(axes, parts, strict=True)]
    return Slots(*arrays)  # type: ignore[arg-type]


def pack(k_BTKH: Array, v_BTKH: Array, dtype: Any, quantized: bool, columns: bool) -> Slots:
    """Return new keys and values as a cache holds them, T tokens in the place of S."""
    k, v = (x.transpose(2, 0, 1, 3) for x in (k_BTKH, v_BTKH))
    if quantized:
        (k, k_scales), (v, v_scales) = _quantize(k), _quantize(v)
        slots = Slots(k, v, k_scales, v_scales)
    else:
        slots = Slots(k.astype(dtype), v.astype(dtype))
    return each(lambda axis, x_KBTX: x_KBTX if axis == 2 else x_KBTX.swapaxes(2, 3), columns, slots)


def _quantize(x: Array) -> tuple[Array, Array]:
    # Symmetric, by a token's and head's largest number.
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _INT8, 1e-30)
    return jnp.round(x / scales).astype(jnp.int8), scales


def _unpack(slots: Slots, dtype: Any, columns: bool) -> tuple[Array, Array]:
    """Return keys and values [K, B, S, H] as numbers of `dtype`."""
    k, v, k_scales, v_scales = each(lambda axis, x: x if axis == 2 else x.swapaxes(2, 3), columns, slots)
    if k_scales is None or v_scales is None:
        return k.astype(dtype), v.astype(dtype)
    return (k * k_scales).astype(dtype), (v * v_scales).astype(dtype)


class Pieces(NamedTuple):
    """Pieces of arriving tokens and where they go, int32 [P] each: from a row's `offset` on, to a slot's `start` on."""

    row: Any
    offset: Any
    slot: Any
    start: Any
    size: Any  # tokens; 0: none


def write(axis: int, columns: bool, old: Array, new: Array, pieces: Pieces, count: Array | int) -> Array:
    """Put the first `count` pieces of new tokens into slots; what lies beyond the slots is dropped.

    old: an array of slots, [K, B, ...] with S tokens along `axis`. new: [K, R, ...] with W tokens. A CPU would make a
    loop over every token of a scatter, so it goes by pieces; other devices would make a kernel for each piece of that.
    """
    K, B = old.shape[:2]
    S, W = old.shape[axis], new.shape[axis]
    assert old.shape[5 - axis] == new.shape[5 - axis], (old.shape, new.shape)
    if not columns:
        token_W = jnp.arange(W)
        at_PW = pieces.start[:, None] + token_W
        is_there_P = (pieces.slot >= 0) & (pieces.slot < B) & (jnp.arange(len(pieces.slot)) < count)
        is_there_PW = is_there_P[:, None] & (token_W < pieces.size[:, None]) & (at_PW < S)
        target_KPW = jnp.arange(K)[:, None, None] * (B * S) + pieces.slot[:, None] * S + at_PW
        target_KPW = jnp.where(is_there_PW, target_KPW, K * B * S)
        source_PW = jnp.minimum(pieces.offset[:, None] + token_W, W - 1)
        moved = new[:, pieces.row[:, None], source_PW].reshape(-1, new.shape[-1])
        flat = old.reshape(-1, old.shape[-1])
        return flat.at[target_KPW.reshape(-1)].set(moved, mode="drop").reshape(old.shape)
    # A window of fixed size is written, around the piece: what is there beside the piece is kept.
    size = min(S, W)
    padding = jnp.zeros_like(new)
    padded = jnp.concatenate([padding, new, padding], axis=axis)
    sizes = [K, 1, *old.shape[2:]]
    sizes[axis] = size

    def write_piece(p: Array, old: Array) -> Array:
        row, offset, slot, start, length = (values[p] for values in pieces)
        at = jnp.minimum(start, S - size)
        source: list[Any] = [0, row, 0, 0]
        target: list[Any] = [0, jnp.clip(slot, 0, B - 1), 0, 0]
        source[axis], target[axis] = W + offset - (start - at), at
        token = at + jnp.arange(size)
        is_new = (token >= start) & (token < start + length) & (slot >= 0) & (slot < B)
        is_new = is_new.reshape((-1, 1) if axis == 2 else (1, -1))
        kept = jax.lax.dynamic_slice(old, target, sizes)
        window = jnp.where(is_new, jax.lax.dynamic_slice(padded, source, sizes), kept)
        return jax.lax.dynamic_update_slice(old, window, target)

    return jax.lax.fori_loop(0, count, write_piece, old)


def _scores(q_KBGH: Array, k: Array, scales: Array | None, columns: bool) -> Array:
    s_KBGS = einsum("kbgh,kbhs->kbgs" if columns else "kbgh,kbsh->kbgs", q_KBGH, k.astype(q_KBGH.dtype))
    return s_KBGS if scales is None else s_KBGS * (scales if columns else scales.swapaxes(2, 3))


def _weighted(p_KBGS: Array, v_KBSH: Array, scales_KBS1: Array | None, dtype: Any) -> Array:
    p_KBGS = p_KBGS if scales_KBS1 is None else p_KBGS * scales_KBS1.swapaxes(2, 3)
    return einsum("kbgs,kbsh->kbgh", p_KBGS.astype(dtype), v_KBSH.astype(dtype))


def next_tokens(
    q_B1NH: Array, slots: Slots, recent: Slots, lengths_B: Array, step: Array, window: int | None, columns: bool
) -> Array:
    """Compute attention [B, 1, N, H] of a token of every row to its slot and to the tokens of this call.

    slots hold the tokens before this call, lengths_B of each row. recent holds this call's, the first
    `step` + 1 of W. There all rows write the same index, which is cheap; they move to the slots when the call ends.
    """
    B, _, N, H = q_B1NH.shape
    K, _, S, _ = slots.v.shape
    W = recent.v.shape[2]
    q_KBGH = (q_B1NH * H**-0.5).astype(q_B1NH.dtype).reshape(B, K, N // K, H).transpose(1, 0, 2, 3)
    seen_BS = jnp.arange(S)[None, :] < lengths_B[:, None]
    seen_W = jnp.arange(W) <= step
    if window is not None:
        seen_BS &= jnp.arange(S)[None, :] > lengths_B[:, None] + step - window
        seen_W &= jnp.arange(W) > step - window
    past = jnp.where(seen_BS[None, :, None, :], _scores(q_KBGH, slots.k, slots.k_scales, columns), MASKED)
    now = jnp.where(seen_W, _scores(q_KBGH, recent.k, recent.k_scales, columns), MASKED)
    largest = jnp.maximum(jnp.max(past, axis=-1, keepdims=True), jnp.max(now, axis=-1, keepdims=True))
    past, now = jnp.exp(past - largest), jnp.exp(now - largest)
    total = jnp.sum(past, axis=-1, keepdims=True) + jnp.sum(now, axis=-1, keepdims=True)
    dtype = q_B1NH.dtype
    out = _weighted(past, slots.v, slots.v_scales, dtype) + _weighted(now, recent.v, recent.v_scales, dtype)
    return (out / total).astype(dtype).transpose(1, 0, 2, 3).reshape(B, 1, N, H)


def next_chunk(
    q_1TNH: Array, k_1TKH: Array, v_1TKH: Array, row: Slots, start: Array, window: int | None, columns: bool
) -> Array:
    """Compute attention [1, T, N, H] of a prompt's tokens from `start` on to them and the row's earlier ones."""
    _, T, N, H = q_1TNH.shape
    K = k_1TKH.shape[2]
    dtype = q_1TNH.dtype
    # k, v [K, S + T, H]: the row's, then room for a chunk that begins at its end.
    k, v = (
        jax.lax.dynamic_update_slice(jnp.pad(old[:, 0], ((0, 0), (0, T), (0, 0))), new[0].swapaxes(0, 1), (0, start, 0))
        for old, new in zip(_unpack(row, dtype, columns), (k_1TKH, v_1TKH), strict=True)
    )
    S = k.shape[1]
    if T * S > LARGEST_SCORES:
        ones = jnp.ones((1, S), jnp.int32)
        limit = None if window is None else jnp.int32(window)
        k_1SKH, v_1SKH = (x.swapaxes(0, 1)[None] for x in (k, v))
        return tiles.attention(q_1TNH, k_1SKH, v_1SKH, ones[:, :T], ones, start, limit)[0]
    q_KGTH = (q_1TNH[0] * H**-0.5).astype(dtype).reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
    back_TS = start + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    seen_TS = back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)
    s_KGTS = jnp.where(seen_TS, einsum("kgth,ksh->kgts", q_KGTH, k), MASKED)
    out_KGTH = einsum("kgts,ksh->kgth", jax.nn.softmax(s_KGTS, axis=-1).astype(dtype), v)
    return out_KGTH.astype(dtype).transpose(2, 0, 1, 3).reshape(1, T, N, H)


def on_mesh(slots: Slots) -> Slots:
    """Tell the compiler how slots lie on the mesh: heads over tensor, rows over data and fsdp."""
    return jax.tree.map(lambda x: constrain(x, "kv_heads", "batch", None, None), slots)
