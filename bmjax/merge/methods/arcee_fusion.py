"""Arcee fusion: keep the changes that matter, entry by entry. The merge of TinyR1 (arXiv 2503.04872)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np

from bmjax.merge.engine.quantile import add_pairs, rank
from bmjax.merge.lazy import Array, jnp, lax
from bmjax.merge.methods.kernels import Block, Kernel, Masks, add, add_kept, deltas
from bmjax.merge.methods.method import About, Merged, Rebase, Tensor, method

EPSILON = 1e-8
SMALL, NEAR = 0.02, 20.0


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
    else:
        static["form"] = "small"
        operands = [t.rows(row_kls, reorder=True, **static)]
        if operands[0].array[-1].max() > 0:
            static["form"] = "any"
            operands = [t.rows(row_kls, **static)]
    quartiles = t.order_statistics(score, [_quartile_ranks(t.size)] * t.branches, *operands, **static)
    return t.map(
        _fuse, [_limit(*values) for values in quartiles], lambda_, *operands, score=score, combine=combine, **static
    )


def _quartile_ranks(size: int) -> list[int]:
    return [rank(q, size) for q in (0.25, 0.5, 0.75)]


def _limit(q1: np.float32, median: np.float32, q3: np.float32) -> np.float32:
    return median + np.float32(1.5) * (q3 - q1)


def row_kls(x: Block, *, form: str) -> Array:
    """Compute the KL of every branch's rows, [branches, rows, 1].

    The form "small" gives one array more: how many entries of each row are beyond its limits, over all branches.
    """
    if form == "small":
        kls, beyond = zip(*(_kl_small(x.base, delta) for delta in deltas(x)), strict=True)
        return jnp.stack([*kls, add(beyond)])
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


def three_importances(x: Block) -> list[Array]:
    """Compute the importances of the first branch's entries: exactly, by the textbook's KL in float32, in bfloat16."""
    x = x._replace(branches=x.branches[:1])
    return [importances(x, row_kls(x, form=form), form=form)[0] for form in ("any", "textbook", "bfloat16")]


def agreement(importances: list[np.ndarray]) -> tuple[tuple[int, int], ...]:
    """Compare the masks that importances of the same entries lead to, each by its own quartiles.

    Returns for all but the first: how many entries its mask and the first one's both keep, and how many either does.
    """
    if not importances:
        return ()
    masks = []
    for values in importances:
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

    form: "any" is this for any values, see `_kl_small` for small ones. For `compat: mergekit`, "textbook" is the
    textbook's, which cancels; "bfloat16" is that with every operation's result rounded to bfloat16. Returns float32
    [..., 1], in nats.
    """
    if form != "any":
        r = _rounding(form)
        p, q = (r(r(_softmax(r(model))[0]) + EPSILON) for model in (base + delta, base))
        return r(jnp.sum(r(p * r(jnp.log(r(p / q)))), axis=-1, keepdims=True))
    # The softmax does not see a shift of the whole row; without this its KL would be rounding noise instead of 0.
    shifted = jnp.max(delta, axis=-1, keepdims=True) == jnp.min(delta, axis=-1, keepdims=True)
    return jnp.where(shifted, 0.0, _kl_any(base, delta))


def _kl_small(base: Array, delta: Array) -> tuple[Array, Array]:
    """Compute the KL for |delta| <= SMALL and |base| <= NEAR everywhere, and how many entries of each row are beyond.

    Polynomials, exact to float32, in place of transcendental functions; no largest entry to be found first; and sums of
    floats only, all at once, for which the CPU's compiler has vector code. So a row is gone through twice.
    """
    e = jnp.exp(base)
    uneven = jnp.abs(delta - delta[..., :1])
    beyond = jnp.where((jnp.abs(base) > NEAR) | (jnp.abs(delta) > SMALL), 1.0, 0.0)
    arrays = [e, e * _expm1_series(delta), uneven, beyond]
    sums = lax.reduce(arrays, [np.float32(0)] * 4, lambda x, y: list(add_pairs(x, y)), (base.ndim - 1,))
    total, grown, uneven, beyond = (a[..., None] for a in sums)
    t = delta - jnp.log1p(grown / total)
    q = e * (1.0 / total)
    x = q * _expm1_series(t) / (q + EPSILON)
    kl = jnp.sum((q + EPSILON) * _g_series(x), axis=-1, keepdims=True)
    # As in `row_kl`: a shift of the whole row.
    return jnp.where(uneven == 0, 0.0, kl), beyond


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


def _expm1_series(t: Array) -> Array:
    return t * (1.0 + t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5))))


def _g_series(x: Array) -> Array:
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))


def _rounding(form: str) -> Callable[[Array], Array]:
    if form != "bfloat16":
        return lambda a: a
    # The compiler may not keep more bits of this.
    return lambda a: lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
