"""Arcee fusion: keep the changes that matter, entry by entry. The merge of TinyR1 (arXiv 2503.04872)."""

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.merge.methods.method import About, Merged, changes, float32, method
from bmjax.merge.quantile import count, order_statistics, rank

EPSILON = 1e-8
SMALL = 0.02


@method("arcee_fusion", base="required", branches=(1, None), jit=False)
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
    origin = base if rebase is None else rebase
    masks, shares = zip(*(_score(base, branch, origin) for branch in branches), strict=True)
    return Merged(_combine(base, branches, masks, rebase, lambda_, combine=combine), jnp.stack(shares))


@jax.jit
def _score(base: jax.Array, branch: jax.Array, origin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a branch's change from `origin` is kept, bool, and the share of such entries."""
    (delta,) = changes(base, [branch], origin)
    kept = importance_mask(float32(base), delta)
    return kept, count(kept) / kept.size


@functools.partial(jax.jit, static_argnames="combine")
def _combine(
    base: jax.Array,
    branches: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    rebase: jax.Array | None,
    lambda_: float,
    *,
    combine: str,
) -> jax.Array:
    """The base with the kept changes, scaled by `lambda_`."""
    deltas, base = changes(base, branches, rebase), float32(base)
    values = [float32(b) for b in branches] if rebase is None else [base + delta for delta in deltas]
    copies = functools.reduce(jnp.add, [kept.astype(jnp.int32) for kept in masks])
    total = functools.reduce(jnp.add, [jnp.where(k, d, 0.0) for k, d in zip(masks, deltas, strict=True)])
    if combine == "mean":
        total = total / jnp.maximum(copies, 1)
    # An entry kept from one model takes its value itself: base + (model - base) can be a rounding away from it.
    chosen = functools.reduce(jnp.add, [jnp.where(k, v, 0.0) for k, v in zip(masks, values, strict=True)])
    one = chosen + (lambda_ - 1.0) * total
    return jnp.where(copies == 0, base, jnp.where(copies == 1, one, base + lambda_ * total))


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
    kl = lax.cond(jnp.max(jnp.abs(delta)) <= SMALL, _kl_small, _kl_any, base, delta)
    # The softmax does not see a shift of the whole row; without this its KL would be rounding noise instead of 0.
    shifted = jnp.max(delta, axis=-1, keepdims=True) == jnp.min(delta, axis=-1, keepdims=True)
    return jnp.where(shifted, 0.0, kl)


def _kl_small(base: jax.Array, delta: jax.Array) -> jax.Array:
    """For |delta| <= SMALL everywhere: polynomials, exact to float32, in place of transcendental functions."""
    q, _ = _softmax(base)
    t = delta - jnp.log1p(jnp.sum(q * _expm1_series(delta), axis=-1, keepdims=True))
    x = q * _expm1_series(t) / (q + EPSILON)
    return jnp.sum((q + EPSILON) * _g_series(x), axis=-1, keepdims=True)


def _kl_any(base: jax.Array, delta: jax.Array) -> jax.Array:
    """For any delta. A change that is not small does not cancel, and is computed without overflow."""
    q, log_sum = _softmax(base)
    p, log_sum_new = _softmax(base + delta)
    growth = jnp.sum(q * jnp.expm1(jnp.minimum(delta, 1.0)), axis=-1, keepdims=True)
    near = (jnp.max(delta, axis=-1, keepdims=True) <= 1.0) & (jnp.abs(growth) <= 0.5)
    t = delta - jnp.where(near, jnp.log1p(jnp.where(near, growth, 0.0)), log_sum_new - log_sum)
    x = jnp.where(jnp.abs(t) <= 1.0, q * jnp.expm1(jnp.clip(t, -1.0, 1.0)), p - q) / (q + EPSILON)
    middle = jnp.clip(x, -0.5, 0.5)
    ratio = (p + EPSILON) / (q + EPSILON)
    g = jnp.where(jnp.abs(x) <= 0.5, (1.0 + middle) * jnp.log1p(middle) - middle, ratio * jnp.log(ratio) - x)
    g = jnp.where(jnp.abs(x) < 0.05, _g_series(x), g)
    return jnp.sum((q + EPSILON) * g, axis=-1, keepdims=True)


def _softmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax of every row, and the logarithm of its denominator [..., 1]."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    e = jnp.exp(x - largest)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / total, jnp.log(total) + largest


def _expm1_series(t: jax.Array) -> jax.Array:
    return t * (1.0 + t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5))))


def _g_series(x: jax.Array) -> jax.Array:
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))
