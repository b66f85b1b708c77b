"""Next-token cross-entropy without keeping the logits.

loss = sum over target tokens / count of target tokens; this module returns the sum and the count, and only the
training step divides, once, over all microbatches and devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32


def next_token_targets(
    tokens_BT: jax.Array, loss_mask_BT: jax.Array, segment_ids_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Labels and weights at the place that predicts them: labels[t] = tokens[t+1], where mask[t+1] is 1.

    A target in another segment than its predecessor is nobody's (the first token of a packed document).
    """
    labels = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    mask = jnp.pad(loss_mask_BT[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    if segment_ids_BT is not None:
        following = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
        mask = mask * ((following == segment_ids_BT) & (following > 0))
    return labels, mask


def _chunks(rows: int, vocab: int) -> int:
    """How many pieces the rows are cut into: the least power of two that divides them and keeps a piece small."""
    pieces = 1
    while rows % (pieces * 2) == 0 and rows // pieces * vocab > CHUNK_ELEMENTS:
        pieces *= 2
    return pieces


def cross_entropy_sum(h_BTD: jax.Array, w_DV: jax.Array, labels_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum of -log p(label) * mask in nats, float32 scalar; softmax and accumulation in float32.

    The gradient of the sum is computed together with it, chunk by chunk, and scaled in the backward pass, so
    logits are neither kept nor computed twice. The logits' cotangent is rounded to the dtype of `h`, so that
    the two backward products run in it (float32 operands would be upcast silently).
    """
    B, T, D = h_BTD.shape
    return _sum(h_BTD.reshape(B * T, D), w_DV, labels_BT.reshape(-1), mask_BT.reshape(-1).astype(jnp.float32))


def _piece(h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    z_NV = jnp.einsum("nd,dv->nv", h, w, preferred_element_type=jnp.float32)
    top = jnp.max(z_NV, axis=-1, keepdims=True)
    e_NV = jnp.exp(z_NV - top)
    total = jnp.sum(e_NV, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(z_NV, y[:, None], axis=-1)[:, 0]
    loss = jnp.sum((jnp.log(total[:, 0]) + top[:, 0] - picked) * m)
    return loss, e_NV, m[:, None] / total


@jax.custom_vjp
def _sum(h_ND: jax.Array, w_DV: jax.Array, y_N: jax.Array, m_N: jax.Array) -> jax.Array:
    pieces = _chunks(h_ND.shape[0], w_DV.shape[1])
    if pieces == 1:
        return _piece(h_ND, w_DV, y_N, m_N)[0]

    def body(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, y, m = xs
        return total + _piece(h, w_DV, y, m)[0], None

    split = partial(_split, pieces)
    return jax.lax.scan(body, jnp.float32(0), (split(h_ND), split(y_N), split(m_N)))[0]


def _split(pieces: int, x: jax.Array) -> jax.Array:
    return x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])


def _with_gradients(h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    loss, e_NV, scale = _piece(h, w, y, m)
    hot = jnp.arange(w.shape[1])[None, :] == y[:, None]
    dz = (e_NV * scale - jnp.where(hot, m[:, None], 0.0)).astype(h.dtype)
    dh = jnp.einsum("nv,dv->nd", dz, w, preferred_element_type=jnp.float32).astype(h.dtype)
    return loss, dh, jnp.einsum("nd,nv->dv", h, dz, preferred_element_type=jnp.float32)


def _forward(h_ND: jax.Array, w_DV: jax.Array, y_N: jax.Array, m_N: jax.Array):
    pieces = _chunks(h_ND.shape[0], w_DV.shape[1])
    if pieces == 1:
        loss, dh, dw = _with_gradients(h_ND, w_DV, y_N, m_N)
        return loss, (dh, dw.astype(w_DV.dtype))

    def body(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]):
        h, y, m = xs

        def work() -> tuple[jax.Array, jax.Array, jax.Array]:
            return _with_gradients(h, w_DV, y, m)

        def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(h), jnp.zeros(w_DV.shape, jnp.float32)

        loss, dh, dw = jax.lax.cond(jnp.any(m > 0), work, nothing)  # prompts fill whole chunks
        return (carry[0] + loss, carry[1] + dw), dh

    split = partial(_split, pieces)
    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, dw), dh = jax.lax.scan(body, start, (split(h_ND), split(y_N), split(m_N)))
    return loss, (dh.reshape(h_ND.shape), dw.astype(w_DV.dtype))


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
    dh, dw = saved
    return (dh * g).astype(dh.dtype), (dw * g).astype(dw.dtype), None, None


_sum.defvjp(_forward, _backward)
