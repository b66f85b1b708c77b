"""Causal attention over packed rows: one function, whatever the device and however rows and heads are spread.

A token sees the tokens of its own segment at or before its place in the row, and no further back than the
sliding window. Packed == unpacked, exactly: nothing else enters a row's softmax.
"""

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.model.attention import cudnn, rows, splash, tiles, tokamax
from bmjax.model.attention.contexts import spread
from bmjax.model.attention.options import Backend, How


def check_backend(name: Backend, platform: str) -> None:
    """Raise UserError where the backend of that name cannot run on devices of `platform` ("cpu", "gpu", "tpu")."""
    needed = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}.get(name, platform)
    if platform != needed:
        raise UserError(f"attention: {name} runs on {needed.upper()}s, and there are none; use auto or xla")
    if name == "cudnn" and not cudnn.runs_here():
        raise UserError(
            "attention: cudnn's packed rows need a Hopper or Blackwell GPU (H100, H200, B200); use auto or xla"
        )


def backend(how: How, q: jax.Array | jax.ShapeDtypeStruct, windows: bool) -> Backend:
    """What computes rows with queries like `q` [B, T, N, H]: what `auto` stands for. windows: sliding ones."""
    if how.backend != "auto":
        return how.backend
    platform = how.platform or jax.default_backend()
    if platform == "tpu" and not splash.refuses(q.shape[1], windows):
        return "splash"
    return (
        "cudnn" if platform == "gpu" and cudnn.runs_here() and not cudnn.refuses(q, windows, how.documents) else "xla"
    )


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array,
    window: jax.Array | None = None, how: How = How(),
) -> jax.Array:  # fmt: skip
    """Attention [B, T, N, H] within segments of packed rows, on the mesh in scope.

    segment_ids: int32, equal within a document. window: int32 scalar, how many tokens back (the own one included)
    are seen, None for all; it may be traced, so that layers of both kinds share one scan. Raises UserError where
    a backend is asked for that can't.
    """
    windows = window is not None
    chosen = backend(how, q_BTNH, windows)
    if chosen == "splash":
        reason = splash.refuses(q_BTNH.shape[1], windows)
    elif chosen == "cudnn":
        reason = cudnn.refuses(q_BTNH, windows, how.documents)
    else:
        reason = tokamax.refuses(windows) if chosen == "tokamax" else None
    if reason:
        raise UserError(f"attention: {chosen} {reason}; use auto or xla")

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: jax.Array | None) -> jax.Array:
        if chosen == "splash":
            return splash.attention(q, k, v, segments, how.interpret)
        if chosen == "cudnn":
            return cudnn.attention(q, k, v, segments, how.documents)
        if chosen == "tokamax":
            return tokamax.attention(q, k, v, segments, how.interpret)
        if q.shape[1] <= rows.LONGEST:
            return rows.attention(q, k, v, segments, window)
        return tiles.attention(q, k, v, segments, segments, 0, window)[0]

    return spread(whole, how.context, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)


def cached_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    start: jax.Array | int,
    window: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] of T new tokens, written at slots start..start+T-1 of a cache, to its valid slots."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_slot, k_slot = start + jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    causal_TS = k_slot <= q_slot
    if window is not None:
        causal_TS &= q_slot - k_slot < window
    q_BKRH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    weights = jax.nn.softmax(rows.scores(q_BKRH, k_BKSH, causal_TS & valid_BS[:, None, :]), axis=-1)
    out_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
