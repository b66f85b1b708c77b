"""Learns coefficients by gradient descent through the merge and the model, and polishes the result by joint steps.

student = base + sum_b coefficient_b * contribution_b; one coefficient for each branch and output row (or tensor). The
loss is the mean over domains of nats a target token.
"""

from collections.abc import Sequence
from functools import lru_cache
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
from bmjax.model.spec import Param, unflatten

BETAS = (0.9, 0.95)


def coefficients(config: ModelConfig, start: float, per: str) -> Tree:
    """Return one branch's coefficients, float32, of shapes that broadcast over the parameters.

    per: "row" or "tensor"; an output row is a kernel's last axis.
    """
    return unflatten([(row.path, jnp.full(_shape(row, per), start, jnp.float32)) for row in spec.table(config)])


def _shape(row: Param, per: str) -> tuple[int, ...]:
    kept = (0,) if row.stacked else ()
    if per == "row" and row.is_matrix:
        kept = (*kept, len(row.shape) - (1 if row.transposed else 2))
    return tuple(size if axis in kept else 1 for axis, size in enumerate(row.shape))


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


@lru_cache(maxsize=8)
def _judge(config: ModelConfig, dtype: str) -> Any:
    return jax.jit(lambda params, batch: _nats(config, params, batch, 1, dtype, "none"))


def held_out_losses(config: ModelConfig, params: Tree, calibration: Calibration, dtype: str) -> list[float]:
    """Return the nats a target token of each domain's held-out documents."""
    return [float(_judge(config, dtype)(params, batch)) for batch in calibration.judged()]


@lru_cache(maxsize=8)
def _coefficient_step(config: ModelConfig, domains: int, dtype: str, remat: Remat) -> Any:
    tx = optax.scale_by_adam(*BETAS)

    def step(
        factors: Any, moments: Any, base: Tree, parts: Any, batch: Batch[jax.Array], rate: jax.Array
    ) -> tuple[Any, Any]:
        def nats(candidate: Any) -> jax.Array:
            return _nats(config, merged(base, parts, candidate), batch, domains, dtype, remat)

        updates, moments = tx.update(jax.grad(nats)(factors), moments)
        return jax.tree.map(lambda k, u: k - rate * u, factors, updates), moments

    return tx, jax.jit(step, donate_argnums=(0, 1))


def learn(
    config: ModelConfig, base: Tree, parts: Sequence[Tree], calibration: Calibration, settings: CalibrationSettings
) -> list[Tree]:
    """Return the branches' coefficients after `settings.steps` steps of Adam."""
    factors = [coefficients(config, settings.start, settings.per) for _ in parts]
    tx, step = _coefficient_step(config, len(parts), settings.compute_dtype, settings.remat)
    moments = tx.init(factors)
    for number in range(settings.steps):
        batch = calibration.joint(number, "learning")
        rate = settings.learning_rate * (1 - number / settings.steps)
        factors, moments = step(factors, moments, base, parts, batch, np.float32(rate))
    return factors


@lru_cache(maxsize=8)
def _polish_step(config: ModelConfig, domains: int, dtype: str, remat: Remat) -> Any:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(*BETAS))

    def step(params: Tree, moments: Any, moving: Tree, batch: Batch[jax.Array], rate: jax.Array) -> tuple[Tree, Any]:
        gradient = jax.grad(lambda p: _nats(config, p, batch, domains, dtype, remat))(params)
        gradient = jax.tree.map(lambda g, m: jnp.where(m, g, 0.0), gradient, moving)
        updates, moments = tx.update(gradient, moments)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments

    return tx, jax.jit(step)


def polish(
    config: ModelConfig, params: Tree, parts: Sequence[Tree], calibration: Calibration, settings: CalibrationSettings
) -> Tree:
    """Return `params` after `settings.polish` joint steps of Adam. Leaves that no branch changed stay as they are."""
    moving = jax.tree.map(lambda *leaves: jnp.stack([jnp.any(leaf != 0) for leaf in leaves]).any(), *parts)
    tx, step = _polish_step(config, len(parts), settings.compute_dtype, settings.remat)
    moments = tx.init(params)
    for number in range(settings.polish):
        batch = calibration.joint(settings.steps + number, "polishing")
        rate = settings.polish_rate * (1 - number / settings.polish)
        params, moments = step(params, moments, moving, batch, np.float32(rate))
    return params
