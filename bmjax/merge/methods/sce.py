"""Select, calculate, erase."""

from typing import Annotated

import numpy as np

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, Masks, add, add_kept, deltas
from bmjax.merge.methods.method import About, Merged, Rebase, Tensor, method


@method("sce", base="required", branches=(1, None))
def sce(
    t: Tensor,
    *,
    select_topk: Annotated[
        float, About("share of the entries to keep, those that vary most between models", least=0, most=1)
    ] = 1.0,
    rebase: Rebase = None,
) -> Merged:
    """SCE of FuseChat-3.0, arXiv 2408.07990.

    Select: of the entries whose variance over the models' changes is not 0, the select_topk share with the largest
    (all that equal the last of them, too). Calculate: a model's weight is the mean square of its selected changes.
    Erase: an entry takes the weighted mean of the changes whose sign is that of their sum (+ for 0).
    """
    limit = 0.0
    if select_topk < 1:
        (varied,) = t.sums(_varied)
        k = int(select_topk * varied)
        # Compilers round a sum of squares this way or that: a little below, or the last entry itself would be left out.
        limit = float(t.order_statistics(_variance, [[t.size - k]])[0][0]) * (1.0 - 2.0**-20) if k else np.inf
    squares = t.sums(_selected_squares, limit)
    weight = squares / squares.sum() if squares.sum() > 0 else np.full(t.branches, 1.0 / t.branches)
    return t.map(_erase, limit, list(weight))


def _variance(x: Block) -> list[Array]:
    """Compute the variance of an entry over the models, times the square of their number: (a - b)^2 over all pairs.

    Unlike squares of differences from a mean, these are exact for models stored in bfloat16, most of whose entries
    vary exactly as much as many others; rounding must not tell those apart.
    """
    pairs = [(a, b) for i, a in enumerate(x.branches) for b in x.branches[i + 1 :]]
    return [add([(a - b) ** 2 for a, b in pairs]) if pairs else jnp.zeros_like(x.branches[0])]


def _varied(x: Block) -> list[Array]:
    return [_variance(x)[0] > 0]


def _selected(x: Block, limit: Array) -> list[Array]:
    (variance,) = _variance(x)
    return [jnp.where(variance >= limit, change, 0.0) for change in deltas(x)]


def _selected_squares(x: Block, limit: Array) -> list[Array]:
    return [change**2 for change in _selected(x, limit)]


def _erase(x: Block, limit: Array, weight: Array) -> tuple[Array, Masks]:
    changes = _selected(x, limit)
    positive = add(changes) >= 0
    masks = [(change != 0) & ((change > 0) == positive) for change in changes]
    total = add_kept(masks, [w * c for w, c in zip(weight, changes, strict=True)])
    divisor = add_kept(masks, weight)
    return x.base + total / jnp.where(divisor > 0, divisor, 1.0), masks
