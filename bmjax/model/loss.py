"""Next-token cross-entropy without keeping the logits.

loss = sum over target tokens / count of target tokens. This module returns the sum and the weights; only the training
step divides, once, over all microbatches and devices.

On a mesh every device has its own tokens and, along `tensor`, its own part of the vocabulary. The head is gathered over
`fsdp` and `context` once, not for every chunk, and its gradient is reduce-scattered once.
Letters: n tokens of a chunk, V the device's part of the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from bmjax.model.batch import Batch
from bmjax.model.embedding import Layout, layout
from bmjax.parallel.mesh import on_each_device

CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in float32
GPU_CHUNK_ELEMENTS = 2**27  # products of a GPU are slow where few tokens meet a whole head


def next_token_targets(batch: Batch[Array]) -> tuple[Array, Array]:
    """Return labels [B, T] and float32 weights [B, T] at the position that predicts them.

    labels[t] is tokens[t + 1], and its weight mask[t + 1]. A document's first token is never a target: nothing in its
    own segment precedes it.
    """
    labels, mask, following = (
        jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens, batch.loss_mask, batch.segment_ids)
    )
    return labels, mask.astype(jnp.float32) * ((following == batch.segment_ids) & (following > 0))


@jax.custom_vjp
def cross_entropy_sum(h_BTD: Array, w_DV: Array, labels_BT: Array, mask_BT: Array) -> Array:
    """Compute the sum of -log p(label) * mask in nats, a float32 scalar; softmax and accumulation are in float32.

    The gradient of the sum is computed together with it, chunk by chunk, and scaled in the backward pass, so
    logits are neither kept nor computed twice. The logits' cotangent is rounded to the dtype of `h`, so that
    the two backward products run in it (float32 operands would be upcast silently). Where logits are too many
    for one chunk, a device's targets are moved to the front of its tokens, and chunks without any target are skipped.
    """
    return _loss_and_gradients(h_BTD, w_DV, labels_BT, mask_BT, False, False)[0]


def cross_entropy_by_token(h_BTD: Array, w_DV: Array, labels_BT: Array) -> Array:
    """Compute -log p(label) at every position in nats, float32 [B, T], without gradients; logits chunk by chunk."""
    split = layout(labels_BT.shape, w_DV.shape, ("embed", "vocab"))

    def local(h, w, labels) -> Any:
        # h [B/(data fsdp), T/context, D], w [D/(fsdp context), V/tensor], labels [B/(data fsdp), T/context]
        if split.embed:
            w = lax.all_gather(w, split.embed, axis=0, tiled=True)  # [D, V/tensor]
        chunks = _chunk_count(labels.size, w.shape[1])

        def split_up(x: Array) -> Array:  # [N, ...] -> [chunks, n, ...], zero-padded
            x = jnp.pad(x, [(0, -len(x) % chunks)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(chunks, -1, *x.shape[1:])

        rows = split_up(h.reshape(-1, h.shape[-1])), split_up(labels.reshape(-1))
        nats = lax.map(lambda chunk: _nats_of_chunk(split, chunk[0], w, chunk[1])[0], rows)
        return nats.reshape(-1)[: labels.size].reshape(labels.shape)

    h_spec = PartitionSpec(*split.tokens, None)
    nats_BT: Array = on_each_device(local, (h_spec, split.matrix, split.tokens), split.tokens)(
        h_BTD, w_DV, jnp.asarray(labels_BT)
    )
    return nats_BT


def _nats_of_chunk(split: Layout, h, w, labels) -> Any:
    """Return -log p(label) [n], the exponentials [n, V], their sums [n, 1], and the labels in the local vocabulary."""
    # h [n, D], w [D, V], labels [n]
    z_NV = jnp.einsum("nd,dv->nv", h, w, preferred_element_type=jnp.float32)
    largest = jnp.max(z_NV, axis=-1, keepdims=True)
    if split.vocab:
        largest = lax.pmax(largest, split.vocab)
        labels = labels - lax.axis_index(split.vocab) * w.shape[1]  # outside of 0..V-1 where another device has it
    e_NV = jnp.exp(z_NV - largest)
    total = jnp.sum(e_NV, axis=-1, keepdims=True)
    label_logit = jnp.take_along_axis(z_NV, jnp.clip(labels, 0, w.shape[1] - 1)[:, None], axis=-1)[:, 0]
    if split.vocab:
        label_logit = jnp.where((labels >= 0) & (labels < w.shape[1]), label_logit, 0.0)
        total, label_logit = lax.psum((total, label_logit), split.vocab)
    return jnp.log(total[:, 0]) + largest[:, 0] - label_logit, e_NV, total, labels


def _sums_of_chunk(split: Layout, h, w, labels, mask, gradient: bool, train_head: bool) -> Any:
    """Return ((loss, dw), dh) of a chunk: dw [D, V] float32, dh [n, D] of the local vocabulary; None if not wanted."""
    # h [n, D], w [D, V], labels and mask [n]
    nats, e_NV, total, labels = _nats_of_chunk(split, h, w, labels)
    loss = jnp.sum(nats * mask)
    if not gradient:
        return (loss, None), None
    scale = mask[:, None] / total  # dz = e * scale - onehot * mask
    is_label = jnp.arange(w.shape[1]) == labels[:, None]
    dz = (e_NV * scale - jnp.where(is_label, mask[:, None], 0.0)).astype(h.dtype)
    dh = jnp.einsum("nv,dv->nd", dz, w, preferred_element_type=jnp.float32).astype(h.dtype)
    dw = jnp.einsum("nd,nv->dv", h, dz, preferred_element_type=jnp.float32) if train_head else None
    return (loss, dw), dh


def _chunk_count(tokens: int, vocab: int) -> int:
    """Return the least power of two of chunks whose logits are at most CHUNK_ELEMENTS."""
    most = GPU_CHUNK_ELEMENTS if jax.default_backend() == "gpu" else CHUNK_ELEMENTS
    chunks = 1
    while chunks * 2 <= tokens and -(-tokens // chunks) * vocab > most:
        chunks *= 2
    return chunks


def _sums_of_device(split: Layout, h, w, labels, mask, gradient: bool, train_head: bool) -> Any:
    """Return `_sums_of_chunk` of all of a device's tokens. h [N, D], w [D, V], labels and mask [N]."""
    chunks = _chunk_count(len(labels), w.shape[1])
    if chunks == 1:
        return _sums_of_chunk(split, h, w, labels, mask, gradient, train_head)

    def add_chunk(sums: Any, chunk: tuple[Array, ...]) -> Any:
        h, labels, mask = chunk

        def compute() -> Any:
            terms, dh = _sums_of_chunk(split, h, w, labels, mask, gradient, train_head)
            return jax.tree.map(jnp.add, sums, terms), dh  # in here, so that the product adds to the sum in place

        return lax.cond(jnp.any(mask > 0), compute, lambda: (sums, jnp.zeros_like(h) if gradient else None))

    def split_up(x: Array) -> Array:  # [N, ...] -> [chunks, n, ...], targets first, zero-padded
        x = jnp.pad(x[order], [(0, -len(x) % chunks)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, -1, *x.shape[1:])

    order = jnp.argsort(mask <= 0, stable=True)
    zeros = (jnp.float32(0), jnp.zeros(w.shape, jnp.float32) if train_head else None)
    sums, dh = lax.scan(add_chunk, zeros, (split_up(h), split_up(labels), split_up(mask)))
    return sums, dh.reshape(-1, h.shape[1])[jnp.argsort(order)] if gradient else None


def _loss_and_gradients(h_BTD, w_DV, labels_BT, mask_BT, gradient: bool, train_head: bool) -> Any:
    """Return (loss, dh [B, T, D], dw [D, V] float32), the gradients None where they are not asked for."""
    split = layout(labels_BT.shape, w_DV.shape, ("embed", "vocab"))

    def local(h, w, labels, mask) -> Any:
        # h [B/(data fsdp), T/context, D], w [D/(fsdp context), V/tensor], labels and mask [B/(data fsdp), T/context]
        if split.embed:
            w = lax.all_gather(w, split.embed, axis=0, tiled=True)  # [D, V/tensor]
        rows = (h.reshape(-1, h.shape[-1]), w, labels.reshape(-1), mask.reshape(-1))
        (loss, dw), dh = _sums_of_device(split, *rows, gradient, train_head)
        if gradient:
            dh = lax.psum(dh.reshape(h.shape), split.vocab or ())
        if train_head:
            # Sum dw [D, V/tensor] over the devices with other tokens; each keeps [D/(fsdp context), V/tensor]. Where an
            # axis splits the width and not the tokens, its devices hold the same sum, and each cuts its part out.
            scatter = set(split.embed) <= set(split.token_axes)
            dw = lax.psum(dw, tuple(axis for axis in split.token_axes if not scatter or axis not in split.embed))
            if split.embed and scatter:
                # The barrier keeps it in the loop over microbatches: XLA fails at moving it out (libtpu 0.0.42).
                dw = lax.optimization_barrier(lax.psum_scatter(dw, split.embed, scatter_dimension=0, tiled=True))
            elif split.embed:
                size = dw.shape[0] // lax.axis_size(split.embed)
                dw = lax.dynamic_slice_in_dim(dw, lax.axis_index(split.embed) * size, size)
        return lax.psum(loss, split.token_axes), dh, dw

    h_spec = PartitionSpec(*split.tokens, None)
    out_specs = (PartitionSpec(), h_spec if gradient else None, split.matrix if train_head else None)
    on_devices = on_each_device(local, (h_spec, split.matrix, split.tokens, split.tokens), out_specs)
    return on_devices(h_BTD, w_DV, jnp.asarray(labels_BT), jnp.asarray(mask_BT, jnp.float32))


def _forward(h_BTD: Any, w_DV: Any, labels_BT: Any, mask_BT: Any):
    train_head = w_DV.perturbed  # a frozen head needs no gradient: a third of the products
    loss, dh, dw = _loss_and_gradients(h_BTD.value, w_DV.value, labels_BT.value, mask_BT.value, True, train_head)
    return loss, (dh, dw.astype(w_DV.value.dtype) if train_head else None)


def _backward(saved: tuple[Array, Array | None], g: Array):
    dh, dw = saved
    return (dh * g).astype(dh.dtype), None if dw is None else (dw * g).astype(dw.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)
