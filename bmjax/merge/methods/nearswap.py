"""Take another model's values where they are near."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.merge.methods.method import About, Merged, changes, dense, method


def not_negative(parameters: Mapping[str, Any]) -> None:
    """Raises UserError for a distance below 0."""
    if parameters["t"] < 0:
        raise UserError(f"t: {parameters['t']:g} is negative; it is a distance")


@method("nearswap", base="required", branches=(1, 1), check=not_negative)
def nearswap(
    base: jax.Array,
    branches: Sequence[jax.Array],
    *,
    t: Annotated[float, About("the distance up to which the model's value is taken whole")] = 0.001,
) -> Merged:
    """base + clip(t / |model - base|, 0, 1) * (model - base): no entry moves further than t.

    The method of the QuartetAnemoi-70B model card: a value within t of the base's is taken, one further off moves by t.
    """
    (delta,) = changes(base, branches, None)
    # The product written without the division: it is clip(delta, -t, t).
    return dense(jnp.where(jnp.abs(delta) <= t, branches[0], base + jnp.clip(delta, -t, t)), branches)
