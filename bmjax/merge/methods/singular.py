"""Merges of the singular vectors of changes: for matrices; a vector's changes are added.

Singular vectors belong to a whole matrix, so here memory grows with the largest one (a dozen float32 copies of it for
three models).
"""

from collections.abc import Sequence
from typing import Annotated

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, deltas, dot
from bmjax.merge.methods.method import About, Merged, Rebase, Scale, Tensor, Weight, method

Share = Annotated[float, About("share of the rank that all models together get", least=0, most=1)]


@method("isotropic", base="required", branches=(1, None), by_row=True)
def isotropic(t: Tensor, *, weight: Weight = (1.0,), lambda_: Scale = 1.0, rebase: Rebase = None) -> Merged:
    """Iso-C, arXiv 2502.04959: of the sum of the changes, sum(weight * (model - base)), all singular values become
    their mean, so that no model's directions outweigh another's. base + lambda * mean singular value * U V^T."""
    if t.vector:
        return t.map(_added, weight, lambda_)
    return t.map(_plus, t.whole(_flattened, weight), lambda_)


@method("tsv", base="required", branches=(1, None), by_row=True)
def tsv(
    t: Tensor, *, weight: Weight = (1.0,), rank: Share = 1.0, lambda_: Scale = 1.0, rebase: Rebase = None
) -> Merged:
    """TSV-Merge, arXiv 2412.00081: each change is cut to its largest singular values, rank / number of models of them;
    the models' singular vectors, side by side, are replaced by the nearest orthonormal ones (Procrustes), so that the
    models do not interfere; base + lambda * U S V^T."""
    if t.vector:
        return t.map(_added, weight, lambda_)
    return t.map(_plus, t.whole(_uncrossed, weight, rank=rank), lambda_)


def _plus(x: Block, change: Array, lambda_: Array) -> tuple[Array, None]:
    return x.base + lambda_ * change, None


def _added(x: Block, weight: Array, lambda_: Array) -> tuple[Array, None]:
    return _plus(x, dot(weight, deltas(x)), lambda_)


def _flattened(x: Block, weight: Array) -> Array:
    change = dot(weight, deltas(x))
    left, values, right = jnp.linalg.svd(change, full_matrices=False)
    # A direction in which nothing changed has no singular vector.
    some = values > values[0] * change.shape[0] * jnp.finfo(jnp.float32).eps
    return jnp.mean(values) * (left * some) @ right


def _uncrossed(x: Block, weight: Array, *, rank: float) -> Array:
    kept = max(1, int(rank * min(x.base.shape)) // len(x.branches))
    parts = [jnp.linalg.svd(w * d, full_matrices=False) for w, d in zip(weight, deltas(x), strict=True)]
    values = jnp.concatenate([s[:kept] for _, s, _ in parts])
    left = _orthonormal([u[:, :kept] for u, _, _ in parts])
    right = _orthonormal([v[:kept].T for _, _, v in parts])
    return (left * values) @ right.T


def _orthonormal(parts: Sequence[Array]) -> Array:
    """Return the orthonormal columns nearest to these, side by side."""
    left, _, right = jnp.linalg.svd(jnp.concatenate(parts, axis=1), full_matrices=False)
    return left @ right
