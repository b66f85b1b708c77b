"""Attention by cuDNN's kernels for packed rows, on NVIDIA's Hopper and Blackwell GPUs. Called by dispatch.py.

cuDNN takes the start and the length of every document of a row, up to the number of documents that the program is
compiled for. Its log-sums take 4 bytes a document, head and token of a row, which counts where remat keeps them and
documents are short. JAX up to 0.11.0 calls it wrongly for grouped heads (jax-ml/jax#39521), without an error: there
key/value heads are repeated.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.ops import document_changes
from bmjax.parallel.chips import gpu_capability

HEAD_DIM = 128  # at most; larger ones have not been tried
_GROUPS_RIGHT = (0, 11, 1)  # JAX's first release that is right for grouped heads


def refuses(q: jax.ShapeDtypeStruct | jax.Array, options: AttentionOptions) -> str | None:
    """Return why these kernels cannot compute rows of queries like `q` [B, T, N, H]; None where they can."""
    if not options.documents:
        return "needs to know the most documents of a row"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > HEAD_DIM:
        return f"needs heads of a multiple of 8 up to {HEAD_DIM}, not {q.shape[-1]}"
    return None


def runs_here() -> bool:
    """Return whether the first device is a GPU that these kernels run on: Hopper (9.x) or Blackwell (10.x)."""
    capability = gpu_capability()
    return capability is not None and capability[0] in (9, 10)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, options: AttentionOptions
) -> jax.Array:
    """Compute attention [B, T, N, H] of whole rows of at most `options.documents` documents.

    Raises UserError for more numbers than cuDNN's offsets, which are int32, can count.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    documents = options.documents
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    if groups > 1 and documents > 1 and jax.__version_info__ < _GROUPS_RIGHT:
        k_BTKH, v_BTKH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    scale = q_BTNH.shape[-1] ** -0.5
    if documents == 1:
        return dot_product_attention(q_BTNH, k_BTKH, v_BTKH, scale=scale, mask_type=MaskType.CAUSAL)
    if q_BTNH.size >= 2**31:
        raise UserError(
            f"attention: cudnn: {q_BTNH.shape[0]} packed rows of {q_BTNH.shape[1]} tokens are too many at once; raise "
            "accumulate"
        )
    starts_BM, lengths_BM = extents(segments_BT, documents)
    offsets = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    packing: dict[str, Any] = {"q_seqlen": lengths_BM, "kv_seqlen": lengths_BM}
    packing |= {"q_offsets": offsets, "kv_offsets": offsets, "mask_type": MaskType.PADDING_CAUSAL}
    return dot_product_attention(q_BTNH, k_BTKH, v_BTKH, scale=scale, **packing)


def extents(segments_BT: jax.Array, documents: int) -> tuple[jax.Array, jax.Array]:
    """Return (starts, lengths) of every row's documents, int32 [B, documents], -1 after the last document."""
    T = segments_BT.shape[1]

    def of_row(changed_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = jnp.nonzero(changed_T, size=documents + 1, fill_value=T)[0].astype(jnp.int32)
        exists = starts[:-1] < T
        return jnp.where(exists, starts[:-1], -1), jnp.where(exists, jnp.diff(starts), -1)

    return jax.vmap(of_row)(document_changes(segments_BT))
