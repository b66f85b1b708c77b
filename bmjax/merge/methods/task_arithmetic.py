"""Sums of task vectors: whole, or sparsified and by majority of signs.

Three choices make a method: which entries of a change are kept (all; the largest: ties; at random: dare; those between
the largest and the smallest: breadcrumbs; at random by rank: della), whether changes against the elected sign are
left out (ties, dare_ties, breadcrumbs_ties, della), and how the kept ones are scaled. Then, for all,

    base + lambda * sum(weight * kept change)   [normalize: / sum of the weights that took part]
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from bmjax.config import UserError
from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import (
    About,
    Block,
    Masks,
    Merged,
    Numbers,
    Ranked,
    Rebase,
    Scale,
    Tensor,
    Weight,
    add,
    deltas,
    magnitudes,
    method,
    moved,
    random_bits,
)  # fmt: skip

Density = Annotated[Numbers, About("share of the model's changes to keep", each=True, least=0, most=1)]
Gamma = Annotated[Numbers, About("share of the largest changes to drop", each=True, least=0, most=1)]
Epsilon = Annotated[
    Numbers, About("how much the chance to be kept rises and falls with the rank", each=True, least=0, most=1)
]
Divide = Annotated[bool, About("divide by the sum of the weights that took part in an entry")]
DivideAll = Annotated[bool, About("divide by the sum of the weights")]
Rescale = Annotated[bool, About("scale what is kept of a change to the whole change's L1 norm")]
Unused = Annotated[bool, About("accepted for other tools' recipes; has no effect on the values")]


@method("task_arithmetic", base="required", branches=(1, None), check=weights_sum)
def task_arithmetic(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: DivideAll = False,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """base + lambda * sum(weight * (model - base)): task arithmetic, arXiv 2212.04089."""
    return t.map(moved, _factors(weight, lambda_, normalize))


@method("ties", base="required", branches=(1, None))
def ties(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: Divide = True,
    rescale: Rescale = False,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """Trim, elect, merge: TIES, arXiv 2306.01708.

    Of each change the density * n largest entries are kept (all that equal the last of them, too; one at least); an
    entry's sign is that of the weighted sum (+ for 0); the mean, weighted, is over the kept changes of that sign.
    """
    limits = [(x[0], math.inf) for x in _limits(t, [[t.size - k] if k else None for k in _kept(t, density)])]
    return _merge(t, weight, lambda_, limits=limits, elect=True, normalize=normalize, rescale=rescale)


@method("breadcrumbs", base="required", branches=(1, None), check=weights_sum)
def breadcrumbs(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    gamma: Gamma = 0.01,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: DivideAll = False,
    rescale: Rescale = False,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """Model breadcrumbs, arXiv 2312.06795: of each change the gamma * n largest entries are dropped, then the smallest,
    so that density * n remain (all that equal a limit are kept; at density 1 - gamma and above fewer large ones drop).
    """
    limits = _between(t, density, gamma)
    return _merge(t, weight, lambda_, limits=limits, elect=False, normalize=normalize, rescale=rescale)


@method("breadcrumbs_ties", base="required", branches=(1, None))
def breadcrumbs_ties(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    gamma: Gamma = 0.01,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: Divide = False,
    rescale: Rescale = False,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """The entries of breadcrumbs, the elected signs of ties (arXiv 2312.06795, 2306.01708)."""
    limits = _between(t, density, gamma)
    return _merge(t, weight, lambda_, limits=limits, elect=True, normalize=normalize, rescale=rescale)


@method("dare_linear", base="required", branches=(1, None), check=weights_sum)
def dare_linear(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: DivideAll = False,
    rescale: Annotated[bool, About("divide what is kept by the density")] = True,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """DARE, arXiv 2311.03099: each entry of a change is kept with probability `density` and divided by it, then the
    changes are added. Which are kept depends on the seed, the tensor and the model alone."""
    return _dare(t, weight, density, lambda_, elect=False, normalize=normalize, rescale=rescale)


@method("dare_ties", base="required", branches=(1, None))
def dare_ties(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: Divide = False,
    rescale: Annotated[bool, About("divide what is kept by the density")] = True,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """The entries of dare_linear, the elected signs of ties (arXiv 2311.03099, 2306.01708)."""
    return _dare(t, weight, density, lambda_, elect=True, normalize=normalize, rescale=rescale)


def window(parameters: Mapping[str, Any]) -> None:
    """Raises UserError where della's probabilities would leave 0 to 1."""
    for d, e in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < d < 1 and not (d - e >= 0 and d + e <= 1):
            raise UserError(
                f"epsilon: {e:g} around density {d:g} leaves the range 0 to 1; "
                f"give at most {min(d, 1 - d):g}, or another density"
            )


@method("della", base="required", branches=(1, None), check=window, by_row=True)
def della(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    epsilon: Epsilon = 0.15,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: Divide = True,
    rescale: Rescale = True,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """DELLA, arXiv 2406.11617: an entry of a change is kept with a probability that rises with the rank of its
    magnitude in its row, linearly from density - epsilon to density + epsilon; then the elected signs of ties.

    Entries of equal magnitude have the rank of the first of them; one alone in its row is kept with probability
    density. The kept ones are scaled to the change's L1 norm (over the tensor), as mergekit does; the paper divides
    each by its probability.
    """
    return _della(t, weight, density, epsilon, lambda_, elect=True, normalize=normalize, rescale=rescale)


def window_and_weights(parameters: Mapping[str, Any]) -> None:
    """Both checks."""
    window(parameters)
    weights_sum(parameters)


@method("della_linear", base="required", branches=(1, None), check=window_and_weights, by_row=True)
def della_linear(
    t: Tensor,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    density: Density = 1.0,  # type: ignore[assignment]
    epsilon: Epsilon = 0.15,  # type: ignore[assignment]
    lambda_: Scale = 1.0,
    normalize: DivideAll = False,
    rescale: Rescale = True,
    int8_mask: Unused = False,
    rebase: Rebase = None,
) -> Merged:
    """The entries of della, added as they are (arXiv 2406.11617)."""
    return _della(t, weight, density, epsilon, lambda_, elect=False, normalize=normalize, rescale=rescale)


def _factors(weight: Sequence[float], lambda_: float, normalize: bool) -> list[float]:
    """What each change is multiplied by, in float64."""
    divisor = sum(weight) if normalize else 1.0
    return [lambda_ * w / divisor for w in weight]


def _kept(t: Tensor, density: Sequence[float]) -> list[int]:
    """How many entries of each change a density keeps: floor(density * n), one at least unless the density is 0."""
    return [max(1, int(d * t.size)) if d > 0 else 0 for d in density]


def _limits(t: Tensor, ranks: Sequence[Sequence[int] | None]) -> list[Sequence[float]]:
    """The magnitudes of each change at its ranks; none kept (infinity) where there are none."""
    wanted = [r if r is not None else [0] for r in ranks]
    if all(r is None or list(r) == [0] for r in ranks):
        # The smallest magnitude need not be looked for: all are at least 0.
        return [[math.inf] if r is None else [0.0] for r in ranks]
    found = t.order_statistics(magnitudes, wanted)
    return [[math.inf] * len(w) if r is None else list(f) for r, w, f in zip(ranks, wanted, found, strict=True)]


def _between(t: Tensor, density: Sequence[float], gamma: Sequence[float]) -> list[tuple[float, float]]:
    n = t.size
    ranks: list[list[int] | None] = []
    for d, g in zip(density, gamma, strict=True):
        kept = int(d * n)
        low = max(0, n - kept - int(g * n))
        ranks.append([low, low + kept - 1] if kept else None)
    if all(r == [0, n - 1] for r in ranks):
        return [(0.0, math.inf)] * len(ranks)
    limits = _limits(t, ranks)
    return [(x[0], math.inf if r and r[1] == n - 1 else x[-1]) for r, x in zip(ranks, limits, strict=True)]


def _merge(
    t: Tensor, weight: Sequence[float], lambda_: float, *, limits: Sequence[tuple[float, float]], elect: bool,
    normalize: bool, rescale: bool,
) -> Merged:  # fmt: skip
    scales = _scales(t.sums(_kept_norms, limits)) if rescale else [1.0] * t.branches
    return t.map(_sparse, limits, weight, scales, lambda_, elect=elect, normalize=normalize)


def _scales(norms: np.ndarray) -> list[float]:
    """The L1 norms of the changes over those of what is kept of them, from both in turn; 1 where one is nothing."""
    whole, kept = norms[0::2], norms[1::2]
    some = (whole > 1e-7) & (kept > 1e-7)
    return list(np.where(some, whole / np.where(some, kept, 1.0), 1.0))


def _within(x: Block, limits: Array) -> Masks:
    sizes = magnitudes(x)
    return [(m >= limits[b, 0]) & (m <= limits[b, 1]) & (m > 0) for b, m in enumerate(sizes)]


def _kept_norms(x: Block, limits: Array) -> list[Array]:
    return _norm_pairs(x, _within(x, limits))


def _norm_pairs(x: Block, masks: Masks) -> list[Array]:
    pairs = zip(magnitudes(x), masks, strict=True)
    return [norm for m, kept in pairs for norm in (m, jnp.where(kept, m, 0.0))]


def _sparse(
    x: Block, limits: Array, weight: Array, scales: Array, lambda_: Array, *, elect: bool, normalize: bool
) -> tuple[Array, Masks]:
    return _consensus(x, _within(x, limits), weight, scales, lambda_, elect=elect, normalize=normalize)


def _dare(
    t: Tensor, weight: Sequence[float], density: Sequence[float], lambda_: float, *, elect: bool, normalize: bool,
    rescale: bool,
) -> Merged:  # fmt: skip
    scales = [1.0] * t.branches
    if rescale and t.compat == "mergekit":
        scales = _scales(t.sums(_dropped_norms, density, t.keys))
    elif rescale:
        scales = [1.0 / d if d > 0 else 1.0 for d in density]
    return t.map(_drop, density, t.keys, weight, scales, lambda_, elect=elect, normalize=normalize)


def _chosen(x: Block, density: Array, keys: Array) -> Masks:
    return [(random_bits(x, keys[b]) < density[b]) & (d != 0) for b, d in enumerate(deltas(x))]


def _dropped_norms(x: Block, density: Array, keys: Array) -> list[Array]:
    return _norm_pairs(x, _chosen(x, density, keys))


def _drop(
    x: Block, density: Array, keys: Array, weight: Array, scales: Array, lambda_: Array, *, elect: bool,
    normalize: bool,
) -> tuple[Array, Masks]:  # fmt: skip
    return _consensus(x, _chosen(x, density, keys), weight, scales, lambda_, elect=elect, normalize=normalize)


def _della(
    t: Tensor, weight: Sequence[float], density: Sequence[float], epsilon: Sequence[float], lambda_: float, *,
    elect: bool, normalize: bool, rescale: bool,
) -> Merged:  # fmt: skip
    # At density 0 and 1 nothing is left to chance.
    spread = [e if 0 < d < 1 else 0.0 for d, e in zip(density, epsilon, strict=True)]
    at = Ranked(magnitudes, _places, (density, spread, t.keys))
    masks = t.masks(_by_rank, at, density, spread, t.keys)
    scales = _scales(t.sums(_norm_pairs, masks)) if rescale else [1.0] * t.branches
    return t.map(_consensus, masks, weight, scales, lambda_, elect=elect, normalize=normalize)


def _least_ranks(x: Block, density: Array, epsilon: Array, keys: Array) -> list[Array]:
    """The least rank that keeps an entry; m, the row's length, where none does.

    An entry with random number u is kept where u < density - epsilon + 2 epsilon rank / (m - 1).
    """
    least = []
    for b, branch in enumerate(x.branches):
        m = branch.shape[-1]
        spread = epsilon[b] if m > 1 else 0.0 * epsilon[b]  # one entry alone has no rank
        excess = random_bits(x, keys[b]) - (density[b] - spread)
        step = 2.0 * spread / max(1, m - 1)
        above = jnp.floor(excess / jnp.where(step > 0, step, 1.0)) + 1.0
        found = jnp.where(step > 0, jnp.clip(above, 0.0, m), m).astype(jnp.int32)
        least.append(jnp.where(excess < 0, 0, found))
    return least


def _places(x: Block, density: Array, epsilon: Array, keys: Array) -> list[Array]:
    return [jnp.maximum(least - 1, 0) for least in _least_ranks(x, density, epsilon, keys)]


def _by_rank(x: Block, at: Sequence[Array], density: Array, epsilon: Array, keys: Array) -> Masks:
    """An entry has rank j or more where it is larger than the row's j-th smallest magnitude."""
    triples = zip(magnitudes(x), at, _least_ranks(x, density, epsilon, keys), strict=True)
    return [((j == 0) | ((j < m.shape[-1]) & (m > limit))) & (m > 0) for m, limit, j in triples]


def _consensus(
    x: Block, masks: Masks, weight: Array, scales: Array, lambda_: Array, *, elect: bool, normalize: bool
) -> tuple[Array, Masks]:
    """base + lambda * sum of the weighted kept changes, those against the elected sign left out."""
    changes = [s * d for s, d in zip(scales, deltas(x), strict=True)]
    terms = [jnp.where(k, w * d, 0.0) for k, w, d in zip(masks, weight, changes, strict=True)]
    if elect:
        positive = add(terms) >= 0
        masks = [k & (term != 0) & ((term > 0) == positive) for k, term in zip(masks, terms, strict=True)]
        terms = [jnp.where(k, term, 0.0) for k, term in zip(masks, terms, strict=True)]
    total = add(terms)
    if normalize:
        took_part = masks if elect else [jnp.bool_(True)] * len(masks)
        divisor = add([jnp.where(k, w, 0.0) for k, w in zip(took_part, weight, strict=True)])
        total = total / jnp.where(divisor == 0, 1.0, divisor)
    return x.base + lambda_ * total, masks
