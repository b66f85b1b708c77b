"""Attention by kernels for NVIDIA's GPUs: cuDNN's for packed rows, and tokamax's. Called by dispatch.py."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.config import UserError
from bmjax.errors import install
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.ops import document_changes, document_starts
from bmjax.parallel.chips import gpu_capability

HEAD_DIM = 128  # cuDNN's, at most; larger ones have not been tried
_GROUPS_RIGHT = (0, 11, 1)  # JAX's first release that calls cuDNN rightly for grouped heads


def cudnn_runs_here() -> bool:
    """Return whether the first device is a GPU that cuDNN's kernels run on: Hopper (9.x) or Blackwell (10.x)."""
    return (gpu_capability() or (0, 0))[0] in (9, 10)


def cudnn_refuses(q: Array | jax.ShapeDtypeStruct, options: AttentionOptions) -> str | None:
    """Return why cuDNN cannot compute rows of queries like `q` [B, T, N, H]; None where it can."""
    if not options.documents:
        return "needs to know the most documents of a row"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > HEAD_DIM:
        return f"needs heads of a multiple of 8 up to {HEAD_DIM}, not {q.shape[-1]}"
    return None


def cudnn(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, options: AttentionOptions) -> Array:
    """Compute attention [B, T, N, H] of whole rows of at most `options.documents` documents.

    cuDNN takes the start and the length of every document of a row, up to the number of documents that the program is
    compiled for. Its log-sums take 4 bytes a document, head and token of a row, which counts where remat keeps them and
    documents are short. JAX up to 0.11.0 calls it wrongly for grouped heads (jax-ml/jax#39521), without an error: there
    key/value heads are repeated. Raises UserError for more numbers than cuDNN's offsets, which are int32, can count.
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


def extents(segments_BT: Array, documents: int) -> tuple[Array, Array]:
    """Return (starts, lengths) of every row's documents, int32 [B, documents], -1 after the last document."""
    T = segments_BT.shape[1]

    def of_row(changed_T: Array) -> tuple[Array, Array]:
        starts = jnp.nonzero(changed_T, size=documents + 1, fill_value=T)[0].astype(jnp.int32)
        exists = starts[:-1] < T
        return jnp.where(exists, starts[:-1], -1), jnp.where(exists, jnp.diff(starts), -1)

    return jax.vmap(of_row)(document_changes(segments_BT))


def tokamax_refuses(q: Array | jax.ShapeDtypeStruct, options: AttentionOptions) -> str | None:
    """Return why tokamax cannot compute rows; None where it can."""
    return None if importlib.util.find_spec("tokamax") else f"is not installed; {install('cuda')}"


def tokamax(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, options: AttentionOptions) -> Array:
    """Compute attention [B, T, N, H] of whole rows by Mosaic on Hopper and Blackwell, by Triton elsewhere.

    A packed row is described by the position where each token's document starts: with the causal mask that is exact,
    takes T numbers, and blocks before the start are skipped. Remat cannot save the results, since they have no name:
    the backward pass runs the kernels again. Without a GPU it is tokamax's XLA form, for tests.
    """
    from absl import flags
    from tokamax._src.ops.attention import api, base

    if not flags.FLAGS.is_parsed():  # tokamax would read this program's command line as its own
        flags.FLAGS(["bmjax"])
    if (options.platform or jax.default_backend()) != "gpu":
        preferred = ["xla_chunked"]
    else:
        preferred = ["mosaic_gpu", "triton"] if (gpu_capability() or (0, 0)) >= (9, 0) else ["triton"]
    implementation = next(api.IMPLEMENTATIONS[name] for name in preferred if name in api.IMPLEMENTATIONS)
    mask = base.Mask(k_start=document_starts(segments_BT)[:, None, :], is_causal=True)
    return implementation(q_BTNH, k_BTKH, v_BTKH, mask=mask)
