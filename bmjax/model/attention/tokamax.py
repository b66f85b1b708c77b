"""Attention by tokamax's kernels for GPUs: Mosaic on Hopper and Blackwell, Triton elsewhere; for tests its XLA form.

Packed rows are told to them as the place where each token's document starts: with the causal mask that is exact, takes
T numbers, and blocks before the start are skipped. They keep what they need for the backward pass to themselves, so
that remat runs them again whatever it saves.
"""

import importlib.util

import jax

from bmjax.model.ops import document_starts


def refuses(windows: bool) -> str | None:
    """Why these kernels can't compute a model's rows; None where they can."""
    if windows:
        return "knows no sliding window that differs by layer"
    return None if importlib.util.find_spec("tokamax") else "is not installed; pip install 'bmjax[cuda]'"


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool
) -> jax.Array:
    """Attention [B, T, N, H] of whole rows. interpret: by their XLA form, for tests on a CPU."""
    from absl import flags
    from tokamax._src.ops.attention import api, base

    if not flags.FLAGS.is_parsed():  # tokamax would read this program's command line as its own
        flags.FLAGS(["bmjax"])
    name = next(name for name in _order(interpret) if name in api.IMPLEMENTATIONS)
    mask = base.Mask(k_start=document_starts(segments_BT)[:, None, :], is_causal=True)
    return api.IMPLEMENTATIONS[name](q_BTNH, k_BTKH, v_BTKH, mask=mask)


def _order(interpret: bool) -> tuple[str, ...]:
    if interpret:
        return ("xla_chunked",)
    capability = float(getattr(jax.devices()[0], "compute_capability", "0"))
    return ("mosaic_gpu", "triton") if capability >= 9.0 else ("triton",)
