"""Causal attention in blocks of queries that skip the masked half: for short rows, in plain XLA.

The probabilities of the whole row are kept for the backward pass. It is written out (FlashAttention, arXiv 2205.14135,
section 3.1), so that they are read as few times as possible, and every product takes them untransposed: on a CPU a pass
over T x T numbers costs as much as a product.
Letters: R = G * T rows of one key/value head's G query heads, H head size, S source tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bmjax.model import remat
from bmjax.model.attention.tiles import MASKED, einsum

LONGEST = 1024  # tokens a row
BLOCK = 128  # of them, as queries at a time


def causal_mask(start: Array | int, queries: int, keys: int, window: Array | None) -> Array:
    """Return which of a row's first tokens are seen by each of the tokens from `start` on: bool [queries, keys]."""
    q_index, k_index = start + jnp.arange(queries)[:, None], jnp.arange(keys)[None, :]
    causal_TS = k_index <= q_index
    return causal_TS if window is None else causal_TS & (q_index - k_index < window)


def scores(q_BKRH: Array, k_BKSH: Array, allowed_BTS: Array) -> Array:
    """Compute masked scores, float32 [B, K, R, S], of queries that are scaled already."""
    s = einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH)
    B, K, R, S = s.shape
    T = allowed_BTS.shape[1]
    s = jnp.where(allowed_BTS[:, None, None], s.reshape(B, K, R // T, T, S), MASKED)
    return s.reshape(B, K, R, S)


def blocks(length: int) -> list[tuple[int, int]]:
    """Return the first token of each block of queries, and the last one plus one."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _queries(x_BKGTH: Array, start: int, stop: int) -> Array:
    B, K, G, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, start:stop].reshape(B, K, G * (stop - start), H)


@jax.custom_vjp
def _attention(q_BKGTH, k_BKSH, v_BKSH, segments_BT, window) -> Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT, window)[0]


def _forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT, window):
    B, K, G, T, H = q_BKGTH.shape
    outs, saved = [], []
    for start, stop in blocks(T):
        # A block of queries sees only the row's first `stop` tokens: R = G * (stop - start), S = stop.
        same_segment = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
        allowed_BTS = causal_mask(start, stop - start, stop, window) & same_segment
        s = scores(_queries(q_BKGTH, start, stop), k_BKSH[:, :, :stop], allowed_BTS)
        p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
        total = jnp.sum(p, axis=-1, keepdims=True)
        out = einsum("bkrs,bksh->bkrh", p.astype(v_BKSH.dtype), v_BKSH[:, :, :stop])
        outs.append((out / total).reshape(B, K, G, stop - start, H).astype(q_BKGTH.dtype))
        saved.append((p.astype(v_BKSH.dtype), total))
    out, saved = jax.tree.map(lambda x: checkpoint_name(x, remat.ATTENTION), (jnp.concatenate(outs, axis=3), saved))
    return out, (q_BKGTH, k_BKSH, v_BKSH, out, saved)


def _backward(residuals, d_out: Array):
    q_BKGTH, k_BKSH, v_BKSH, out, saved = residuals
    B, K, G, T, H = q_BKGTH.shape
    dtype, dq = q_BKGTH.dtype, []
    # Keys are the last axis of the sums, so that a CPU's products take p and ds untransposed.
    dk_BKHS = dv_BKHS = jnp.zeros((B, K, H, T), jnp.float32)
    for (start, stop), (p, total) in zip(blocks(T), saved, strict=True):
        q, k, v = _queries(q_BKGTH, start, stop), k_BKSH[:, :, :stop], v_BKSH[:, :, :stop]
        # ds = p * (dp - delta), where p is divided by its sum through `do`.
        do = _queries(d_out, start, stop).astype(jnp.float32) / total
        delta = jnp.sum(do * _queries(out, start, stop), axis=-1, keepdims=True)
        do = do.astype(dtype)
        ds = (p * (einsum("bkrh,bksh->bkrs", do, v) - delta)).astype(dtype)
        dq.append(einsum("bkrs,bksh->bkrh", ds, k).reshape(B, K, G, stop - start, H))
        dk_BKHS = _add(dk_BKHS, einsum("bkrh,bkrs->bkhs", q, ds))
        dv_BKHS = _add(dv_BKHS, einsum("bkrh,bkrs->bkhs", do, p))
    dq_BKGTH = jnp.concatenate(dq, axis=3).astype(dtype)
    return dq_BKGTH, dk_BKHS.swapaxes(2, 3).astype(dtype), dv_BKHS.swapaxes(2, 3).astype(dtype), None, None


def _add(sum_BKHS: Array, term_BKHS: Array) -> Array:
    # The term covers the sum's first tokens. Written as .at[].add, it makes jaxlib 0.11.2 crash when it compiles for a
    # CPU.
    first = sum_BKHS[..., : term_BKHS.shape[-1]]
    return jax.lax.dynamic_update_slice(sum_BKHS, first + term_BKHS, (0, 0, 0, 0))


_attention.defvjp(_forward, _backward)


def attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, window: Array | None) -> Array:
    """Compute attention [B, T, N, H] of whole rows of at most LONGEST tokens."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out = _attention(q_BKGTH, k_BKSH, v_BKSH, segments_BT, window)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
