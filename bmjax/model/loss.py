"""Next-token cross-entropy without keeping the logits.

loss = sum over target tokens / count of target tokens; this module returns the sum and the count, and only the
training step divides, once, over all microbatches and devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in float32


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


def cross_entropy_sum(h_BTD: jax.Array, w_DV: jax.Array, labels_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum of -log p(label) * mask in nats, float32 scalar; softmax and accumulation in float32.

    The gradient of the sum is computed together with it, chunk by chunk, and scaled in the backward pass, so
    logits are neither kept nor computed twice. The logits' cotangent is rounded to the dtype of `h`, so that
    the two backward products run in it (float32 operands would be upcast silently). Where logits are too many
    for one chunk, each row's targets are moved to its front, and chunks without any target are skipped.
    """
    return _sum(h_BTD, w_DV, labels_BT, mask_BT.astype(jnp.float32))


def _pieces(shape: tuple[int, ...], vocab: int) -> int:
    """How many pieces the rows are cut into along their length: the least power of two that keeps a piece small."""
    rows, length = shape
    pieces = 1
    while pieces * 2 <= length and rows * -(-length // pieces) * vocab > CHUNK_ELEMENTS:
        pieces *= 2
    return pieces


def _targets_first(mask_BT: jax.Array) -> jax.Array:
    """The order of each row's tokens that puts its targets first, int32 [B, T]."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape.get("context", 1) > 1:  # moving tokens along a split row would gather it
        return jnp.broadcast_to(jnp.arange(mask_BT.shape[1]), mask_BT.shape)
    return jnp.argsort(mask_BT <= 0, axis=1, stable=True)


def _cut(x_BT: jax.Array, order_BT: jax.Array, pieces: int) -> jax.Array:
    """[B, T, ...] in order, padded with zeros, as [pieces, B, t, ...]."""
    index = order_BT.reshape(order_BT.shape + (1,) * (x_BT.ndim - 2))
    x = jnp.take_along_axis(x_BT, index, axis=1)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % pieces)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0)


def _join(x_PBt: jax.Array, order_BT: jax.Array) -> jax.Array:
    """What `_cut` cut, [B, T, D], each token at its place again."""
    x = jnp.moveaxis(x_PBt, 0, 1)
    x = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.take_along_axis(x, jnp.argsort(order_BT, axis=1)[:, :, None], axis=1)


def _piece(h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    z_BTV = jnp.einsum("btd,dv->btv", h, w, preferred_element_type=jnp.float32)
    top = jnp.max(z_BTV, axis=-1, keepdims=True)
    e_BTV = jnp.exp(z_BTV - top)
    total = jnp.sum(e_BTV, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(z_BTV, y[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jnp.log(total[..., 0]) + top[..., 0] - picked) * m)
    return loss, e_BTV, m[..., None] / total


@jax.custom_vjp
def _sum(h_BTD: jax.Array, w_DV: jax.Array, y_BT: jax.Array, m_BT: jax.Array) -> jax.Array:
    pieces = _pieces(y_BT.shape, w_DV.shape[1])
    if pieces == 1:
        return _piece(h_BTD, w_DV, y_BT, m_BT)[0]

    def body(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, y, m = xs
        return total + jax.lax.cond(jnp.any(m > 0), lambda: _piece(h, w_DV, y, m)[0], lambda: jnp.float32(0)), None

    order = _targets_first(m_BT)
    return jax.lax.scan(body, jnp.float32(0), tuple(_cut(a, order, pieces) for a in (h_BTD, y_BT, m_BT)))[0]


def _with_gradients(h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array, head: bool):
    """(loss, dh, dw); dw float32, None unless the head is trained."""
    loss, e_BTV, scale = _piece(h, w, y, m)
    hot = jnp.arange(w.shape[1]) == y[..., None]
    dz = (e_BTV * scale - jnp.where(hot, m[..., None], 0.0)).astype(h.dtype)
    dh = jnp.einsum("btv,dv->btd", dz, w, preferred_element_type=jnp.float32).astype(h.dtype)
    return loss, dh, jnp.einsum("btd,btv->dv", h, dz, preferred_element_type=jnp.float32) if head else None


def _forward(h_BTD: Any, w_DV: Any, y_BT: Any, m_BT: Any):
    head = w_DV.perturbed  # a frozen head needs no gradient: a third of the products
    h_BTD, w_DV, y_BT, m_BT = h_BTD.value, w_DV.value, y_BT.value, m_BT.value
    pieces = _pieces(y_BT.shape, w_DV.shape[1])
    if pieces == 1:
        loss, dh, dw = _with_gradients(h_BTD, w_DV, y_BT, m_BT, head)
        return loss, (dh, dw.astype(w_DV.dtype) if head else None)

    def body(carry: Any, xs: tuple[jax.Array, ...]):
        h, y, m = xs

        def work() -> Any:
            return _with_gradients(h, w_DV, y, m, head)

        def nothing() -> Any:
            return jnp.float32(0), jnp.zeros_like(h), jnp.zeros(w_DV.shape, jnp.float32) if head else None

        loss, dh, dw = jax.lax.cond(jnp.any(m > 0), work, nothing)
        return jax.tree.map(jnp.add, carry, (loss, dw)), dh

    order = _targets_first(m_BT)
    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32) if head else None)
    (loss, dw), dh = jax.lax.scan(body, start, tuple(_cut(a, order, pieces) for a in (h_BTD, y_BT, m_BT)))
    return loss, (_join(dh, order), dw.astype(w_DV.dtype) if head else None)


def _backward(saved: tuple[jax.Array, jax.Array | None], g: jax.Array):
    dh, dw = saved
    return (dh * g).astype(dh.dtype), None if dw is None else (dw * g).astype(dw.dtype), None, None


_sum.defvjp(_forward, _backward, symbolic_zeros=True)
