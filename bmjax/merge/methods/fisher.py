"""Means weighted by how much each model depends on an entry."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, add, deltas, dot
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import About, Merged, Rebase, Scale, Tensor, Weight, method


@method("fisher", base="required", branches=(1, None), check=weights_sum)
def fisher(
    t: Tensor,
    *,
    importance: Annotated[
        Sequence[str],
        About("directory with the model's importances, one for each entry, at least 0", per_model=True, model=True),
    ],
    weight: Weight = (1.0,),
    lambda_: Scale = 1.0,
    relative: Annotated[bool, About("divide a model's importances by their mean over the tensor")] = True,
    rebase: Rebase = None,
) -> Merged:
    """base + lambda * sum(weight * importance * (model - base)) / sum(weight * importance): Fisher-weighted averaging,
    arXiv 2111.09832, of the models' changes.

    `bmjax train` with `importances: true` leaves them in DIR/importances (Adam's second moment: an estimate of the
    Fisher information's diagonal at no cost). Where no model has any importance, the plain weighted mean is taken.
    """
    means = t.sums(_importances) / t.size
    divisors = np.where(means > 0, means, 1.0) if relative else np.ones(t.branches)
    return t.map(_weighted, list(np.asarray(weight) / divisors), weight, lambda_)


def _importances(x: Block) -> list[Array]:
    return [jnp.maximum(x.models[f"importance.{b}"], 0.0) for b in range(len(x.branches))]


def _weighted(x: Block, factors: Array, weight: Array, lambda_: Array) -> tuple[Array, None]:
    shares = [f * i for f, i in zip(factors, _importances(x), strict=True)]
    changes, divisor = deltas(x), add(shares)
    some = divisor != 0
    mean = dot(shares, changes) / jnp.where(some, divisor, 1.0)
    plain = dot(weight, changes) / jnp.sum(weight)
    return x.base + lambda_ * jnp.where(some, mean, plain), None
