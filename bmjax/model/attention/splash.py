"""Attention by the splash kernels of JAX's Pallas library, for TPUs. Called by dispatch.py.

Blocks above the diagonal are skipped at compile time, and packed rows are masked by their segment ids inside the
kernel. On other devices the kernels are interpreted, for tests.
"""

import jax
import jax.numpy as jnp

from bmjax.model import remat
from bmjax.model.attention.options import AttentionOptions

LANES = 128
QUERIES, KEYS = 512, 1024  # of a block, at most


def refuses(q: jax.ShapeDtypeStruct | jax.Array, options: AttentionOptions) -> str | None:
    """Return why these kernels cannot compute rows of queries like `q` [B, T, N, H]; None where they can."""
    length = q.shape[1]
    return None if length % LANES == 0 else f"needs rows of a multiple of {LANES} tokens, not {length}"


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, options: AttentionOptions
) -> jax.Array:
    """Compute attention [B, T, N, H] of whole rows."""
    # Not at the top: Pallas takes a fifth of a second to load, which only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    q_block, kv_block = _block(T, QUERIES), _block(T, KEYS)
    compute_block = _block(kv_block, QUERIES)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=kernels.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_kv_compute=compute_block,
            block_q_dkv=q_block,
            block_kv_dkv=kv_block,
            block_kv_dkv_compute=compute_block,
            block_q_dq=q_block,
            block_kv_dq=kv_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=remat.ATTENTION,
        interpret=options.interpret,
    )

    def row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array) -> jax.Array:
        return kernel(q_NTH, k_KTH, v_KTH, kernels.SegmentIds(q=segments_T, kv=segments_T))

    scaled = (q_BTNH * H**-0.5).astype(q_BTNH.dtype)
    q, k, v = (_pad_heads(x.transpose(0, 2, 1, 3)) for x in (scaled, k_BTKH, v_BTKH))
    out_BNTH = jax.vmap(row)(q, k, v, segments_BT)
    return out_BNTH[..., :H].transpose(0, 2, 1, 3)


def _pad_heads(x: jax.Array) -> jax.Array:
    """Fill heads that are smaller than a register's lanes up with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _block(length: int, most: int) -> int:
    """Return the largest multiple of LANES that divides `length` and is at most `most`."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)
