"""Weighted average of models."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.merge.methods.method import About, Merged, dense, method


def weights_sum(parameters: Mapping[str, Any]) -> None:
    """Raises UserError where `normalize` would divide by zero."""
    if parameters["normalize"] and abs(sum(parameters["weight"])) < 1e-6:
        weights = ", ".join(f"{w:g}" for w in parameters["weight"])
        raise UserError(f"the weights ({weights}) sum to 0, which `normalize: true` divides by; change one of them")


@method("linear", base="unused", branches=(1, None), check=weights_sum)
def linear(
    base: jax.Array | None,
    branches: Sequence[jax.Array],
    *,
    weight: Annotated[jax.Array, About("how much of the model goes into the average", each=True)] = 1.0,  # type: ignore[assignment]
    normalize: Annotated[bool, About("divide by the sum of the weights")] = True,
) -> Merged:
    """sum(weight * model) / sum(weight): model soups, arXiv 2203.05482.

    An entry on which all models agree stays as it is, bit for bit, when normalized.
    """
    total = functools.reduce(jnp.add, [w * x for w, x in zip(weight, branches, strict=True)])
    if not normalize:
        return dense(total, branches)
    first = branches[0]
    agree = functools.reduce(jnp.logical_and, [x == first for x in branches])
    return dense(jnp.where(agree, first, total / jnp.sum(weight)), branches)
