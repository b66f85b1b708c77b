"""Distils the branches into their merge: short joint training whose targets are the branches' own distributions.

The loss is the mean over domains of KL(branch || student) a target token, each domain's rows with its own branch. The
branches are read one after another and only run forward: their last hidden states are kept in the host's memory, and
logits are made of them again, chunk by chunk of the vocabulary. Called by steps.py after all other stages.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.learn import moved_leaves
from bmjax.calibrate.models import Tree
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import loss, qwen2
from bmjax.model.attention.options import Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.parallel import turns
from bmjax.parallel.mesh import sharding

CHUNK_ELEMENTS = 2**26  # logits of one model held at once: 256 MiB in float32
_OUTSIDE = -1e30  # logit of a row that only fills up the last chunk; finite, so that differences of two are 0
_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95))


def distill(
    config: ModelConfig, base: Tree, params: Tree, branches: Iterable[Tree], calibration: Calibration,
    p: CalibrationSettings,
) -> Tree:  # fmt: skip
    """Return `params` after `p.distill` steps of Adam on the divergence from the branches.

    Arguments:
        base: parameters of the common start. Leaves that equal it in every branch stay as they are in `params`.
        branches: parameters of the branches in the calibration's order; each is dropped before the next is asked for.
    """
    first = p.steps + p.polish  # rows that no earlier stage has seen, while there are any
    batches = [calibration.joint(first + number, "distilling") for number in range(p.distill)]
    # The teachers' hidden states on their own rows, and their heads.
    teachers: list[tuple[jax.Array, list[np.ndarray]]] = []
    moving = None
    for domain, branch in enumerate(branches):
        moving = moved_leaves(base, branch, moving)
        hidden = []
        for batch in batches:
            rows = _rows_of(batch, domain, len(calibration.loaders))
            calibration.count("distilling_teachers", rows)
            hidden.append(np.asarray(_hidden(config, branch, rows, p.compute_dtype, "none")))
        teachers.append((qwen2.head_weight(config, branch).astype(p.compute_dtype), hidden))
        del branch
    # The student's steps.
    moments, heads = _ADAM.init(params), [head for head, _ in teachers]
    for number, batch in enumerate(batches):
        rate = np.float32(p.distill_rate * _share_of_rate(number, p.distill))
        hidden_of_batch = [
            jax.device_put(states[number], sharding(calibration.mesh, ("batch", "length", None), states[number].shape))
            for _, states in teachers
        ]
        params, moments = _step(
            config, p.compute_dtype, p.remat, p.distill_temperature, params, moments, moving, batch, hidden_of_batch,
            heads, rate,
        )  # fmt: skip
        jax.block_until_ready(params)  # else the states of all steps would wait on the device
    return params


def _share_of_rate(number: int, steps: int) -> float:
    """Return the share of the learning rate of step `number`, from 0.

    It rises over the first quarter: Adam's first steps are as long for noise as for what all rows agree on.
    """
    warm = -(-steps // 4)
    return min((number + 1) / warm, (steps - number) / (steps - warm + 1))


def _rows_of(batch: Batch[jax.Array], domain: int, domains: int) -> Batch[jax.Array]:
    """Return the rows of one domain of a joint batch, which has those of one domain after another."""
    count = batch.tokens.shape[0] // domains
    return jax.tree.map(lambda array: array[domain * count : (domain + 1) * count], batch)


@functools.partial(turns.jit, static_argnums=(0, 3, 4))
def _hidden(config: ModelConfig, params: Tree, batch: Batch[jax.Array], dtype: str, remat: Remat) -> jax.Array:
    """Return the final hidden states [B, T, D] in `dtype`."""
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    model = qwen2.Qwen2(config, jnp.dtype(dtype), remat)
    hidden: Any = model.apply({"params": weights}, batch.tokens, batch.segment_ids, None)[0]
    return hidden


@functools.partial(turns.jit, static_argnums=range(4))
def _step(
    config: ModelConfig, dtype: str, remat: Remat, temperature: float, params: Tree, moments: Any, moving: Tree,
    batch: Batch[jax.Array], hidden: list[jax.Array], heads: list[jax.Array], rate: jax.Array,
) -> tuple[Tree, Any]:  # fmt: skip
    """Compute one step of Adam. hidden, heads: of every domain's teacher; moving: which leaves may change."""

    def divergence(candidate: Tree) -> jax.Array:
        held = jax.tree.map(lambda m, leaf: jnp.where(m, leaf, jax.lax.stop_gradient(leaf)), moving, candidate)
        states = _hidden(config, held, batch, dtype, remat)
        head = qwen2.head_weight(config, held).astype(dtype)
        _, targets = loss.next_token_targets(batch)
        total = jnp.float32(0)
        for domain, (teacher, teacher_head) in enumerate(zip(hidden, heads, strict=True)):
            rows = slice(domain * len(teacher), (domain + 1) * len(teacher))
            weights = targets[rows] / jnp.maximum(jnp.sum(targets[rows]), 1.0) / len(hidden)
            total += divergence_sum(states[rows], head, teacher, teacher_head, weights, temperature)
        return total

    updates, moments = _ADAM.update(jax.grad(divergence)(params), moments)
    return jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates), moments


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def divergence_sum(
    h_BTD: jax.Array, w_DV: jax.Array, teacher_BTD: jax.Array, teacher_DV: jax.Array, weights_BT: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Compute the sum of weights * KL(teacher || student) in nats, a float32 scalar.

    Both distributions are softmax(logits / temperature), and the sum is multiplied by temperature squared, as in
    arXiv 1503.02531. Logits are made chunk by chunk of the vocabulary, and again in the backward pass. There is a
    gradient for the student's hidden states and head, none for the teacher's.

    Arguments:
        h_BTD, w_DV: hidden states and head of the student; logits are their product, accumulated in float32.
        teacher_BTD, teacher_DV: those of the teacher.
        weights_BT: float32 weights of the positions.
    """
    return _forward(h_BTD, w_DV, teacher_BTD, teacher_DV, weights_BT, temperature)[0]


def _chunks(tokens: int, *heads: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Split heads [D, V] into chunks of the vocabulary.

    Returns each head as [C, D, v], zeros filling up the last chunk, and which of the columns are real, [C, v].
    """
    vocab = heads[0].shape[1]
    count = -(-vocab * tokens // CHUNK_ELEMENTS)
    size = -(-vocab // count)
    split = [
        jnp.pad(head, ((0, 0), (0, count * size - vocab))).reshape(-1, count, size).swapaxes(0, 1) for head in heads
    ]
    return split, (jnp.arange(count * size) < vocab).reshape(count, size)


def _logits(h_ND: jax.Array, w_Dv: jax.Array, real_v: jax.Array, temperature: float) -> jax.Array:
    z_Nv = jnp.einsum("nd,dv->nv", h_ND, w_Dv, preferred_element_type=jnp.float32) / temperature
    return jnp.where(real_v, z_Nv, _OUTSIDE)


def _forward(h_BTD, w_DV, teacher_BTD, teacher_DV, weights_BT, temperature: float) -> Any:
    h, teacher, weights = (x.reshape(-1, *x.shape[2:]) for x in (h_BTD, teacher_BTD, weights_BT))
    heads, real = _chunks(len(h), w_DV, teacher_DV)

    def add_chunk(sums: Any, chunk: Any) -> Any:
        # Largest logits and sums of exponentials of both models so far [N], and the teacher's sum of
        # exponential * (its logit - the student's).
        largest, total, teacher_largest, teacher_total, gap = sums
        w, teacher_w, real = chunk
        z, teacher_z = _logits(h, w, real, temperature), _logits(teacher, teacher_w, real, temperature)
        top, teacher_top = jnp.maximum(largest, z.max(-1)), jnp.maximum(teacher_largest, teacher_z.max(-1))
        total = total * jnp.exp(largest - top) + jnp.exp(z - top[:, None]).sum(-1)
        e = jnp.exp(teacher_z - teacher_top[:, None])
        shrink = jnp.exp(teacher_largest - teacher_top)
        gap = gap * shrink + (e * (teacher_z - z)).sum(-1)
        return (top, total, teacher_top, teacher_total * shrink + e.sum(-1), gap), None

    least, zero = jnp.full(len(h), _OUTSIDE), jnp.zeros(len(h))
    sums, _ = jax.lax.scan(add_chunk, (least, zero, least, zero, zero), (*heads, real))
    largest, total, teacher_largest, teacher_total, gap = sums
    normalizer, teacher_normalizer = largest + jnp.log(total), teacher_largest + jnp.log(teacher_total)
    divergence = gap / teacher_total - teacher_normalizer + normalizer
    saved = (h_BTD, w_DV, teacher_BTD, teacher_DV, weights_BT, normalizer, teacher_normalizer)
    return temperature**2 * jnp.sum(weights * divergence), saved


def _backward(temperature: float, saved: Any, g: jax.Array) -> Any:
    h_BTD, w_DV, teacher_BTD, teacher_DV, weights_BT, normalizer, teacher_normalizer = saved
    h, teacher, weights = (x.reshape(-1, *x.shape[2:]) for x in (h_BTD, teacher_BTD, weights_BT))
    heads, real = _chunks(len(h), w_DV, teacher_DV)

    def add_chunk(dh: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        w, teacher_w, real = chunk
        p = jnp.exp(_logits(h, w, real, temperature) - normalizer[:, None])
        teacher_p = jnp.exp(_logits(teacher, teacher_w, real, temperature) - teacher_normalizer[:, None])
        dz = ((p - teacher_p) * (temperature * g * weights)[:, None]).astype(h.dtype)
        dh += jnp.einsum("nv,dv->nd", dz, w, preferred_element_type=jnp.float32)
        return dh, jnp.einsum("nd,nv->dv", h, dz, preferred_element_type=jnp.float32)

    dh, dw = jax.lax.scan(add_chunk, jnp.zeros(h.shape, jnp.float32), (*heads, real))  # dw [C, D, v]
    dw_DV = dw.swapaxes(0, 1).reshape(w_DV.shape[0], -1)[:, : w_DV.shape[1]]
    return dh.reshape(h_BTD.shape).astype(h_BTD.dtype), dw_DV.astype(w_DV.dtype), None, None, None


divergence_sum.defvjp(_forward, _backward)
