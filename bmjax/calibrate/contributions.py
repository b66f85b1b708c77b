"""Computes each model's contribution to a mean of the changes; their sum is the mean.

changes: change / N. regmean: the solution of min_W sum_b |X_b (W - change_b)|^2 (arXiv 2212.09849, applied to changes),
model b's part of it (sum_j G_j)^-1 G_b change_b with G_b = X_b^T X_b, for every matrix; changes / N for the rest.
fisher: F_b change_b / sum_j F_j with mean squared gradients F (arXiv 2111.09832), each over its mean in the tensor.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate.data import Calibration
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import qwen2, spec
from bmjax.model.attention.options import Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get, unflatten

Tree = dict[str, Any]
# Linear layers that read the same input: it is looked at once.
SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


def contributions(
    config: ModelConfig, base: Tree, branches: Sequence[Tree], calibration: Calibration, p: CalibrationSettings
) -> list[Tree]:
    """Return one tree a branch, float32, placed as the branch's leaves are."""
    plain = [_plain(base, branch, len(branches)) for branch in branches]
    if p.along == "changes":
        return plain
    # What the rows of each domain say about its model.
    measured: list[Any] = []
    for i, branch in enumerate(branches):
        if p.along == "fisher":
            batches = calibration.rows(i, p.rows, "squares")
            measured.append(squares(config, branch, batches, p.compute_dtype, p.remat))
        else:
            measured.append(grams(config, branch, calibration.rows(i, p.rows, "grams"), p.compute_dtype))
    # The contributions, parameter by parameter.
    by_row = []
    for row in spec.table(config):
        leaves = [get(tree, row.path) for tree in plain]
        if p.along == "fisher":
            axes = tuple(range(1, len(row.shape))) if row.stacked else None
            leaves = _weighted(leaves, [get(tree, row.path) for tree in measured], axes)
        elif row.stacked and row.path[-1] == "kernel":
            name = SAME_INPUT.get(row.path[-2], row.path[-2])
            leaves = _regmean(leaves, [by_name[name] for by_name in measured], p.off_diagonal, p.ridge)
        by_row.append([(row.path, leaf) for leaf in leaves])
    return [unflatten(list(branch)) for branch in zip(*by_row, strict=True)]


@jax.jit
def _plain(base: Tree, branch: Tree, count: int) -> Tree:
    return jax.tree.map(lambda w, b: (w.astype(jnp.float32) - b.astype(jnp.float32)) / count, branch, base)


def _regmean(leaves: Sequence[jax.Array], grams: Sequence[np.ndarray], off_diagonal: float, ridge: float) -> list[Any]:
    """Return the contributions [L, in, out] to a matrix, by Gram matrices [L, in, in]; float64, layer by layer."""
    parts = [np.empty(leaf.shape, np.float32) for leaf in leaves]
    for layer in range(leaves[0].shape[0]):
        scaled = [off_diagonal * g[layer] + (1 - off_diagonal) * np.diag(np.diag(g[layer])) for g in grams]
        total = np.sum(scaled, axis=0)
        total += (ridge * np.trace(total) / len(total) or 1e-30) * np.eye(len(total))
        changes = [len(leaves) * np.asarray(leaf[layer], np.float64) for leaf in leaves]
        right = np.concatenate([g @ c for g, c in zip(scaled, changes, strict=True)], axis=1)
        solved = np.split(np.linalg.solve(total, right), len(leaves), axis=1)
        for part, solution in zip(parts, solved, strict=True):
            part[layer] = solution
    return [jax.device_put(part, leaf.sharding) for part, leaf in zip(parts, leaves, strict=True)]


def grams(config: ModelConfig, params: Tree, batches: Iterator[Batch[jax.Array]], dtype: str) -> dict[str, np.ndarray]:
    """Return the mean of x x^T over the inputs x of the linear layers at real tokens.

    float64 [L, in, in] by the layer's name: q, o, gate, down.
    """
    total, count = None, 0.0
    for batch in batches:
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), _gram_sums(config, dtype, params, batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        count += float(jnp.sum(batch.segment_ids > 0))
    assert total is not None  # a loader has a row at least
    layers = total["layers"]
    return {name: layers[part][name]["input"] / count for part in layers for name in layers[part]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gram_sums(config: ModelConfig, dtype: str, params: Tree, batch: Batch[jax.Array]) -> Any:
    tokens, segments = batch.tokens, batch.segment_ids
    real = (segments > 0).astype(jnp.float32)[..., None]

    def add_gram(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, qwen2.Linear) and context.method_name == "__call__" and module.name not in SAME_INPUT:
            x = args[0].astype(jnp.float32) * real
            gram = jnp.einsum("bti,btj->ij", x, x, preferred_element_type=jnp.float32)
            module.sow("grams", "input", gram, reduce_fn=lambda old, new: old + new, init_fn=lambda: 0.0)
        return call(*args, **kwargs)

    model = qwen2.Qwen2(config, jnp.dtype(dtype))
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    with nn.intercept_methods(add_gram):
        _, sown = model.apply({"params": weights}, tokens, segments, None, mutable=["grams"])
    return sown["grams"]


def squares(config: ModelConfig, params: Tree, batches: Iterator[Batch[jax.Array]], dtype: str, remat: Remat) -> Tree:
    """Return the sum over packed rows of the squared gradient of each row's summed loss, float32, as `params`."""
    total = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), params)
    for batch in batches:
        total = _add_squares(config, dtype, remat, params, batch, total)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _add_squares(
    config: ModelConfig, dtype: str, remat: Remat, params: Tree, batch: Batch[jax.Array], total: Tree
) -> Tree:
    def nats(params: Tree, row: Batch[jax.Array]) -> jax.Array:
        weights = jax.tree.map(lambda a: a.astype(dtype), params)
        return qwen2.loss_sum(qwen2.Qwen2(config, jnp.dtype(dtype), remat), weights, row)[0]

    def add_row(total: Tree, row: Batch[jax.Array]) -> tuple[Tree, None]:
        gradient = jax.grad(nats)(params, jax.tree.map(lambda array: array[None], row))
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, gradient), None

    return jax.lax.scan(add_row, total, batch)[0]


def _weighted(plain: list[jax.Array], squared: list[jax.Array], axes: tuple[int, ...] | None) -> list[jax.Array]:
    """Return contributions by squared gradients, each over its mean along `axes`; the plain ones where all are 0."""
    means = [jnp.mean(f, axis=axes, keepdims=True) for f in squared]
    shares = [f / jnp.where(m > 0, m, 1.0) for f, m in zip(squared, means, strict=True)]
    total = sum(shares)
    some = total > 0
    return [jnp.where(some, len(plain) * s / jnp.where(some, total, 1.0), 1.0) * p
            for s, p in zip(shares, plain, strict=True)]  # fmt: skip
