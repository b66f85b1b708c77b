"""Causal attention over packed rows, in blocks that skip the masked half.

A token sees the tokens of its own segment at or before its place in the row, and no further back than the
sliding window. Packed == unpacked, exactly: nothing else enters a row's softmax.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to see stays free of NaN
SAVE_UP_TO = 1024  # rows up to this length keep their probabilities for the backward pass


def block_length(length: int) -> int:
    """Query tokens a block: a 16th of the row, at least 128, so at most 17/32 of the square is computed."""
    block = 128
    while block * 16 < length:
        block *= 2
    return min(block, length)


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array
) -> jax.Array:
    """Softmax attention [B, T, N, H] with grouped heads (N a multiple of K); scores in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(allowed_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Attention within segments of packed rows.

    segment_ids: int32, equal within a document. window: how many tokens back (the own one included) are seen,
    None for all; a traced scalar is fine, so that layers of both kinds share one scan.
    """
    T = q_BTNH.shape[1]
    block = block_length(T)

    def part(q: jax.Array, k: jax.Array, v: jax.Array, seg_q: jax.Array, seg_k: jax.Array, start: int) -> jax.Array:
        q_index = start + jnp.arange(q.shape[1])[:, None]
        k_index = jnp.arange(k.shape[1])[None, :]
        causal_TS = k_index <= q_index
        if window is not None:
            causal_TS &= q_index - k_index < window
        return attend(q, k, v, causal_TS & (seg_q[:, :, None] == seg_k[:, None, :]))

    if T > SAVE_UP_TO:
        part = jax.checkpoint(part, static_argnums=(5,), prevent_cse=False)
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        outs.append(
            part(
                q_BTNH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop],
                segment_ids_BT[:, start:stop], segment_ids_BT[:, :stop], start,
            )
        )  # fmt: skip
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def cached_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    valid_BS: jax.Array,
    start: jax.Array | int,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Attention of T new tokens, written at slots start..start+T-1 of a cache with S slots, to its valid slots."""
    q_slot = start + jnp.arange(q_BTNH.shape[1])[:, None]
    k_slot = jnp.arange(k_BSKH.shape[1])[None, :]
    causal_TS = k_slot <= q_slot
    if window is not None:
        causal_TS &= q_slot - k_slot < window
    return attend(q_BTNH, k_BSKH, v_BSKH, causal_TS & valid_BS[:, None, :])
