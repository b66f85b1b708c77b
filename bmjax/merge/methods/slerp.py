"""Along the arc between two models."""

import math
from typing import Annotated, Any

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import About, Merged, PerModel, Tensor, method

OPPOSITE = 3.1415  # no arc is the shortest between (nearly) opposite vectors


@method("slerp", base="required", branches=(1, 1))
def slerp(t: Tensor, *, t_: Annotated[float, About("how far from the base (0) to the model (1)")] = 0.5) -> Merged:
    """sin((1-t) angle)/sin(angle) * base + sin(t angle)/sin(angle) * model (Shoemake, SIGGRAPH 1985).

    The angle is that between the two tensors, taken as vectors, and is computed from the distance of their unit
    vectors: 2 asin(|u - v| / 2) does not cancel for models near each other, as acos(u . v) does. A tensor that is
    zero, or opposite to the other one, is mixed along the straight line.
    """
    vectors = "base and model"
    return t.map(_mix, _arc(np, t.sums(_products, vectors=vectors), t_), vectors=vectors)


@method("nuslerp", base="optional", branches=(2, 2), check=weights_sum, by_row=True)
def nuslerp(
    t: Tensor,
    *,
    weight: Annotated[PerModel, About("how near the result is to the model", per_model=True)] = (1.0,),
    nuslerp_flatten: Annotated[bool, About("take the whole tensor as one vector")] = True,
    nuslerp_row_wise: Annotated[
        bool, About("where not flattened: take each row as a vector (true), or each column")
    ] = False,
) -> Merged:
    """The point at weight2 / (weight1 + weight2) on the arc from the first model to the second; with a base, on the
    arc between their changes from it, added to the base.

    Angles as in slerp. A row (in_features of a matrix) is the last axis; the other tool's `nuslerp_row_wise: true`
    takes columns, which `compat: mergekit` reproduces. A tensor of one dimension is one vector either way.
    """
    position = weight[1] / sum(weight)
    vectors = "changes" if t.has_base else "models"
    if nuslerp_flatten:
        return t.map(_mix, _arc(np, t.sums(_products, vectors=vectors), position), vectors=vectors)
    if t.vector or nuslerp_row_wise != (t.compat == "mergekit"):
        return t.map(_mix_rows, position, vectors=vectors)
    return t.map(_mix_columns, t.columns(_products, vectors=vectors), position, vectors=vectors)


def _pair(x: Block, vectors: str) -> tuple[Array, Array, Array, Array]:
    """Return two models' vectors u and v, their difference v - u, and the first model."""
    first, second = (x.base, x.branches[0]) if vectors == "base and model" else x.branches
    u, v = (first - x.base, second - x.base) if vectors == "changes" else (first, second)
    return u, v, second - first, first


def _products(x: Block, *, vectors: str) -> list[Array]:
    u, v, difference, _ = _pair(x, vectors)
    return [u**2, v**2, u * difference, difference**2]


def _arc(xp: Any, products: Any, t: Any) -> tuple[Any, Any]:
    """Compute the factors of u (less 1) and of v - u that lead from u to the point at `t` of the arc.

    xp: numpy or jax.numpy. products: the sums u.u, v.v, u.(v - u) and (v - u).(v - u).
    """
    uu, vv, along, dd = products
    some = (uu > 0) & (vv > 0)
    u, v = xp.sqrt(xp.where(some, uu, 1.0)), xp.sqrt(xp.where(some, vv, 1.0))
    # |v| - |u| without cancelling: the difference of the squares over the sum.
    longer = (2.0 * along + dd) / (u + v)
    chord = xp.sqrt(xp.maximum(dd - longer**2, 0.0) / (u * v))
    angle = 2.0 * xp.arcsin(xp.clip(chord / 2.0, 0.0, 1.0))
    angle = xp.where(some & (angle < OPPOSITE), angle, 0.0)
    # sinc(x / pi) is sin(x) / x, 1 at 0.
    first, second = (s * xp.sinc(s * angle / math.pi) / xp.sinc(angle / math.pi) for s in (1.0 - t, t))
    return first + second - 1.0, second


def _mix(x: Block, factors: Any, *, vectors: str) -> tuple[Array, None]:
    # In differences from the first model, so that an entry on which both agree loses no bit to the weights' rounding.
    u, _, difference, first = _pair(x, vectors)
    return first + (factors[0] * u + factors[1] * difference), None


def _mix_rows(x: Block, t: Array, *, vectors: str) -> tuple[Array, None]:
    products = [jnp.sum(p, axis=-1, keepdims=True) for p in _products(x, vectors=vectors)]
    return _mix(x, _arc(jnp, products, t), vectors=vectors)


def _mix_columns(x: Block, products: Array, t: Array, *, vectors: str) -> tuple[Array, None]:
    return _mix(x, _arc(jnp, products, t), vectors=vectors)
