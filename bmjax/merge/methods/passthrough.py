"""A model as it is, or scaled."""

from typing import Annotated

from bmjax.merge.lazy import Array
from bmjax.merge.methods.method import About, Block, Merged, PerModel, Tensor, method


@method("passthrough", base="unused", branches=(1, 1))
def passthrough(
    t: Tensor,
    *,
    scale: Annotated[PerModel, About("factor of the model's values", per_model=True)] = (1.0,),
) -> Merged:
    """scale * model: to stack layers, convert a type or rename a step's result, without a change at scale 1."""
    return t.map(_scaled, scale)


def _scaled(x: Block, scale: Array) -> tuple[Array, None]:
    return scale[0] * x.branches[0], None
