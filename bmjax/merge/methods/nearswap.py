"""Take another model's values where they are near."""

from typing import Annotated

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, deltas
from bmjax.merge.methods.method import About, Merged, Tensor, method


@method("nearswap", base="required", branches=(1, 1))
def nearswap(
    t: Tensor,
    *,
    t_: Annotated[float, About("the distance up to which the model's value is taken whole", least=0)] = 0.001,
) -> Merged:
    """base + clip(t / |model - base|, 0, 1) * (model - base): no entry moves further than t.

    The method of the QuartetAnemoi-70B model card: a value within t of the base's is taken, one further off moves by t.
    """
    return t.map(_swap, t_)


def _swap(x: Block, t: Array) -> tuple[Array, None]:
    (delta,) = deltas(x)
    # The product written without the division: it is clip(delta, -t, t).
    return jnp.where(jnp.abs(delta) <= t, x.branches[0], x.base + jnp.clip(delta, -t, t)), None
