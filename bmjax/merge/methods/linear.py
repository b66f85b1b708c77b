"""Weighted average of models, a model as it is, and what other methods share of weights."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from bmjax.config import UserError
from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, dot
from bmjax.merge.methods.method import About, Merged, PerModel, Tensor, method


def weights_sum(parameters: Mapping[str, Any]) -> None:
    """Raise UserError where `normalize` would divide by zero."""
    if parameters.get("normalize", True) and abs(sum(parameters["weight"])) < 1e-6:
        weights = ", ".join(f"{w:g}" for w in parameters["weight"])
        raise UserError(f"weight: {weights} sum to 0, which the merge divides by; change one of them")


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


@method("passthrough", base="unused", branches=(1, 1))
def passthrough(
    t: Tensor, *, scale: Annotated[PerModel, About("factor of the model's values", per_model=True)] = (1.0,)
) -> Merged:
    """scale * model: to stack layers, convert a type or rename a step's result, without a change at scale 1."""
    return t.map(_scaled, scale)


def _scaled(x: Block, scale: Array) -> tuple[Array, None]:
    return scale[0] * x.branches[0], None
