"""Model stock: how far to go from the base to the mean of the models, from the angle between them."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.linear import shares, weights_sum
from bmjax.merge.methods.method import About, Block, Merged, PerModel, Tensor, add, deltas, method, moved
from bmjax.merge.methods.spherical import products


@method("model_stock", base="required", branches=(2, None), check=weights_sum, by_row=True)
def model_stock(
    t: Tensor,
    *,
    weight: Annotated[PerModel, About("the model's share of the mean", per_model=True)] = (1.0,),
    filter_wise: Annotated[bool, About("an angle for every row instead of one for the tensor")] = False,
) -> Merged:
    """base + ratio * (mean of the models - base), arXiv 2403.19522.

    With c the mean cosine between the models' changes and s the sum of the squared shares (1 / N for equal weights),
    ratio = c / (c + s (1 - c)): the paper's N c / (1 + (N - 1) c), for weights that differ the same projection of the
    changes' common part. 0 where that has no value; a change of nothing has cosine 0 with every other.
    """
    part = shares(weight)
    spread = sum(share**2 for share in part)
    if filter_wise:
        return t.map(_by_row, part, spread)
    ratio = _ratio(products(t, "base"), spread)
    return t.map(moved, [ratio * share for share in part])


def _ratio(gram: np.ndarray, spread: float) -> float:
    lengths = np.sqrt(np.diag(gram))
    pairs = [(i, j) for i in range(len(lengths)) for j in range(i + 1, len(lengths))]
    norms = [lengths[i] * lengths[j] for i, j in pairs]
    return float(_projection(np, [gram[i, j] for i, j in pairs], norms, spread))


def _projection(xp: Any, dots: Sequence[Any], norms: Sequence[Any], spread: Any) -> Any:
    """Compute the ratio from the products of all pairs of changes and of their lengths. xp: numpy or jax.numpy."""
    pairs = zip(dots, norms, strict=True)
    cosines = [xp.where(n > 0, xp.clip(d / xp.where(n > 0, n, 1.0), -1.0, 1.0), 0.0) for d, n in pairs]
    cosine = add(cosines) / len(cosines)
    divisor = cosine + spread * (1.0 - cosine)
    some = xp.abs(divisor) > 1e-6 * spread
    return xp.where(some, cosine / xp.where(some, divisor, 1.0), 0.0)


def _by_row(x: Block, part: Array, spread: Array) -> tuple[Array, None]:
    changes = deltas(x)

    def product(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    lengths = [jnp.sqrt(product(c, c)) for c in changes]
    pairs = [(i, j) for i in range(len(changes)) for j in range(i + 1, len(changes))]
    dots = [product(changes[i], changes[j]) for i, j in pairs]
    ratio = _projection(jnp, dots, [lengths[i] * lengths[j] for i, j in pairs], spread)
    return x.base + ratio * add([p * c for p, c in zip(part, changes, strict=True)]), None
