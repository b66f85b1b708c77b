"""Attention by tokamax's kernels for GPUs: Mosaic on Hopper and Blackwell, Triton elsewhere. Called by dispatch.py.

A packed row is described to them by the position where each token's document starts: with the causal mask that is
exact, takes T numbers, and blocks before the start are skipped. Remat cannot save their results, since they name none:
the backward pass runs them again under every policy.
"""

import importlib.util

import jax

from bmjax.model.attention.options import AttentionOptions
from bmjax.model.ops import document_starts
from bmjax.parallel.chips import gpu_capability


def refuses(q: jax.ShapeDtypeStruct | jax.Array, options: AttentionOptions) -> str | None:
    """Return why these kernels cannot compute rows; None where they can."""
    return None if importlib.util.find_spec("tokamax") else "is not installed; pip install 'bmjax[cuda]'"


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, options: AttentionOptions
) -> jax.Array:
    """Compute attention [B, T, N, H] of whole rows. options.interpret: by tokamax's XLA form, for tests on a CPU."""
    from absl import flags
    from tokamax._src.ops.attention import api, base

    if not flags.FLAGS.is_parsed():  # tokamax would read this program's command line as its own
        flags.FLAGS(["bmjax"])
    if options.interpret:
        preferred = ["xla_chunked"]
    else:
        preferred = ["mosaic_gpu", "triton"] if (gpu_capability() or (0, 0)) >= (9, 0) else ["triton"]
    implementation = next(api.IMPLEMENTATIONS[name] for name in preferred if name in api.IMPLEMENTATIONS)
    mask = base.Mask(k_start=document_starts(segments_BT)[:, None, :], is_causal=True)
    return implementation(q_BTNH, k_BTKH, v_BTKH, mask=mask)
