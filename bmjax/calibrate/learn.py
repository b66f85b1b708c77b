"""Learns coefficients by gradient descent through the merge and the model, and polishes the result by joint steps.

student = base + sum_b coefficient_b * contribution_b; one coefficient for each branch and output row (or entry, or
tensor). The loss is the mean over domains of nats a target token. Each step goes forward over the parts of the models
with the states before every part on disk, and backward over them, so one layer of every model is in memory, or the
merged embedding or head with its gradient. polish trains all weights and holds them and their moments in memory.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.hidden import Hidden
from bmjax.calibrate.judge import Loss, by_document
from bmjax.calibrate.models import Tree
from bmjax.calibrate.programs import Shares, layer, merge_part, pull_back_layer, pull_back_part
from bmjax.calibrate.programs import embed as embed_tokens
from bmjax.calibrate.walk import Work
from bmjax.io.atomic import replacing_file
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import loss, parts, qwen2
from bmjax.model.attention.options import Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, unflatten
from bmjax.parallel import turns

_ADAM = optax.scale_by_adam(0.9, 0.95)
_CLIPPED_ADAM = optax.chain(optax.clip_by_global_norm(1.0), _ADAM)
Factors = list[list[Tree]]  # of every part, each branch's coefficients


def coefficients(rows: Sequence[Param], start: float, per: str) -> Tree:
    """Return one branch's coefficients, float32, of shapes that broadcast over the parameters of `rows`.

    per: "entry", "row" or "tensor"; an output row is a kernel's last axis. A vector has one coefficient, or as many as
    entries.
    """
    leaves = []
    for row in rows:
        kept = set(range(len(row.shape))) if per == "entry" else set()
        if per == "row" and row.is_matrix:
            kept.add(len(row.shape) - (1 if row.transposed else 2))
        shape = [size if axis in kept else 1 for axis, size in enumerate(row.shape)]
        leaves.append((row.path, jnp.full(shape, start, jnp.float32)))
    return unflatten(leaves)


def targets_by_domain(batch: Batch[jax.Array], domains: int) -> tuple[jax.Array, jax.Array]:
    """Return labels [B, T] and weights [B, T] whose weighted loss is the mean over domains of nats a target token.

    The batch's rows are those of one domain after another.
    """
    labels, targets = loss.next_token_targets(batch)
    by_domain = targets.reshape(domains, -1)
    counts = jnp.maximum(jnp.sum(by_domain, axis=1, keepdims=True), 1.0)
    return labels, (by_domain / counts / domains).reshape(targets.shape)


def learn(work: Work, calibration: Calibration) -> Factors:
    """Return the coefficients of all parts after `p.steps` steps of Adam. A killed run goes on after its last step."""
    p, config, models = work.p, work.models.config, work.models
    factors: Factors = [
        [coefficients(parts.rows(config, part), p.start, p.per) for _ in models.branches]
        for part in range(parts.count(config))
    ]
    state = (factors, _ADAM.init(factors))
    file, first = work.folder / "learned.npz", int(work.progress.get("learned/steps") or 0)
    if first:
        state = _restore(file, state, first)
    for number in range(p.steps):
        batch = calibration.joint(number, "learning")
        if number < first:
            continue
        gradients = gradient(work, state[0], batch)
        state = _update(*state, gradients, np.float32(p.learning_rate * (1 - number / p.steps)))
        _save(file.with_suffix(f".{number % 2}.npz"), state)
        work.progress.put("learned/steps", number + 1)
    return state[0]


def _save(file: Path, state: Any) -> None:
    with replacing_file(file) as out:
        np.savez(out, *(np.asarray(leaf) for leaf in jax.tree.leaves(state)))


def _restore(file: Path, state: Any, steps: int) -> Any:
    """Return the state after `steps` steps, in the structure of `state`."""
    with np.load(file.with_suffix(f".{(steps - 1) % 2}.npz")) as arrays:
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


@functools.partial(turns.jit, donate_argnums=(0, 1))
def _update(factors: Factors, moments: Any, gradients: Factors, rate: jax.Array) -> tuple[Factors, Any]:
    updates, moments = _ADAM.update(gradients, moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, factors, updates), moments


def gradient(work: Work, factors: Factors, batch: Batch[jax.Array]) -> Factors:
    """Return the gradient of a joint batch's loss by the coefficients of all parts."""
    config, models, dtype = work.models.config, work.models, jnp.dtype(work.p.compute_dtype)
    last = config.num_layers + 1
    trace = Hidden(work.folder, "learning", [batch], config.hidden_size, dtype, models.mesh, kept=last + 1)

    def read(part: int) -> tuple[list[Tree], Shares]:
        loaded = models.load(part)
        return loaded, work.contributions.shares(part, loaded)

    def merged(part: int) -> Tree:
        return merge_part(parts.rows(config, part), *read(part), factors[part], dtype, models.mesh)

    def pulled_back(part: int, of_merged: Tree) -> list[Tree]:
        return pull_back_part(parts.rows(config, part), *read(part), factors[part], of_merged, models.mesh)

    # Forward to the head.
    x = embed_tokens(config, merged(0), batch.tokens, dtype)
    for part in range(1, last):
        trace.write(part, 0, x)
        x = layer(config, merged(part), x, batch.segment_ids, parts.window(config, part))
    # Backward from the head. A tied head's gradient goes to the coefficients of the embedding.
    gradients: Factors = [[] for _ in factors]
    head = merged(last) | (merged(0) if config.tied else {})
    of_head, dx = _head_gradients(config, len(models.branches), head, x, batch)
    del head
    gradients[last] = pulled_back(last, of_head)
    of_tied = pulled_back(0, of_head) if config.tied else None
    del of_head
    for part in reversed(range(1, last)):
        gradients[part], dx = pull_back_layer(
            config, work.paths(part), dtype, *read(part), factors[part], trace.read(part, 0), batch,
            parts.window(config, part), dx,
        )  # fmt: skip
    gradients[0] = pulled_back(0, _embedding_gradient(config, dtype, batch, dx))
    if of_tied is not None:
        gradients[0] = _sum(gradients[0], of_tied)
    return gradients


@turns.jit
def _sum(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)


@functools.partial(turns.jit, static_argnums=(0, 1))
def _head_gradients(
    config: ModelConfig, domains: int, params: Tree, x_BTD: jax.Array, batch: Batch[jax.Array]
) -> tuple[Tree, jax.Array]:
    """Return the gradients of the loss by the merged parameters that the head reads, and by its input."""

    def run(params: Tree, x_BTD: jax.Array) -> jax.Array:
        return parts.weighted_loss(config, params, x_BTD, *targets_by_domain(batch, domains))

    gradients: tuple[Tree, jax.Array] = jax.grad(run, argnums=(0, 1))(params, x_BTD)
    return gradients


@functools.partial(turns.jit, static_argnums=(0, 1))
def _embedding_gradient(config: ModelConfig, dtype: Any, batch: Batch[jax.Array], dx_BTD: jax.Array) -> Tree:
    """Return the gradient of the merged embedding in `dtype`, from that of the first layer's input."""
    # The gradient of a lookup is the same for every table.
    params = unflatten((row.path, jnp.zeros(row.shape, dtype)) for row in parts.rows(config, 0))
    gradient: Tree = jax.vjp(lambda params: parts.embed(config, params, batch.tokens, dtype), params)[1](dx_BTD)[0]
    return gradient


def _hidden_and_head(
    config: ModelConfig, params: Tree, batch: Batch[jax.Array], dtype: str, remat: Remat
) -> tuple[jax.Array, jax.Array]:
    """Return the final hidden states [B, T, D] and the head [D, V], both in `dtype`."""
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    model = qwen2.Qwen2(config, jnp.dtype(dtype), remat)
    hidden: Any = model.apply({"params": weights}, batch.tokens, batch.segment_ids, None)[0]
    return hidden, qwen2.head_weight(config, weights)


@functools.partial(turns.jit, static_argnums=(0, 3))
def _losses_by_token(
    config: ModelConfig, params: Tree, batch: Batch[jax.Array], dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Return the loss at every position, and which positions are judged; both float32 [B, T]."""
    labels, mask = loss.next_token_targets(batch)
    return loss.cross_entropy_by_token(*_hidden_and_head(config, params, batch, dtype, "none"), labels), mask


def held_out_losses(config: ModelConfig, params: Tree, calibration: Calibration, dtype: str) -> list[Loss]:
    """Return the loss of each domain's held-out documents, under a model that is whole in memory."""
    losses = []
    for batch in calibration.judged():
        nats, mask = _losses_by_token(config, params, batch, dtype)
        losses.append(by_document(nats, mask, batch.segment_ids))
    return losses


@turns.jit
def moved_leaves(base: Tree, branch: Tree, known: Tree | None) -> Tree:
    """Return which parameters of a branch differ from the base's, or are `known` to differ in another: bool scalars."""
    moved = jax.tree.map(lambda start, leaf: jnp.any(leaf != start), base, branch)
    return moved if known is None else jax.tree.map(jnp.logical_or, known, moved)


def polish(
    config: ModelConfig, base: Tree, params: Tree, branches: Iterable[Tree], calibration: Calibration,
    p: CalibrationSettings,
) -> Tree:  # fmt: skip
    """Return `params` after `p.polish` joint steps of Adam. Leaves that no branch changed from `base` stay as they are.

    branches: their parameters; each is dropped before the next is asked for.
    """
    moving = None
    for branch in branches:
        moving = moved_leaves(base, branch, moving)
        del branch
    moments = _CLIPPED_ADAM.init(params)
    for number in range(p.polish):
        batch = calibration.joint(p.steps + number, "polishing")
        rate = np.float32(p.polish_rate * (1 - number / p.polish))
        params, moments = _step(config, len(calibration.loaders), p.compute_dtype, p.remat, params, moments, moving,
                                batch, rate)  # fmt: skip
    return params


@functools.partial(turns.jit, static_argnums=range(4))
def _step(
    config: ModelConfig, domains: int, dtype: str, remat: Remat, params: Tree, moments: Any, moving: Tree,
    batch: Batch[jax.Array], rate: jax.Array,
) -> tuple[Tree, Any]:  # fmt: skip
    """Compute one step of Adam on the parameters, those that do not move as constants."""

    def nats(candidate: Tree) -> jax.Array:
        held = jax.tree.map(lambda m, leaf: jnp.where(m, leaf, jax.lax.stop_gradient(leaf)), moving, candidate)
        return loss.cross_entropy_sum(
            *_hidden_and_head(config, held, batch, dtype, remat), *targets_by_domain(batch, domains)
        )

    updates, moments = _CLIPPED_ADAM.update(jax.grad(nats)(params), moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, params, updates), moments
