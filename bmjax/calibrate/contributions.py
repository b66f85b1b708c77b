"""Each model's contribution to a mean of the changes; their sum is the mean.

changes: change / N. regmean: the solution of min_W sum_b |X_b (W - change_b)|^2 (arXiv 2212.09849, applied to changes),
model b's part of it (sum_j G_j)^-1 G_b change_b with G_b = X_b^T X_b, for every matrix; changes / N for the rest.
fisher: F_b change_b / sum_j F_j with mean squared gradients F (arXiv 2111.09832), each over its mean in the tensor.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.recipe import CalibrationSettings
from bmjax.model import qwen2, spec
from bmjax.model.attention.options import Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get, unflatten

Tree = dict[str, Any]
# Linear layers that read the same input: it is looked at once.
SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


def contributions(
    config: ModelConfig, base: Tree, branches: Sequence[Tree], calibration: Calibration, settings: CalibrationSettings
) -> list[Tree]:
    """One tree a branch, float32, placed as the branch's leaves are."""
    dtype = jnp.dtype(settings.compute_dtype)
    plain = [_plain(base, branch, len(branches)) for branch in branches]
    if settings.along == "changes":
        return plain
    if settings.along == "fisher":
        found = [squares(config, b, calibration.rows(i, settings.rows, "squares"), dtype, settings.remat)
                 for i, b in enumerate(branches)]  # fmt: skip
    else:
        found = [grams(config, b, calibration.rows(i, settings.rows, "grams"), dtype) for i, b in enumerate(branches)]
    by_row = []
    for row in spec.table(config):
        leaves = [get(tree, row.path) for tree in plain]
        if settings.along == "fisher":
            axes = tuple(range(1, len(row.shape))) if row.stacked else None
            leaves = _weighted(leaves, [get(tree, row.path) for tree in found], axes)
        elif row.stacked and row.path[-1] == "kernel":
            name = SAME_INPUT.get(row.path[-2], row.path[-2])
            leaves = _regmean(leaves, [own[name] for own in found], settings.off_diagonal, settings.ridge)
        by_row.append([(row.path, leaf) for leaf in leaves])
    return [unflatten(list(branch)) for branch in zip(*by_row, strict=True)]


@jax.jit
def _plain(base: Tree, branch: Tree, count: int) -> Tree:
    return jax.tree.map(lambda w, b: (w.astype(jnp.float32) - b.astype(jnp.float32)) / count, branch, base)


def _regmean(leaves: Sequence[jax.Array], own: Sequence[np.ndarray], off_diagonal: float, ridge: float) -> list[Any]:
    """Contributions [L, in, out] of a matrix, by Gram matrices [L, in, in]; in float64, layer by layer."""
    parts = [np.empty(leaf.shape, np.float32) for leaf in leaves]
    for layer in range(leaves[0].shape[0]):
        scaled = [off_diagonal * g[layer] + (1 - off_diagonal) * np.diag(np.diag(g[layer])) for g in own]
        total = np.sum(scaled, axis=0)
        total += (ridge * np.trace(total) / len(total) or 1e-30) * np.eye(len(total))
        changes = [len(leaves) * np.asarray(leaf[layer], np.float64) for leaf in leaves]
        right = np.concatenate([g @ c for g, c in zip(scaled, changes, strict=True)], axis=1)
        solved = np.split(np.linalg.solve(total, right), len(leaves), axis=1)
        for part, one in zip(parts, solved, strict=True):
            part[layer] = one
    return [jax.device_put(part, leaf.sharding) for part, leaf in zip(parts, leaves, strict=True)]


def grams(config: ModelConfig, params: Tree, batches: Iterator[Batch[jax.Array]], dtype: Any) -> dict[str, np.ndarray]:
    """Mean of x x^T over the real tokens' inputs x of the linear layers, by name (q, o, gate, down): [L, in, in]."""
    run, total, count = _grams(config, np.dtype(dtype).name), None, 0.0
    for batch in batches:
        own = jax.tree.map(lambda a: np.asarray(a, np.float64), run(params, batch.tokens, batch.segment_ids))
        total = own if total is None else jax.tree.map(np.add, total, own)
        count += float(jnp.sum(batch.segment_ids > 0))
    assert total is not None  # a loader has a row at least
    layers = total["layers"]
    return {name: layers[part][name]["input"] / count for part in layers for name in layers[part]}


@lru_cache(maxsize=8)
def _grams(config: ModelConfig, dtype: str) -> Any:
    def run(params: Tree, tokens: jax.Array, segments: jax.Array) -> Any:
        real = (segments > 0).astype(jnp.float32)[..., None]

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if isinstance(module, qwen2.Linear) and context.method_name == "__call__" and module.name not in SAME_INPUT:
                x = args[0].astype(jnp.float32) * real
                own = jnp.einsum("bti,btj->ij", x, x, preferred_element_type=jnp.float32)
                module.sow("grams", "input", own, reduce_fn=lambda old, new: old + new, init_fn=lambda: 0.0)
            return call(*args, **kwargs)

        model = qwen2.Qwen2(config, jnp.dtype(dtype))
        own = jax.tree.map(lambda a: a.astype(dtype), qwen2.trunk(params))
        with nn.intercept_methods(look):
            _, found = model.apply(
                {"params": own}, tokens, segments, qwen2.default_positions(segments), mutable=["grams"]
            )
        return found["grams"]

    return jax.jit(run)


def squares(config: ModelConfig, params: Tree, batches: Iterator[Batch[jax.Array]], dtype: Any, remat: Remat) -> Tree:
    """Sum over packed rows of the squared gradient of each row's summed loss: the empirical Fisher information's
    diagonal but for a factor, float32, as `params`."""
    run, total = _squares(config, np.dtype(dtype).name, remat), None
    for batch in batches:
        total = run(params, batch, total)
    assert total is not None
    return total


@lru_cache(maxsize=8)
def _squares(config: ModelConfig, dtype: str, remat: Remat) -> Any:
    def nats(params: Tree, batch: Batch[jax.Array]) -> jax.Array:
        own = jax.tree.map(lambda a: a.astype(dtype), params)
        return qwen2.loss_sum(config, own, batch, dtype=jnp.dtype(dtype), remat=remat)[0]

    def run(params: Tree, batch: Batch[jax.Array], total: Tree | None) -> Tree:
        def one(carry: Tree, row: Batch[jax.Array]) -> tuple[Tree, None]:
            own = jax.grad(nats)(params, jax.tree.map(lambda array: array[None], row))
            return jax.tree.map(lambda c, g: c + jnp.square(g.astype(jnp.float32)), carry, own), None

        start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), params) if total is None else total
        return jax.lax.scan(one, start, batch)[0]

    return jax.jit(run)


def _weighted(plain: list[jax.Array], own: list[jax.Array], axes: tuple[int, ...] | None) -> list[jax.Array]:
    """Contributions by squared gradients `own`, each over its mean along `axes`; the plain ones where all are 0."""
    means = [jnp.mean(f, axis=axes, keepdims=True) for f in own]
    shares = [f / jnp.where(m > 0, m, 1.0) for f, m in zip(own, means, strict=True)]
    total = sum(shares)
    some = total > 0
    return [jnp.where(some, len(plain) * s / jnp.where(some, total, 1.0), 1.0) * p
            for s, p in zip(shares, plain, strict=True)]  # fmt: skip
