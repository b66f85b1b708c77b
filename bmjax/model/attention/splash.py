"""Attention by the splash kernels of JAX's Pallas library, for TPUs; elsewhere they are interpreted, for tests.

Blocks above the diagonal are skipped at compile time, and packed rows are masked by their segment ids inside the
kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bmjax.model import remat

LANES = 128
QUERIES, KEYS = 512, 1024  # of a block, at most


def refuses(length: int, windows: bool) -> str | None:
    """Why these kernels can't compute rows of `length` tokens; None where they can."""
    if windows:
        return "knows no sliding window that differs by layer"
    return None if length % LANES == 0 else f"needs rows of a multiple of {LANES} tokens, not {length}"


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool
) -> jax.Array:
    """Attention [B, T, N, H] of whole rows."""
    _, T, N, H = q_BTNH.shape
    scaled = (q_BTNH * H**-0.5).astype(q_BTNH.dtype)
    q, k, v = (_lanes(x.transpose(0, 2, 1, 3)) for x in (scaled, k_BTKH, v_BTKH))
    out_BNTH = jax.vmap(_kernel(T, N, interpret))(q, k, v, segments_BT)
    return out_BNTH[..., :H].transpose(0, 2, 1, 3)


def _lanes(x: jax.Array) -> jax.Array:
    """Heads smaller than a register's lanes are filled up with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _kernel(length: int, heads: int, interpret: bool) -> Callable[..., jax.Array]:
    """(q, k, v, segments) of a row -> attention."""
    # Not at the top: Pallas takes a fifth of a second to load, and who has no TPU never needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv = _block(length, QUERIES), _block(length, KEYS)
    compute = _block(kv, QUERIES)
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    kernel = kernels.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=remat.ATTENTION,
        interpret=interpret,
    )  # fmt: skip
    return lambda q, k, v, segments: kernel(q, k, v, kernels.SegmentIds(q=segments, kv=segments))


def _block(length: int, most: int) -> int:
    """The largest multiple of LANES that divides `length`, at most `most`."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)
