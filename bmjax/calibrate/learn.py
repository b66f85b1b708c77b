"""Learns coefficients by gradient descent through the merge and the model, and polishes the result by joint steps.

student = base + sum_b coefficient_b * contribution_b; one coefficient for each branch and output row (or entry, or
tensor). The loss is the mean over domains of nats a target token. Each step goes forward over the parts of the models
with the states before every part on disk, and backward over them, so one part of every model is in memory. polish
trains all weights and holds them and their moments in memory.
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
from bmjax.calibrate.models import Tree, whole
from bmjax.calibrate.programs import Shares, cast, layer, merge, merge_part, pull_back_layer
from bmjax.calibrate.programs import embed as embed_tokens
from bmjax.calibrate.walk import Contributions, Work
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


@turns.jit
def _update(factors: Factors, moments: Any, gradients: Factors, rate: jax.Array) -> tuple[Factors, Any]:
    updates, moments = _ADAM.update(gradients, moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, factors, updates), moments


def gradient(work: Work, factors: Factors, batch: Batch[jax.Array]) -> Factors:
    """Return the gradient of a joint batch's loss by the coefficients of all parts."""
    config, models, dtype = work.models.config, work.models, jnp.dtype(work.p.compute_dtype)
    last = config.num_layers + 1
    trace = Hidden(work.folder, "learning", [batch], config.hidden_size, dtype, models.mesh, kept=last + 1)

    def merged(part: int) -> Tree:
        loaded = models.load(part)
        shares = work.contributions.shares(part, loaded)
        return merge_part(parts.rows(config, part), loaded, shares, factors[part], dtype, models.mesh)

    # Forward to the head.
    x = embed_tokens(config, merged(0), batch.tokens, dtype)
    for part in range(1, last):
        trace.write(part, 0, x)
        x = layer(config, merged(part), x, batch.segment_ids, parts.window(config, part))
    # Backward from the head. A tied head's gradient goes to the coefficients of the embedding.
    gradients: Factors = [[] for _ in factors]
    head = [last, 0] if config.tied else [last]
    of_head, dx = _pull_back_head(
        config, dtype, len(models.branches), [_of_part(work.contributions, work, part) for part in head],
        [factors[part] for part in head], x, batch,
    )  # fmt: skip
    gradients[last] = of_head[0]
    for part in reversed(range(1, last)):
        paths, loaded, shares = _of_part(work.contributions, work, part)
        gradients[part], dx = pull_back_layer(
            config, paths, dtype, loaded, shares, factors[part], trace.read(part, 0), batch,
            parts.window(config, part), dx,
        )  # fmt: skip
    gradients[0] = _pull_back_embedding(config, dtype, *_of_part(work.contributions, work, 0), factors[0], batch, dx)
    if config.tied:
        gradients[0] = jax.tree.map(jnp.add, gradients[0], of_head[1])
    return gradients


def _of_part(contributions: Contributions, work: Work, part: int) -> tuple[Any, list[Tree], Shares]:
    loaded = [whole(params) for params in work.models.load(part)]
    return work.paths(part), loaded, contributions.shares(part, loaded)


def _pull_back_head(
    config: ModelConfig, dtype: Any, domains: int, of_parts: Sequence[Any], factors: Any, x_BTD: jax.Array,
    batch: Batch[jax.Array],
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Return the gradients by the head's coefficients, part by part of those that it reads, and by its input."""
    paths = tuple(paths for paths, _, _ in of_parts)
    arrays = [(loaded, shares) for _, loaded, shares in of_parts]
    return _head_gradients(config, dtype, domains, paths, arrays, factors, x_BTD, batch)


@functools.partial(turns.jit, static_argnums=range(4))
def _head_gradients(
    config: ModelConfig, dtype: Any, domains: int, paths: Any, of_parts: Any, factors: Any, x_BTD: jax.Array,
    batch: Batch[jax.Array],
) -> tuple[Any, jax.Array]:  # fmt: skip
    def run(factors: Any, x_BTD: jax.Array) -> jax.Array:
        params: Tree = {}
        for names, (loaded, shares), of_part in zip(paths, of_parts, factors, strict=True):
            params |= cast(dtype, merge(names, loaded, shares, of_part))
        return parts.weighted_loss(config, params, x_BTD, *targets_by_domain(batch, domains))

    return jax.grad(run, argnums=(0, 1))(factors, x_BTD)


@functools.partial(turns.jit, static_argnums=(0, 1, 2))
def _pull_back_embedding(
    config: ModelConfig, dtype: Any, paths: Any, models: Any, shares: Any, factors: Any, batch: Batch[jax.Array],
    dx_BTD: jax.Array,
) -> list[Tree]:  # fmt: skip
    def run(factors: Any) -> jax.Array:
        return parts.embed(config, cast(dtype, merge(paths, models, shares, factors)), batch.tokens, dtype)

    gradients: list[Tree] = jax.vjp(run, factors)[1](dx_BTD)[0]
    return gradients


def _nats(
    config: ModelConfig, params: Tree, batch: Batch[jax.Array], domains: int, dtype: str, remat: Remat
) -> jax.Array:
    """Return the mean over domains of nats a target token; the batch's rows are those of one domain after another."""
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    model = qwen2.Qwen2(config, jnp.dtype(dtype), remat)
    hidden: Any = model.apply({"params": weights}, batch.tokens, batch.segment_ids, None)[0]
    labels, shares = targets_by_domain(batch, domains)
    return loss.cross_entropy_sum(hidden, qwen2.head_weight(config, weights), labels, shares)


_judge = turns.jit(_nats, static_argnums=(0, 3, 4, 5))


def held_out_losses(config: ModelConfig, params: Tree, calibration: Calibration, dtype: str) -> list[float]:
    """Return the nats a target token of each domain's held-out documents, under a model that is whole in memory."""
    return [float(_judge(config, params, batch, 1, dtype, "none")) for batch in calibration.judged()]


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
        return _nats(config, held, batch, domains, dtype, remat)

    updates, moments = _CLIPPED_ADAM.update(jax.grad(nats)(params), moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, params, updates), moments
