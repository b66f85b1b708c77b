"""Causal attention over packed rows: one function for every device, whatever the mesh splits.

A token sees the tokens of its own segment at or before its position in the row, no further back than the sliding
window. Packed == unpacked, exactly: nothing else enters a token's softmax. The model calls this module; the kernels
beside it are called from here only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.model.attention import cudnn, rows, splash, tiles, tokamax
from bmjax.model.attention.context_parallel import spread
from bmjax.model.attention.options import AttentionOptions, Backend


def check_backend(name: Backend, platform: str) -> None:
    """Raise UserError where the backend of that name cannot run on devices of `platform` ("cpu", "gpu", "tpu")."""
    needed = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}.get(name, platform)
    if platform != needed:
        raise UserError(f"attention: {name} runs on {needed.upper()}s, and there are none; use auto or xla")
    if name == "cudnn" and not cudnn.runs_here():
        raise UserError(
            "attention: cudnn's packed rows need a Hopper or Blackwell GPU (H100, H200, B200); use auto or xla"
        )


# Kernels of whole rows: `attention` computes them, and `refuses` returns why it cannot, or None. None of them takes a
# sliding window that differs by layer. xla, which is not here, computes everything.
_KERNELS: dict[str, Any] = {"splash": splash, "cudnn": cudnn, "tokamax": tokamax}


def _refusal(name: str, options: AttentionOptions, q: jax.Array | jax.ShapeDtypeStruct, windows: bool) -> str | None:
    if name == "xla":
        return None
    return "knows no sliding window that differs by layer" if windows else _KERNELS[name].refuses(q, options)


def backend(options: AttentionOptions, q: jax.Array | jax.ShapeDtypeStruct, windows: bool) -> Backend:
    """Return the backend that `auto` means for queries [B, T, N, H] of this shape and dtype.

    windows: whether the model has sliding windows.
    """
    if options.backend != "auto":
        return options.backend
    platform = options.platform or jax.default_backend()
    preferred: Backend = "xla"
    if platform == "tpu":
        preferred = "splash"
    elif platform == "gpu" and cudnn.runs_here():
        preferred = "cudnn"
    return "xla" if _refusal(preferred, options, q, windows) else preferred


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    window: jax.Array | None = None,
    options: AttentionOptions = AttentionOptions(),
) -> jax.Array:
    """Compute attention [B, T, N, H] within the segments of packed rows, in the dtype of `q`, on the mesh in scope.

    N is a multiple of K (grouped-query attention). segment_ids_BT: int32, equal within a document. window: int32
    scalar: how many tokens a token sees, itself included; None: all. It may be traced, so that layers with and without
    a window share one scan. Raises UserError where the options name a backend that cannot compute these rows.
    """
    name = backend(options, q_BTNH, window is not None)
    reason = _refusal(name, options, q_BTNH, window is not None)
    if reason:
        raise UserError(f"attention: {name} {reason}; use auto or xla")

    def whole_rows(q, k, v, segments, window) -> jax.Array:
        if name != "xla":
            return _KERNELS[name].attention(q, k, v, segments, options)
        if q.shape[1] <= rows.LONGEST:
            return rows.attention(q, k, v, segments, window)
        return tiles.attention(q, k, v, segments, segments, 0, window)[0]

    return spread(whole_rows, options.context, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)


def cached_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    start: jax.Array | int,
    window: jax.Array | None = None,
) -> jax.Array:
    """Compute attention [B, T, N, H] of T new tokens to the valid slots of a cache.

    The new tokens are in the cache already, at slots start..start+T-1.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    allowed_BTS = rows.causal_mask(start, T, S, window) & valid_BS[:, None, :]
    q_BKRH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    weights = jax.nn.softmax(rows.scores(q_BKRH, k_BKSH, allowed_BTS), axis=-1)
    out_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
