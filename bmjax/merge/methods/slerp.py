"""Along the arc between two models."""

import math
from typing import Annotated, Any

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import About, Block, Merged, Numbers, Tensor, deltas, method

OPPOSITE = 3.1415  # no arc is the shortest between (nearly) opposite vectors


@method("slerp", base="required", branches=(1, 1))
def slerp(
    t: Tensor,
    *,
    t_: Annotated[float, About("how far from the base (0) to the model (1)")] = 0.5,
) -> Merged:
    """sin((1-t) angle)/sin(angle) * base + sin(t angle)/sin(angle) * model (Shoemake, SIGGRAPH 1985).

    The angle is that between the two tensors, taken as vectors, and is computed from the distance of their unit
    vectors: 2 asin(|u - v| / 2) does not cancel for models near each other, as acos(u . v) does. A tensor that is
    zero, or opposite to the other one, is mixed along the straight line.
    """
    return t.map(_mix, _factors(t.sums(_products), t_))


@method("nuslerp", base="optional", branches=(2, 2), check=weights_sum, by_row=True)
def nuslerp(
    t: Tensor,
    *,
    weight: Annotated[Numbers, About("how near the result is to the model", each=True)] = 1.0,  # type: ignore[assignment]
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
    at = weight[1] / sum(weight)
    against = "base" if t.has_base else "none"
    if nuslerp_flatten:
        factors = _factors(t.sums(_pair_products, against=against), at)
        return t.map(_mix_pair, factors, against=against)
    if t.vector or nuslerp_row_wise != (t.compat == "mergekit"):
        return t.map(_mix_rows, at, against=against)
    return t.map(_mix_columns, t.columns(_pair_products, against=against), at, against=against)


def _products(x: Block) -> list[Array]:
    """Of two vectors u and v: u.u, v.v, u.(v - u) and (v - u).(v - u), entry by entry."""
    (delta,) = deltas(x)
    return [x.base**2, x.branches[0] ** 2, x.base * delta, delta**2]


def _pair(x: Block, against: str) -> tuple[Array, Array, Array]:
    """The two vectors and their difference."""
    first, second = x.branches
    if against == "none":
        return first, second, second - first
    return first - x.base, second - x.base, second - first


def _pair_products(x: Block, *, against: str) -> list[Array]:
    u, v, difference = _pair(x, against)
    return [u**2, v**2, u * difference, difference**2]


def _factors(products: np.ndarray, t: float) -> tuple[float, float]:
    """The factors (of u - 1, and of v - u) that lead from u to the point at `t`, from `_products`' four sums."""
    return tuple(float(x) for x in _arc(np, products, t))  # type: ignore[return-value]


def _arc(xp: Any, products: Any, t: Any) -> tuple[Any, Any]:
    uu, vv, along, dd = products
    some = (uu > 0) & (vv > 0)
    u, v = xp.sqrt(xp.where(some, uu, 1.0)), xp.sqrt(xp.where(some, vv, 1.0))
    # |v| - |u| without cancelling: the difference of the squares over the sum.
    longer = (2.0 * along + dd) / (u + v)
    chord = xp.sqrt(xp.maximum(dd - longer**2, 0.0) / (u * v))
    angle = 2.0 * xp.arcsin(xp.clip(chord / 2.0, 0.0, 1.0))
    angle = xp.where(some & (angle < OPPOSITE), angle, 0.0)
    first, second = ((s * _sinc(xp, s * angle) / _sinc(xp, angle)) for s in (1.0 - t, t))
    return first + second - 1.0, second


def _sinc(xp: Any, x: Any) -> Any:
    """sin(x) / x, 1 at 0."""
    return xp.sinc(x / math.pi)


def _mix(x: Block, factors: Array) -> tuple[Array, None]:
    # In differences from the base, so that an entry on which both agree loses no bit to the weights' rounding.
    (delta,) = deltas(x)
    return x.base + (factors[0] * x.base + factors[1] * delta), None


def _mix_pair(x: Block, factors: Any, *, against: str) -> tuple[Array, None]:
    u, _, difference = _pair(x, against)
    return x.branches[0] + (factors[0] * u + factors[1] * difference), None


def _mix_rows(x: Block, t: Array, *, against: str) -> tuple[Array, None]:
    products = [jnp.sum(p, axis=-1, keepdims=True) for p in _pair_products(x, against=against)]
    return _mix_pair(x, _arc(jnp, products, t), against=against)


def _mix_columns(x: Block, products: Array, t: Array, *, against: str) -> tuple[Array, None]:
    return _mix_pair(x, _arc(jnp, products, t), against=against)
