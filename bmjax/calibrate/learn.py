"""Learns coefficients by gradient descent through the merge and the model, and polishes the result by joint steps.

student = base + sum_b coefficient_b * contribution_b; one coefficient for each branch and output row (or tensor). The
loss is the mean over domains of nats a target token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.calibrate.contributions import Tree
from bmjax.calibrate.data import Calibration
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import loss, qwen2, spec
from bmjax.model.attention.options import Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import unflatten

_ADAM = optax.scale_by_adam(0.9, 0.95)
_CLIPPED_ADAM = optax.chain(optax.clip_by_global_norm(1.0), _ADAM)


def coefficients(config: ModelConfig, start: float, per: str) -> Tree:
    """Return one branch's coefficients, float32, of shapes that broadcast over the parameters.

    per: "row" or "tensor"; an output row is a kernel's last axis.
    """
    leaves = []
    for row in spec.table(config):
        kept = {0} if row.stacked else set()
        if per == "row" and row.is_matrix:
            kept.add(len(row.shape) - (1 if row.transposed else 2))
        shape = [size if axis in kept else 1 for axis, size in enumerate(row.shape)]
        leaves.append((row.path, jnp.full(shape, start, jnp.float32)))
    return unflatten(leaves)


@jax.jit
def merged(base: Tree, parts: Sequence[Tree], factors: Sequence[Tree]) -> Tree:
    """Return base + sum of factor * part, float32."""

    def add(leaf: jax.Array, *rest: jax.Array) -> jax.Array:
        pairs = zip(rest[: len(parts)], rest[len(parts) :], strict=True)
        return leaf.astype(jnp.float32) + sum(part * factor for part, factor in pairs)

    return jax.tree.map(add, base, *parts, *factors)


def _nats(
    config: ModelConfig, params: Tree, batch: Batch[jax.Array], domains: int, dtype: str, remat: Remat
) -> jax.Array:
    """Return the mean over domains of nats a target token; the batch's rows are those of one domain after another."""
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    model = qwen2.Qwen2(config, jnp.dtype(dtype), remat)
    hidden: Any = model.apply({"params": weights}, batch.tokens, batch.segment_ids, None)[0]
    labels, targets = loss.next_token_targets(batch)
    by_domain = targets.reshape(domains, -1)
    counts = jnp.maximum(jnp.sum(by_domain, axis=1, keepdims=True), 1.0)
    shares = (by_domain / counts / domains).reshape(targets.shape)
    return loss.cross_entropy_sum(hidden, qwen2.head_weight(config, weights), labels, shares)


_judge = jax.jit(_nats, static_argnums=(0, 3, 4, 5))


def held_out_losses(config: ModelConfig, params: Tree, calibration: Calibration, dtype: str) -> list[float]:
    """Return the nats a target token of each domain's held-out documents."""
    return [float(_judge(config, params, batch, 1, dtype, "none")) for batch in calibration.judged()]


def learn(
    config: ModelConfig, base: Tree, parts: Sequence[Tree], calibration: Calibration, p: CalibrationSettings
) -> list[Tree]:
    """Return the branches' coefficients after `p.steps` steps of Adam."""
    factors = [coefficients(config, p.start, p.per) for _ in parts]
    moments = _ADAM.init(factors)
    options = (config, len(parts), p.compute_dtype, p.remat)
    for number in range(p.steps):
        batch = calibration.joint(number, "learning")
        rate = np.float32(p.learning_rate * (1 - number / p.steps))
        factors, moments = _step(_ADAM, merged, *options, factors, moments, (base, parts), batch, rate)
    return factors


def polish(
    config: ModelConfig, params: Tree, parts: Sequence[Tree], calibration: Calibration, p: CalibrationSettings
) -> Tree:
    """Return `params` after `p.polish` joint steps of Adam. Leaves that no branch changed stay as they are."""
    moving = jax.tree.map(lambda *leaves: jnp.stack([jnp.any(leaf != 0) for leaf in leaves]).any(), *parts)
    moments = _CLIPPED_ADAM.init(params)
    options = (config, len(parts), p.compute_dtype, p.remat)
    for number in range(p.polish):
        batch = calibration.joint(p.steps + number, "polishing")
        rate = np.float32(p.polish_rate * (1 - number / p.polish))
        params, moments = _step(_CLIPPED_ADAM, _held, *options, params, moments, (moving,), batch, rate)
    return params


def _held(moving: Tree, params: Tree) -> Tree:
    """Return the parameters, those that do not move as constants."""
    return jax.tree.map(lambda m, leaf: jnp.where(m, leaf, jax.lax.stop_gradient(leaf)), moving, params)


@functools.partial(jax.jit, static_argnums=range(6))
def _step(
    tx: optax.GradientTransformation, weights_of: Callable[..., Tree], config: ModelConfig, domains: int, dtype: str,
    remat: Remat, variables: Any, moments: Any, fixed: Any, batch: Batch[jax.Array], rate: jax.Array,
) -> tuple[Any, Any]:  # fmt: skip
    """Compute one step of `tx` on variables, of which `weights_of(*fixed, variables)` makes the weights."""

    def nats(candidate: Any) -> jax.Array:
        return _nats(config, weights_of(*fixed, candidate), batch, domains, dtype, remat)

    updates, moments = tx.update(jax.grad(nats)(variables), moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, variables, updates), moments
