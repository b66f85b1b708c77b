"""Next-token cross-entropy without keeping the logits.

loss = sum over target tokens / count of target tokens; this module returns the sum and the count, and only the
training step divides, once, over all microbatches and devices.

On a mesh every device has its own tokens and, along `tensor`, its own part of the vocabulary; the head is gathered over
`fsdp` and `context` once, not for every chunk, and its gradient is reduce-scattered once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, split_axes

CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in float32
GPU_CHUNK_ELEMENTS = 2**27  # products of a GPU are slow where few tokens meet a whole head


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
    for one chunk, a device's targets are moved to the front of its tokens, and chunks without any target are skipped.
    """
    return _sum(h_BTD, w_DV, jnp.asarray(labels_BT), jnp.asarray(mask_BT, jnp.float32))


class _Split(NamedTuple):
    """How the mesh axes split the work. tokens, embed: axes that split the tokens, the head's width; vocab: the axis of
    its vocabulary, or None."""

    tokens: tuple[str, ...] = ()
    vocab: str | None = None
    embed: tuple[str, ...] = ()


def _on_mesh(function: Any, h_BTD: jax.Array, w_DV: jax.Array, y_BT: jax.Array, m_BT: jax.Array, head: bool) -> Any:
    """`function` of every device's part, with the sums over devices made: (loss, dh, dw or None), or the loss alone
    where `function` gives that."""
    mesh = mesh_in_scope()
    if mesh is None:
        return function(_Split(), h_BTD, w_DV, y_BT, m_BT, head)
    h_spec = fitting_spec(mesh, ("batch", "length", None), h_BTD.shape)
    w_spec = fitting_spec(mesh, ("embed", "vocab"), w_DV.shape)
    tokens = split_axes(h_spec)
    split = _Split(tokens, w_spec[1], split_axes(w_spec[:1]))

    def local(h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array) -> Any:
        if split.embed:
            w = lax.all_gather(w, split.embed, axis=0, tiled=True)
        found = function(split, h, w, y, m, head)
        if not isinstance(found, tuple):
            return lax.psum(found, tokens) if tokens else found
        loss, dh, dw = found
        if split.vocab:
            dh = lax.psum(dh, split.vocab)
        return lax.psum(loss, tokens) if tokens else loss, dh, _reduced(split, dw) if head else jnp.float32(0)

    both = function is _chunks_with_gradients
    place, token_spec = PartitionSpec(), PartitionSpec(*h_spec[:2])
    run = jax.shard_map(
        local, in_specs=(h_spec, w_spec, token_spec, token_spec),
        out_specs=(place, h_spec, w_spec if head else place) if both else place, check_vma=False,
    )  # fmt: skip
    return run(h_BTD, w_DV, y_BT, m_BT)


def _reduced(split: _Split, dw: jax.Array) -> jax.Array:
    """A head's gradient summed over the devices with other tokens; each keeps its own part of it."""
    if not split.embed:
        return lax.psum(dw, split.tokens) if split.tokens else dw
    if set(split.embed) <= set(split.tokens):
        others = tuple(axis for axis in split.tokens if axis not in split.embed)
        if others:
            dw = lax.psum(dw, others)
        # The barrier keeps it in the loop over microbatches: XLA fails at moving it out (libtpu 0.0.42).
        return lax.optimization_barrier(lax.psum_scatter(dw, split.embed, scatter_dimension=0, tiled=True))
    if split.tokens:
        dw = lax.psum(dw, split.tokens)
    size = dw.shape[0] // lax.axis_size(split.embed)
    return lax.dynamic_slice_in_dim(dw, lax.axis_index(split.embed) * size, size)


def _pieces(tokens: int, vocab: int) -> int:
    """How many chunks the tokens are cut into: the least power of two that keeps one small."""
    most = GPU_CHUNK_ELEMENTS if jax.default_backend() == "gpu" else CHUNK_ELEMENTS
    pieces = 1
    while pieces * 2 <= tokens and -(-tokens // pieces) * vocab > most:
        pieces *= 2
    return pieces


def _cut(arrays: Sequence[jax.Array], m_N: jax.Array, pieces: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(order that puts targets first, the arrays [N, ...] in it, padded with zeros, as [pieces, n, ...])."""
    order = jnp.argsort(m_N <= 0, stable=True)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x[order], [(0, -len(x) % pieces)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(pieces, -1, *x.shape[1:])

    return order, tuple(cut(x) for x in arrays)


def _piece(split: _Split, h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array) -> Any:
    """(loss, e = exp(logits - top), what dz multiplies e with, which local token of the vocabulary is the label)."""
    z_NV = jnp.einsum("nd,dv->nv", h, w, preferred_element_type=jnp.float32)
    top = jnp.max(z_NV, axis=-1, keepdims=True)
    if split.vocab:
        top = lax.pmax(top, split.vocab)
        y = y - lax.axis_index(split.vocab) * w.shape[1]
    e_NV = jnp.exp(z_NV - top)
    total = jnp.sum(e_NV, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(z_NV, jnp.clip(y, 0, w.shape[1] - 1)[:, None], axis=-1)[:, 0]
    if split.vocab:
        picked = jnp.where((y >= 0) & (y < w.shape[1]), picked, 0.0)
        total, picked = lax.psum((total, picked), split.vocab)
    loss = jnp.sum((jnp.log(total[:, 0]) + top[:, 0] - picked) * m)
    return loss, e_NV, m[:, None] / total, y


def _flat(h: jax.Array, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return h.reshape(-1, h.shape[-1]), y.reshape(-1), m.reshape(-1)


def _chunks(split: _Split, h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array, head: bool) -> jax.Array:
    """The loss of a device's tokens."""
    h, y, m = _flat(h, y, m)
    pieces = _pieces(len(y), w.shape[1])
    if pieces == 1:
        return _piece(split, h, w, y, m)[0]

    def body(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, y, m = xs
        return total + lax.cond(jnp.any(m > 0), lambda: _piece(split, h, w, y, m)[0], lambda: jnp.float32(0)), None

    return lax.scan(body, jnp.float32(0), _cut((h, y, m), m, pieces)[1])[0]


def _gradients(split: _Split, h: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array, head: bool) -> Any:
    """(loss, dh, dw) of a chunk; dw float32, None unless the head is trained. dh: of the local vocabulary."""
    loss, e_NV, scale, y = _piece(split, h, w, y, m)
    hot = jnp.arange(w.shape[1]) == y[:, None]
    dz = (e_NV * scale - jnp.where(hot, m[:, None], 0.0)).astype(h.dtype)
    dh = jnp.einsum("nv,dv->nd", dz, w, preferred_element_type=jnp.float32).astype(h.dtype)
    return loss, dh, jnp.einsum("nd,nv->dv", h, dz, preferred_element_type=jnp.float32) if head else None


def _chunks_with_gradients(
    split: _Split, h_BTD: jax.Array, w: jax.Array, y: jax.Array, m: jax.Array, head: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(loss, dh, dw) of a device's tokens."""
    h, y, m = _flat(h_BTD, y, m)
    pieces = _pieces(len(y), w.shape[1])
    if pieces == 1:
        loss, dh, dw = _gradients(split, h, w, y, m, head)
        return loss, dh.reshape(h_BTD.shape), dw

    def body(carry: Any, xs: tuple[jax.Array, ...]) -> Any:
        h, y, m = xs

        def more() -> Any:  # added here, so that the product adds to the sum in place
            loss, dh, dw = _gradients(split, h, w, y, m, head)
            return jax.tree.map(jnp.add, carry, (loss, dw)), dh

        return lax.cond(jnp.any(m > 0), more, lambda: (carry, jnp.zeros_like(h)))

    order, cut = _cut((h, y, m), m, pieces)
    start = (jnp.float32(0), jnp.zeros(w.shape, jnp.float32) if head else None)
    (loss, dw), dh = lax.scan(body, start, cut)
    dh = dh.reshape(-1, h.shape[1])[jnp.argsort(order)]
    return loss, dh.reshape(h_BTD.shape), dw


@jax.custom_vjp
def _sum(h_BTD: jax.Array, w_DV: jax.Array, y_BT: jax.Array, m_BT: jax.Array) -> jax.Array:
    return _on_mesh(_chunks, h_BTD, w_DV, y_BT, m_BT, False)


def _forward(h_BTD: Any, w_DV: Any, y_BT: Any, m_BT: Any):
    head = w_DV.perturbed  # a frozen head needs no gradient: a third of the products
    loss, dh, dw = _on_mesh(_chunks_with_gradients, h_BTD.value, w_DV.value, y_BT.value, m_BT.value, head)
    return loss, (dh, dw.astype(w_DV.value.dtype) if head else None)


def _backward(saved: tuple[jax.Array, jax.Array | None], g: jax.Array):
    dh, dw = saved
    return (dh * g).astype(dh.dtype), None if dw is None else (dw * g).astype(dw.dtype), None, None


_sum.defvjp(_forward, _backward, symbolic_zeros=True)
