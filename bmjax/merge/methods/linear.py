"""Weighted means of models or of their changes, a model as it is, and what other methods share of weights."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from bmjax.config import UserError
from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, add, deltas, dot
from bmjax.merge.methods.method import About, Merged, PerModel, Rebase, Scale, Tensor, Weight, method


def weights_sum(parameters: Mapping[str, Any]) -> None:
    """Raise UserError where a division by the sum of the weights, as `normalize` asks for, would be one by zero.

    It would lose all digits, too, where they nearly cancel, or where all are tiny.
    """
    weights = parameters["weight"]
    if parameters.get("normalize", True) and abs(total := sum(weights)) < 1e-6:
        shown = ", ".join(f"{weight:g}" for weight in weights)
        largest = max(map(abs, weights))
        if abs(total) < 1e-6 * largest or not largest:
            raise UserError(f"weight: {shown} sum to 0, which the merge divides by; change one of them")
        raise UserError(
            f"weight: {shown} sum to {total:g}, too little for the merge to divide by; multiply all of them by one "
            "number, only their ratios count"
        )


def shares(weight: PerModel) -> PerModel:
    """Divide the weights by their sum, in float64."""
    return tuple(w / sum(weight) for w in weight)


@method("linear", base="unused", branches=(1, None), check=weights_sum)
def linear(
    t: Tensor,
    *,
    weight: Annotated[PerModel, About("how much of the model goes into the average", per_model=True)] = (1.0,),
    normalize: Annotated[bool, About("divide by the sum of the weights")] = True,
) -> Merged:
    """sum(weight * model) / sum(weight): model soups, arXiv 2203.05482.

    An entry on which all models agree stays as it is, bit for bit, when normalized.
    """
    return t.map(_average, shares(weight) if normalize else weight, normalize=normalize)


def _average(x: Block, weight: Array, *, normalize: bool) -> tuple[Array, None]:
    total = dot(weight, x.branches)
    if not normalize:
        return total, None
    first = x.branches[0]
    agree = functools.reduce(jnp.logical_and, [branch == first for branch in x.branches])
    return jnp.where(agree, first, total), None


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
    return t.map(_by_importance, list(np.asarray(weight) / divisors), weight, lambda_)


def _importances(x: Block) -> list[Array]:
    return [jnp.maximum(x.models[f"importance.{b}"], 0.0) for b in range(len(x.branches))]


def _by_importance(x: Block, factors: Array, weight: Array, lambda_: Array) -> tuple[Array, None]:
    parts = [f * i for f, i in zip(factors, _importances(x), strict=True)]
    changes, divisor = deltas(x), add(parts)
    some = divisor != 0
    mean = dot(parts, changes) / jnp.where(some, divisor, 1.0)
    plain = dot(weight, changes) / jnp.sum(weight)
    return x.base + lambda_ * jnp.where(some, mean, plain), None


@method("passthrough", base="unused", branches=(1, 1))
def passthrough(
    t: Tensor, *, scale: Annotated[PerModel, About("factor of the model's values", per_model=True)] = (1.0,)
) -> Merged:
    """scale * model: to stack layers, convert a type or rename a step's result, without a change at scale 1."""
    return t.map(_scaled, scale)


def _scaled(x: Block, scale: Array) -> tuple[Array, None]:
    return scale[0] * x.branches[0], None
