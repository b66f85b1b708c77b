"""Model stock: how far to go from the base to the mean of the models, from the angle between them."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, add, deltas, dot, moved
from bmjax.merge.methods.linear import shares, weights_sum
from bmjax.merge.methods.method import About, Merged, PerModel, Tensor, method
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
    gram = products(t, "base")
    ratio = float(_projection(np, lambda i, j: gram[i, j], t.branches, spread))
    return t.map(moved, [ratio * share for share in part])


def _projection(xp: Any, product: Callable[[int, int], Any], count: int, spread: Any) -> Any:
    """Compute the ratio. xp: numpy or jax.numpy. product: of two of the `count` changes, by their numbers."""
    lengths = [xp.sqrt(product(i, i)) for i in range(count)]
    pairs = [(product(i, j), lengths[i] * lengths[j]) for i in range(count) for j in range(i + 1, count)]
    cosines = [xp.where(n > 0, xp.clip(d / xp.where(n > 0, n, 1.0), -1.0, 1.0), 0.0) for d, n in pairs]
    cosine = add(cosines) / len(cosines)
    divisor = cosine + spread * (1.0 - cosine)
    some = xp.abs(divisor) > 1e-6 * spread
    return xp.where(some, cosine / xp.where(some, divisor, 1.0), 0.0)


def _by_row(x: Block, part: Array, spread: Array) -> tuple[Array, None]:
    changes = deltas(x)

    def product(i: int, j: int) -> Array:
        return jnp.sum(changes[i] * changes[j], axis=-1, keepdims=True)

    return x.base + _projection(jnp, product, len(changes), spread) * dot(part, changes), None
