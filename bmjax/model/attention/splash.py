"""Attention by the splash kernels of JAX's Pallas library, for TPUs; elsewhere they are interpreted, for tests.

Blocks above the diagonal are skipped at compile time, and packed rows are masked by their segment ids inside the
kernel. Outputs are saved under the name `context`, so that a remat policy can keep them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from bmjax.model.attention import tiles

LANES = 128
SAVED = "context"
QUERIES, KEYS = 512, 1024  # of a block, at most


def refuses(q_BTNH: jax.Array, window: jax.Array | None) -> str | None:
    """Why these kernels can't compute it; None where they can."""
    if window is not None:
        return "knows no sliding window that differs by layer"
    length = q_BTNH.shape[1]
    return None if length % LANES == 0 else f"needs rows of a multiple of {LANES} tokens, not {length}"


@dataclass(frozen=True)
class Splash:
    """The kernels for `contexts.spread`."""

    interpret: bool

    def whole(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: None
    ) -> jax.Array:
        """Attention [B, T, N, H] of whole rows."""
        _, T, N, H = q_BTNH.shape
        scaled = (q_BTNH * H**-0.5).astype(q_BTNH.dtype)
        q, k, v = (_lanes(x.transpose(0, 2, 1, 3)) for x in (scaled, k_BTKH, v_BTKH))
        kernel = _kernel(T, N, self.interpret)
        out_BNTH = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(q=segments_BT, kv=segments_BT))
        return out_BNTH[..., :H].transpose(0, 2, 1, 3)

    @staticmethod
    def part(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        """In tiles: these kernels have no gradient for the log-sum, nor a start that differs by device."""
        return tiles.attention(*arguments)


def _lanes(x: jax.Array) -> jax.Array:
    """Heads smaller than a register's lanes are filled up with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _kernel(length: int, heads: int, interpret: bool) -> Any:
    q, kv = _block(length, QUERIES), _block(length, KEYS)
    compute = _block(kv, QUERIES)
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return kernels.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        residual_checkpoint_name=SAVED,
    )  # fmt: skip


def _block(length: int, most: int) -> int:
    """The largest multiple of LANES that divides `length`, at most `most`."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)
