"""A model as it is, or scaled."""

from collections.abc import Sequence
from typing import Annotated

import jax

from bmjax.merge.methods.method import About, Merged, dense, method


@method("passthrough", base="unused", branches=(1, 1))
def passthrough(
    base: jax.Array | None,
    branches: Sequence[jax.Array],
    *,
    scale: Annotated[float, About("factor of the model's values")] = 1.0,
) -> Merged:
    """scale * model: to convert a type or to rename a step's result, without a change at scale 1."""
    return dense(scale * branches[0], branches)
