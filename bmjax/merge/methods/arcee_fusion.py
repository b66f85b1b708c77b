"""Arcee fusion: keep the changes that matter, entry by entry. The merge of TinyR1 (arXiv 2503.04872)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np

from bmjax.merge.engine.quantile import add_pairs, rank
from bmjax.merge.lazy import Array, jnp, lax
from bmjax.merge.methods.kernels import Block, Kernel, Masks, add, add_kept, deltas, magnitudes
from bmjax.merge.methods.method import About, Merged, Rebase, Tensor, method

EPSILON = 1e-8
# Of the quick form of the KL, see `quick_row_kl`.
LARGE, LEAST_SHARE, KL_ERROR = 0.5, 1e-5, 4e-6


@method("arcee_fusion", base="required", branches=(1, None), by_row=True)
def arcee_fusion(
    t: Tensor,
    *,
    lambda_: Annotated[float, About("factor of the kept changes")] = 1.0,
    combine: Annotated[
        Literal["mean", "sum"], About("an entry kept from several models gets the mean or the sum of their changes")
    ] = "mean",
    importance: Annotated[
        Literal["row", "tensor"],
        About("one KL a row, as the paper's authors ran it, or one a tensor and signed, as the paper's text reads"),
    ] = "row",
    rebase: Rebase = None,
) -> Merged:
    """Keep a model's change where its importance is at least median + 1.5 * (q3 - q1), the base's value elsewhere.

    importance = |change| * KL(softmax(model row) || softmax(base row)), one KL a row; quantiles over the whole tensor.
    One model is the pairwise fusion of the paper, whose base is another branch. Several are the symmetric form: each
    is scored against the base by itself, then the kept changes are combined. With `rebase` a model counts as
    base + (model - rebase), so that a step of a sequence does not revert what earlier steps brought into the base.
    `combine: mean` (the default) at lambda 1 never moves an entry further than one of its models did.
    `importance: tensor` is the other reading: (base - model) * KL of the flattened tensors, with its sign, so that only
    decreases can be kept.
    """
    score: Kernel = importances
    operands: list[Any] = []
    static: dict[str, Any] = {}
    if importance == "tensor":
        # The KL is one positive factor of the whole tensor: it changes no entry's rank.
        score = _decreases
    elif t.compat == "mergekit":
        static["form"] = "bfloat16" if t.rounded_to == "bfloat16" else "textbook"
        operands = [t.rows(row_kls, **static)]
    elif t.vector:
        # Here, too, the KL is one factor. Without it, entries of bfloat16 that are equal to the limit stay so.
        score = magnitudes
    else:
        static["form"] = "any"
        operands = [t.rows(row_kls, quick=quick_row_kls, **static)]
    quartiles = t.order_statistics(score, [_quartile_ranks(t.size)] * t.branches, *operands, **static)
    return t.map(
        _fuse, [_limit(*values) for values in quartiles], lambda_, *operands, score=score, combine=combine, **static
    )


def _quartile_ranks(size: int) -> list[int]:
    return [rank(q, size) for q in (0.25, 0.5, 0.75)]


def _limit(q1: np.float32, median: np.float32, q3: np.float32) -> np.float32:
    return median + np.float32(1.5) * (q3 - q1)


def row_kls(x: Block, *, form: str) -> Array:
    """Compute the KL of every branch's rows, [branches, rows, 1]."""
    return jnp.stack([row_kl(x.base, delta, form=form) for delta in deltas(x)])


def importances(x: Block, kl: Array, *, form: str) -> list[Array]:
    rounded = _rounding(form)
    return [rounded(jnp.abs(rounded(delta)) * kl[b]) for b, delta in enumerate(deltas(x))]


def _decreases(x: Block) -> list[Array]:
    return [-delta for delta in deltas(x)]


def _fuse(
    x: Block, limits: Array, lambda_: Array, *operands: Any, score: Kernel, combine: str, **static: Any
) -> tuple[Array, Masks]:
    changes = deltas(x)
    values = x.branches if "rebase" not in x.models else [x.base + delta for delta in changes]
    # An entry that did not change has no change to keep.
    masks = [(s >= limits[b]) & (changes[b] != 0) for b, s in enumerate(score(x, *operands, **static))]
    copies = add([kept.astype(jnp.int32) for kept in masks])
    total = add_kept(masks, changes)
    if combine == "mean" and len(masks) > 1:
        total = total / jnp.maximum(copies, 1)
    # An entry kept from one model takes its value itself: base + (model - base) can be a rounding away from it.
    single = add_kept(masks, values) + (lambda_ - 1.0) * total
    return jnp.where(copies == 0, x.base, jnp.where(copies == 1, single, x.base + lambda_ * total)), masks


def agreement(x: Block | None) -> tuple[tuple[int, int], ...]:
    """Compare the masks of the textbook's formula in float32 and in bfloat16 with the exact one, of the first branch.

    x: sampled rows, on which each mask has its own quartiles. Computed by numpy, because programs for so few entries
    would take longer to compile.

    Returns for either type how many entries its mask and the exact one both keep, and how many either does.
    """
    if x is None:
        return ()
    base, branch, origin = (
        np.asarray(a).astype(np.float32) for a in (x.base, x.branches[0], x.models.get("rebase", x.base))
    )
    masks = []
    for dtype, rounded in ((np.float64, _exactly), (np.float32, _exactly), (np.float32, _to_bfloat16)):
        b, delta = base.astype(dtype), (branch - origin).astype(dtype)
        values = rounded(np.abs(rounded(delta)) * _textbook_kl(np, b, delta, rounded))
        ranks = _quartile_ranks(values.size)
        masks.append(values >= _limit(*np.partition(values, ranks, axis=None)[ranks]))
    return tuple((int(np.sum(masks[0] & m)), int(np.sum(masks[0] | m))) for m in masks[1:])


def row_kl(base: Array, delta: Array, *, form: str = "any") -> Array:
    """Compute KL(P || Q) of every row, P = softmax(base + delta) + 1e-8, Q = softmax(base) + 1e-8.

    The divergence is of second order in `delta`; the textbook sum(P * log(P / Q)) is a small difference of large
    terms that float32 cannot hold at the deltas of fine-tuning. With x = (P - Q) / Q,

        KL = sum(Q * g(x)),   g(x) = (1 + x) * log1p(x) - x,

    because P - Q sums to zero, and every term is >= 0. P - Q = q * expm1(t) with q = softmax(base) and
    t = delta - log1p(sum(q * expm1(delta))).

    form: "any" is this. For `compat: mergekit`, "textbook" is the textbook's, which cancels; "bfloat16" is that with
    every operation's result rounded to bfloat16. Returns float32 [..., 1], in nats.
    """
    if form != "any":
        return _textbook_kl(jnp, base, delta, _rounding(form))
    # The softmax does not see a shift of the whole row; without this its KL would be rounding noise instead of 0.
    shifted = jnp.max(delta, axis=-1, keepdims=True) == jnp.min(delta, axis=-1, keepdims=True)
    return jnp.where(shifted, 0.0, _kl_any(base, delta))


def _textbook_kl(xp: Any, base: Any, delta: Any, rounded: Callable[[Any], Any]) -> Any:
    """Compute sum(P * log(P / Q)) of every row. xp: numpy or jax.numpy. rounded: is applied to every result."""

    def shares(x: Any) -> Any:
        e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
        return e / xp.sum(e, axis=-1, keepdims=True)

    p, q = (rounded(rounded(shares(rounded(model))) + EPSILON) for model in (base + delta, base))
    return rounded(xp.sum(rounded(p * rounded(xp.log(rounded(p / q)))), axis=-1, keepdims=True))


def quick_row_kls(x: Block) -> Array:
    """Compute the KL of every branch's rows as `row_kls` does, in a tenth of the time, where that is possible.

    Returns [branches + 1, rows, 1]: the last array is not 0 at rows where `quick_row_kl` is not sure of some branch.
    """
    kls, doubts = zip(*(quick_row_kl(x.base, delta) for delta in deltas(x)), strict=True)
    return jnp.stack([*kls, add(doubts)])


def quick_row_kl(base: Array, delta: Array) -> tuple[Array, Array]:
    """Compute the KL of every row as `row_kl` does, in one pass of polynomials; and whether it is in doubt, 0 or more.

    With G = sum(q * expm1(delta)), Z = 1 + G and gamma(d) = d * exp(d) - expm1(d), all terms of which are >= 0,

        KL without the 1e-8 = sum(q * gamma(delta)) / Z - (log1p(G) - G / Z),

    whose second term is of second order in the mean change. The 1e-8 takes 1e-8 * sum(exp(t) - 1 - t) from it to first
    order, t = delta - log(Z).

    Where there is no doubt, the relative error is at most KL_ERROR. That holds for |delta| <= LARGE, for changes that
    are not nearly one shift of the row (the terms would cancel), and where every q is at least LEAST_SHARE, so that the
    1e-8 needs no second order.
    """
    columns = base.shape[-1]
    near = min(4.0, max(0.0, math.log(1.0 / (1.1 * columns * LEAST_SHARE))))
    e = _exp_series(base)
    square = delta * delta
    beyond = jnp.maximum(jnp.abs(base) * (LARGE / max(near, 1e-6)), jnp.abs(delta)) > LARGE
    arrays = [
        e,
        e * (delta * _polynomial(delta, _EXPM1)),
        e * (square * _polynomial(delta, _GAMMA)),
        delta,
        square * _polynomial(delta, (1 / 2, 1 / 6, 1 / 24)),
        jnp.where(beyond, 1.0, 0.0),
    ]
    total, grown, gamma, shift, excess, doubt = _sum_in_parts(arrays)
    g = grown / total
    first = gamma / total / (1.0 + g)
    second = g * g * _polynomial(g, [(-1) ** k * (k - 1) / k for k in range(2, 8)])
    kl = first - second - EPSILON * (excess - g * (shift + excess) + (0.5 * columns) * g * g)
    uneven = (second <= 0.25 * first) & (jnp.abs(g) <= 0.05)
    return kl, doubt + jnp.where(uneven & (total * math.exp(near) * LEAST_SHARE <= 1.0), 0.0, 1.0)


_EXPM1 = [1 / math.factorial(k) for k in range(1, 9)]
_GAMMA = [(k - 1) / math.factorial(k) for k in range(2, 10)]


def _exp_series(x: Array) -> Array:
    """Compute exp for |x| <= 4: XLA's, for any x, takes longer than all the rest of `quick_row_kl`."""
    root = _polynomial(x * 0.125, [1 / math.factorial(k) for k in range(9)])
    for _ in range(3):
        root = root * root
    return root


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """Compute sum(coefficients[k] * x**k)."""
    value: Any = np.float32(coefficients[-1])
    for c in coefficients[-2::-1]:
        value = c + x * value
    return value


def _sum_in_parts(arrays: Sequence[Array]) -> list[Array]:
    """Return the row sums of arrays, [rows, 1].

    Parts of at most 512 entries are summed first, where rows consist of such: one long float32 sum would lose small
    terms beside a large one. All sums at once are one loop of vector code.
    """
    rows, columns = arrays[0].shape
    width = max((w for w in range(32, 513, 32) if columns % w == 0), default=columns)
    parts = [a.reshape(rows, columns // width, width) for a in arrays]
    sums = lax.reduce(parts, [np.float32(0)] * len(parts), lambda x, y: list(add_pairs(x, y)), (2,))
    return [jnp.sum(s, axis=1, keepdims=True) for s in lax.optimization_barrier(sums)]


def _kl_any(base: Array, delta: Array) -> Array:
    """Compute the KL for any delta. A change that is not small does not cancel, and nothing overflows."""
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


def _softmax(x: Array) -> tuple[Array, Array]:
    """Compute the softmax of every row, and the logarithm of its denominator [..., 1]."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    e = jnp.exp(x - largest)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / total, jnp.log(total) + largest


def _g_series(x: Array) -> Array:
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))


def _rounding(form: str) -> Callable[[Array], Array]:
    # The compiler may not keep more bits of this.
    return functools.partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7) if form == "bfloat16" else _exactly


def _exactly(array: Any) -> Any:
    return array


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)
