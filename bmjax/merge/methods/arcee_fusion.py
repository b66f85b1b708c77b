"""Arcee fusion: keep the changes that matter, entry by entry. The merge of TinyR1 (arXiv 2503.04872)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.merge.methods.method import About, Merged, changes, method
from bmjax.merge.quantile import count, order_statistics, rank

EPSILON = 1e-8
SMALL = 0.02


@method("arcee_fusion", base="required", branches=(1, None))
def arcee_fusion(
    base: jax.Array,
    branches: Sequence[jax.Array],
    *,
    lambda_: Annotated[float, About("factor of the kept changes")] = 1.0,
    combine: Annotated[
        Literal["mean", "sum"],
        About("an entry kept from several models gets the mean or the sum of their changes"),
    ] = "mean",
    rebase: Annotated[
        jax.Array | None, About("take each model's change from this model instead of the base", model=True)
    ] = None,
) -> Merged:
    """Keep a model's change where its importance is at least median + 1.5 * (q3 - q1), the base's value elsewhere.

    importance = |change| * KL(softmax(model row) || softmax(base row)), one KL a row; quantiles over the whole tensor.
    One model is the pairwise fusion of the paper, whose base is another branch. Several are the symmetric form: each
    is scored against the base by itself, then the kept changes are combined. With `rebase` a model counts as
    base + (model - rebase), so that a step of a sequence does not revert what earlier steps brought into the base.
    `combine: mean` (the default) at lambda 1 never moves an entry further than one of its models did.
    """
    copies = jnp.zeros(base.shape, jnp.int32)
    total, chosen = jnp.zeros_like(base), jnp.zeros_like(base)
    shares = []
    for delta, branch in zip(changes(base, branches, rebase), branches, strict=True):
        kept = importance_mask(base, delta)
        shares.append(count(kept) / kept.size)
        copies += kept
        total += jnp.where(kept, delta, 0.0)
        value = branch if rebase is None else base + delta
        chosen += jnp.where(kept, value, 0.0)
    if combine == "mean":
        total = total / jnp.maximum(copies, 1)
    # An entry kept from one model takes its value itself: base + (model - base) can be a rounding away from it.
    one = chosen + (lambda_ - 1.0) * total
    leaf = jnp.where(copies == 0, base, jnp.where(copies == 1, one, base + lambda_ * total))
    return Merged(leaf, jnp.stack(shares))


def importance_mask(base: jax.Array, delta: jax.Array) -> jax.Array:
    """Where the change `delta` of `base` is kept, bool. An entry that did not change has no change to keep."""
    importance = jnp.abs(delta) * row_kl(base, delta)
    n = importance.size
    q1, median, q3 = order_statistics(importance, [rank(q, n) for q in (0.25, 0.5, 0.75)])
    return (importance >= median + 1.5 * (q3 - q1)) & (delta != 0)


def row_kl(base: jax.Array, delta: jax.Array) -> jax.Array:
    """KL(P || Q) of every row, P = softmax(base + delta) + 1e-8, Q = softmax(base) + 1e-8: float32 [..., 1], in nats.

    The divergence is of second order in `delta`; the textbook sum(P * log(P / Q)) is a small difference of large
    terms that float32 cannot hold at the deltas of fine-tuning. With x = (P - Q) / Q,

        KL = sum(Q * g(x)),   g(x) = (1 + x) * log1p(x) - x,

    because P - Q sums to zero, and every term is >= 0. P - Q = q * expm1(t) with q = softmax(base) and
    t = delta - log1p(sum(q * expm1(delta))).
    """
    q = jax.nn.softmax(base, axis=-1)
    kl = lax.cond(jnp.max(jnp.abs(delta)) <= SMALL, _kl_small, _kl_any, q, base, delta)
    # The softmax does not see a shift of the whole row; without this its KL would be rounding noise instead of 0.
    shifted = jnp.max(delta, axis=-1, keepdims=True) == jnp.min(delta, axis=-1, keepdims=True)
    return jnp.where(shifted, 0.0, kl)


def _kl_small(q: jax.Array, base: jax.Array, delta: jax.Array) -> jax.Array:
    """For |delta| <= SMALL everywhere: polynomials, exact to float32, in place of transcendental functions."""
    t = delta - jnp.log1p(jnp.sum(q * _expm1_series(delta), axis=-1, keepdims=True))
    x = q * _expm1_series(t) / (q + EPSILON)
    return jnp.sum((q + EPSILON) * _g_series(x), axis=-1, keepdims=True)


def _kl_any(q: jax.Array, base: jax.Array, delta: jax.Array) -> jax.Array:
    """For any delta. A change that is not small does not cancel, and is computed without overflow."""
    log_q = jax.nn.log_softmax(base, axis=-1)
    growth = jnp.sum(q * jnp.expm1(jnp.minimum(delta, 1.0)), axis=-1, keepdims=True)
    near = (jnp.max(delta, axis=-1, keepdims=True) <= 1.0) & (jnp.abs(growth) <= 0.5)
    far_shift = jax.nn.logsumexp(log_q + delta, axis=-1, keepdims=True)
    t = delta - jnp.where(near, jnp.log1p(jnp.where(near, growth, 0.0)), far_shift)
    p = jnp.exp(jnp.minimum(log_q + t, 0.0))
    x = jnp.where(jnp.abs(t) <= 1.0, q * jnp.expm1(jnp.clip(t, -1.0, 1.0)), p - q) / (q + EPSILON)
    middle = jnp.clip(x, -0.5, 0.5)
    ratio = (p + EPSILON) / (q + EPSILON)
    g = jnp.where(jnp.abs(x) <= 0.5, (1.0 + middle) * jnp.log1p(middle) - middle, ratio * jnp.log(ratio) - x)
    g = jnp.where(jnp.abs(x) < 0.05, _g_series(x), g)
    return jnp.sum((q + EPSILON) * g, axis=-1, keepdims=True)


def _expm1_series(t: jax.Array) -> jax.Array:
    return t * (1.0 + t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5))))


def _g_series(x: jax.Array) -> jax.Array:
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))
