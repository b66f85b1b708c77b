"""Along the arc between two models."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from bmjax.merge.methods.method import About, Merged, dense, method

OPPOSITE = 3.1415  # no arc is the shortest between (nearly) opposite vectors


@method("slerp", base="required", branches=(1, 1))
def slerp(
    base: jax.Array,
    branches: Sequence[jax.Array],
    *,
    t: Annotated[float, About("how far from the base (0) to the model (1)")] = 0.5,
) -> Merged:
    """sin((1-t) angle)/sin(angle) * base + sin(t angle)/sin(angle) * model (Shoemake, SIGGRAPH 1985).

    The angle is that between the two tensors, taken as vectors, and is computed from the distance of their unit
    vectors: 2 asin(|u - v| / 2) does not cancel for models near each other, as acos(u . v) does. A tensor that is
    zero, or opposite to the other one, is mixed along the straight line.
    """
    (branch,) = branches
    length, branch_length = _norm(base), _norm(branch)
    some = (length > 0) & (branch_length > 0)
    u = base / jnp.where(some, length, 1.0)
    v = branch / jnp.where(some, branch_length, 1.0)
    angle = 2.0 * jnp.arcsin(jnp.clip(_norm(u - v) / 2.0, 0.0, 1.0))
    on_arc = some & (angle < OPPOSITE)
    angle = jnp.where(on_arc, angle, 0.0)
    of_base, of_branch = ((s * _sinc(s * angle) / _sinc(angle)) for s in (1.0 - t, jnp.asarray(t)))
    # In differences from the base, so that an entry on which both agree loses no bit to the weights' rounding.
    mixed = base + (of_base + of_branch - 1.0) * base + of_branch * (branch - base)
    return dense(mixed, branches)


def _norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm; rows first, since one long float32 sum would lose small squares."""
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.sum(x * x, axis=-1))))


def _sinc(x: jax.Array) -> jax.Array:
    """sin(x) / x, 1 at 0."""
    return jnp.sinc(x / jnp.pi)
