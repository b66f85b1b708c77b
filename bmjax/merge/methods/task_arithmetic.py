"""Sum of task vectors."""

import functools
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import About, Merged, changes, dense, method


@method("task_arithmetic", base="required", branches=(1, None), check=weights_sum)
def task_arithmetic(
    base: jax.Array,
    branches: Sequence[jax.Array],
    *,
    weight: Annotated[jax.Array, About("factor of the model's change", each=True)] = 1.0,  # type: ignore[assignment]
    lambda_: Annotated[float, About("factor of the summed change")] = 1.0,
    normalize: Annotated[bool, About("divide by the sum of the weights")] = False,
    rebase: Annotated[
        jax.Array | None, About("take each model's change from this model instead of the base", model=True)
    ] = None,
) -> Merged:
    """base + lambda * sum(weight * (model - base)): task arithmetic, arXiv 2212.04089."""
    deltas = changes(base, branches, rebase)
    total = functools.reduce(jnp.add, [w * d for w, d in zip(weight, deltas, strict=True)])
    if normalize:
        total = total / jnp.sum(weight)
    return dense(base + lambda_ * total, branches)
