"""Causal attention over packed rows: one function for every device, whatever the mesh splits.

A token sees the tokens of its own segment at or before its position in the row, no further back than the sliding
window. Packed == unpacked, exactly: nothing else enters a token's softmax.
"""

from typing import Any

import jax
from jax import Array

from bmjax.config import UserError
from bmjax.model.attention import gpu, rows, splash, tiles
from bmjax.model.attention.context_parallel import spread
from bmjax.model.attention.options import AttentionOptions, Backend

# Kernels of whole rows, and functions that return why these cannot compute them, or None. None of them takes a sliding
# window that differs by layer. xla, which is not here, computes everything.
_KERNELS: dict[str, Any] = {"splash": splash.attention, "cudnn": gpu.cudnn, "tokamax": gpu.tokamax}
_REFUSALS: dict[str, Any] = {"splash": splash.refuses, "cudnn": gpu.cudnn_refuses, "tokamax": gpu.tokamax_refuses}


def check_backend(name: Backend, platform: str) -> None:
    """Raise UserError where the backend of that name cannot run on devices of `platform` ("cpu", "gpu", "tpu")."""
    needed = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}.get(name, platform)
    if platform != needed:
        raise UserError(f"attention: {name} runs on {needed.upper()}s, and there are none; use auto or xla")
    if name == "cudnn" and not gpu.cudnn_runs_here():
        cards = "a Hopper or Blackwell GPU (H100, H200, B200)"
        raise UserError(f"attention: cudnn's packed rows need {cards}; use auto or xla")


def backend(options: AttentionOptions, q: Array | jax.ShapeDtypeStruct, windows: bool) -> Backend:
    """Return the backend for queries [B, T, N, H] of this shape and dtype; `auto` is the device's kernel, or else xla.

    windows: whether the model has sliding windows. Raises UserError where the options name a backend that cannot
    compute these rows.
    """
    name, auto = options.backend, options.backend == "auto"
    if auto:
        platform = options.platform or jax.default_backend()
        name = "splash" if platform == "tpu" else "cudnn" if platform == "gpu" and gpu.cudnn_runs_here() else "xla"
    if name == "xla":
        return name
    reason = "knows no sliding window that differs by layer" if windows else _REFUSALS[name](q, options)
    if reason and not auto:
        raise UserError(f"attention: {name} {reason}; use auto or xla")
    return "xla" if reason else name


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_ids_BT: Array,
    window: Array | None = None,
    options: AttentionOptions = AttentionOptions(),
) -> Array:
    """Compute attention [B, T, N, H] within the segments of packed rows, in the dtype of `q`, on the mesh in scope.

    N is a multiple of K (grouped-query attention). segment_ids_BT: int32, equal within a document. window: int32
    scalar: how many tokens a token sees, itself included; None: all. It may be traced, so that layers with and without
    a window share one scan. Raises UserError as `backend` does.
    """
    name = backend(options, q_BTNH, window is not None)

    def kernel(q, k, v, segments, window) -> Array:
        if name != "xla":
            return _KERNELS[name](q, k, v, segments, options)
        if q.shape[1] <= rows.LONGEST:
            return rows.attention(q, k, v, segments, window)
        return tiles.attention(q, k, v, segments, segments, 0, window)[0]

    return spread(kernel, options.context, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
