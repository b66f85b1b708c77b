"""Causal attention over packed rows, in blocks that skip the masked half.

A token sees the tokens of its own segment at or before its place in the row, and no further back than the
sliding window. Packed == unpacked, exactly: nothing else enters a row's softmax.

The backward pass is written out (FlashAttention, arXiv 2205.14135, section 3.1), for two reasons: a block's
probabilities are touched as few times as possible, and every product takes them untransposed, since a CPU pays
for each pass over T x T numbers as much as for the products themselves.
Letters: R = G * T rows of one key/value head's G query heads, H head size, S source tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to see stays free of NaN
SAVE_UP_TO = 1024  # rows up to this length keep their probabilities for the backward pass, longer ones recompute


def block_length(length: int) -> int:
    """Query tokens a block: a 16th of the row, at least 128, so at most 17/32 of a long row's square is computed."""
    block = 128
    while block * 16 < length:
        block *= 2
    return min(block, length)


def _allowed(segments_BT: jax.Array, window: jax.Array | None, start: int, stop: int) -> jax.Array:
    """Which of the row's first `stop` tokens each token of start..stop sees: bool [B, T, S]."""
    q_index, k_index = jnp.arange(start, stop)[:, None], jnp.arange(stop)[None, :]
    allowed_TS = k_index <= q_index
    if window is not None:
        allowed_TS &= q_index - k_index < window
    return allowed_TS & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])


def _scores(q_BKRH: jax.Array, k_BKSH: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """Masked scores, float32 [B, K, R, S]; q is scaled already."""
    s = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    B, K, R, S = s.shape
    T = allowed_BTS.shape[1]
    s = jnp.where(allowed_BTS[:, None, None], s.reshape(B, K, R // T, T, S), MASKED)
    return s.reshape(B, K, R, S)


def _blocks(length: int) -> list[tuple[int, int]]:
    block = block_length(length)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _rows(x_BKGTH: jax.Array, start: int, stop: int) -> jax.Array:
    B, K, G, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, start:stop].reshape(B, K, G * (stop - start), H)


@jax.custom_vjp
def _attention(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array, window: jax.Array | None
) -> jax.Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT, window)[0]


def _forward(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array, window: jax.Array | None
):
    B, K, G, T, H = q_BKGTH.shape
    outs, saved = [], []
    for start, stop in _blocks(T):
        s = _scores(_rows(q_BKGTH, start, stop), k_BKSH[:, :, :stop], _allowed(segments_BT, window, start, stop))
        top = jnp.max(s, axis=-1, keepdims=True)
        p = jnp.exp(s - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bkrs,bksh->bkrh", p.astype(v_BKSH.dtype), v_BKSH[:, :, :stop], preferred_element_type=jnp.float32
        )
        outs.append((out / total).reshape(B, K, G, stop - start, H).astype(q_BKGTH.dtype))
        # Either the unnormalized probabilities and their sum, or the log of the sum to compute them from again.
        saved.append((p.astype(v_BKSH.dtype), total) if T <= SAVE_UP_TO else top + jnp.log(total))
    out = jnp.concatenate(outs, axis=3)
    return out, (q_BKGTH, k_BKSH, v_BKSH, segments_BT, window, out, saved)


def _backward(residuals, d_out: jax.Array):
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, window, out, saved = residuals
    B, K, G, T, H = q_BKGTH.shape
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = q_BKGTH.dtype
    dq = []
    dk_BKHS = jnp.zeros((B, K, H, T), jnp.float32)
    dv_BKHS = jnp.zeros((B, K, H, T), jnp.float32)
    for (start, stop), kept in zip(_blocks(T), saved, strict=True):
        q, k, v = _rows(q_BKGTH, start, stop), k_BKSH[:, :, :stop], v_BKSH[:, :, :stop]
        do = _rows(d_out, start, stop).astype(jnp.float32)
        if T <= SAVE_UP_TO:
            p, total = kept
            do = do / total
        else:
            p = jnp.exp(_scores(q, k, _allowed(segments_BT, window, start, stop)) - kept).astype(dtype)
        delta = jnp.sum(do * _rows(out, start, stop), axis=-1, keepdims=True)
        do = do.astype(dtype)
        ds = (p * (einsum("bkrh,bksh->bkrs", do, v) - delta)).astype(dtype)
        dq.append(einsum("bkrs,bksh->bkrh", ds, k).reshape(B, K, G, stop - start, H))
        dk_BKHS = dk_BKHS.at[..., :stop].add(einsum("bkrh,bkrs->bkhs", q, ds))
        dv_BKHS = dv_BKHS.at[..., :stop].add(einsum("bkrh,bkrs->bkhs", do, p))
    dq_BKGTH = jnp.concatenate(dq, axis=3).astype(dtype)
    return dq_BKGTH, dk_BKHS.swapaxes(2, 3).astype(dtype), dv_BKHS.swapaxes(2, 3).astype(dtype), None, None


_attention.defvjp(_forward, _backward)


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    window: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] within segments of packed rows.

    segment_ids: int32, equal within a document. window: int32 scalar, how many tokens back (the own one included)
    are seen, None for all; it may be traced, so that layers of both kinds share one scan.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out = _attention(q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, window)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cached_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    start: jax.Array | int,
    window: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] of T new tokens, written at slots start..start+T-1 of a cache, to its valid slots."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_slot, k_slot = start + jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    causal_TS = k_slot <= q_slot
    if window is not None:
        causal_TS &= q_slot - k_slot < window
    q_BKRH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    weights = jax.nn.softmax(_scores(q_BKRH, k_BKSH, causal_TS & valid_BS[:, None, :]), axis=-1)
    out_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
