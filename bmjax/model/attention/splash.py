"""Attention by the splash kernels of JAX's Pallas library, for TPUs. Packed rows are masked inside the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.model import remat
from bmjax.model.attention.options import AttentionOptions

LANES = 128
QUERIES, KEYS = 512, 1024  # of a block, at most


def refuses(q: jax.ShapeDtypeStruct | Array, options: AttentionOptions) -> str | None:
    """Return why these kernels cannot compute rows of queries like `q` [B, T, N, H]; None where they can."""
    length = q.shape[1]
    return None if length % LANES == 0 else f"needs rows of a multiple of {LANES} tokens, not {length}"


def attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, options: AttentionOptions) -> Array:
    """Compute attention [B, T, N, H] of whole rows."""
    # Not at the top: Pallas takes a fifth of a second to load, which only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    kv_block = _block(T, KEYS)
    sizes: dict[str, Any] = {
        **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), _block(T, QUERIES)),
        **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), kv_block),
        **dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), _block(kv_block, QUERIES)),
    }
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=kernels.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=remat.ATTENTION,
        interpret=(options.platform or jax.default_backend()) != "tpu",
    )

    def row(q_NTH: Array, k_KTH: Array, v_KTH: Array, segments_T: Array) -> Array:
        return kernel(q_NTH, k_KTH, v_KTH, kernels.SegmentIds(q=segments_T, kv=segments_T))

    # Heads that are smaller than a register's lanes are filled up with zeros.
    scaled = (q_BTNH * H**-0.5).astype(q_BTNH.dtype)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (scaled, k_BTKH, v_BTKH))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -H % LANES))) for x in heads_first)
    out_BNTH = jax.vmap(row)(q, k, v, segments_BT)
    return out_BNTH[..., :H].transpose(0, 2, 1, 3)


def _block(length: int, most: int) -> int:
    """Return the largest multiple of LANES that divides `length` and is at most `most`."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)
