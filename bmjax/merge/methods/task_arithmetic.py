"""Sums of task vectors, whole or sparsified, with or without a majority of signs: the table FAMILY has all members.

Three choices make a member: which entries of a change are kept, whether changes against the elected sign are left out,
and how the kept ones are scaled. Then, for all of them,

    base + lambda * sum(weight * kept change)   [normalize: / sum of the weights that took part]
"""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from bmjax.config import UserError
from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, Kernel, Masks, add, add_kept, deltas, magnitudes, moved, random_bits
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import (
    METHODS,
    About,
    Merged,
    Method,
    Parameter,
    PerModel,
    Rebase,
    Scale,
    Tensor,
    Weight,
    parameters_of,
)

Density = Annotated[PerModel, About("share of the model's changes to keep", per_model=True, least=0, most=1)]
Gamma = Annotated[PerModel, About("share of the largest changes to drop", per_model=True, least=0, most=1)]
Epsilon = Annotated[
    PerModel, About("how much the chance to be kept rises and falls with the rank", per_model=True, least=0, most=1)
]


@dataclass(frozen=True)
class Member:
    """One method of the family.

    kept: which entries of a change are kept. chosen_by: the parameters that this depends on. elect: whether changes
    against the sign of an entry's weighted sum are left out. normalize, rescale: the defaults of these parameters; None
    for a member without it.
    """

    name: str
    kept: Literal["all", "largest", "between", "random", "random by rank"]
    chosen_by: tuple[str, ...]
    elect: bool
    normalize: bool
    rescale: bool | None
    summary: str


FAMILY = (
    Member("task_arithmetic", "all", (), elect=False, normalize=False, rescale=None, summary="""
    base + lambda * sum(weight * (model - base)): task arithmetic, arXiv 2212.04089."""),

    Member("ties", "largest", ("density",), elect=True, normalize=True, rescale=False, summary="""
    Trim, elect, merge: TIES, arXiv 2306.01708.

    Of each change the density * n largest entries are kept (all that equal the last of them, too; one at least); an
    entry's sign is that of the weighted sum (+ for 0); the mean, weighted, is over the kept changes of that sign."""),

    Member("breadcrumbs", "between", ("density", "gamma"), elect=False, normalize=False, rescale=False, summary="""
    Model breadcrumbs, arXiv 2312.06795: of each change the gamma * n largest entries are dropped, then the smallest,
    so that density * n remain (all that equal a limit are kept; at density 1 - gamma and above fewer large ones drop).
    """),

    Member("breadcrumbs_ties", "between", ("density", "gamma"), elect=True, normalize=False, rescale=False, summary="""
    The entries of breadcrumbs, the elected signs of ties (arXiv 2312.06795, 2306.01708)."""),

    Member("dare_linear", "random", ("density",), elect=False, normalize=False, rescale=True, summary="""
    DARE, arXiv 2311.03099: each entry of a change is kept with probability `density` and divided by it, then the
    changes are added. Which are kept depends on the seed, the tensor and the model alone."""),

    Member("dare_ties", "random", ("density",), elect=True, normalize=False, rescale=True, summary="""
    The entries of dare_linear, the elected signs of ties (arXiv 2311.03099, 2306.01708)."""),

    Member("della", "random by rank", ("density", "epsilon"), elect=True, normalize=True, rescale=True, summary="""
    DELLA, arXiv 2406.11617: an entry of a change is kept with a probability that rises with the rank of its
    magnitude in its row, linearly from density - epsilon to density + epsilon; then the elected signs of ties.

    Entries of equal magnitude have the rank of the first of them; one alone in its row is kept with probability
    density. The kept ones are scaled to the change's L1 norm (over the tensor), as mergekit does; the paper divides
    each by its probability."""),

    Member("della_linear", "random by rank", ("density", "epsilon"), elect=False, normalize=False, rescale=True,
           summary="The entries of della, added as they are (arXiv 2406.11617)."),
)  # fmt: skip


def merge(
    member: Member,
    t: Tensor,
    *,
    weight: Weight = (1.0,),
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    epsilon: Epsilon = (0.15,),
    lambda_: Scale = 1.0,
    normalize: Annotated[bool, About("divide by the sum of the weights")] = False,
    rescale: Annotated[bool, About("scale what is kept of a change to the whole change's L1 norm")] = False,
    rebase: Rebase = None,
) -> Merged:
    """Merge one tensor as `member` does. The signature has the parameters of all members, see `_parameters`."""
    if member.kept == "all":
        divisor = sum(weight) if normalize else 1.0
        return t.map(moved, [lambda_ * w / divisor for w in weight])
    # `select(block, *operands)` gives for each branch the mask of the entries that are kept.
    select: Kernel
    operands: tuple[Any, ...]
    if member.kept == "largest":
        # One entry at least is kept, unless the density is 0.
        ranks = [[t.size - max(1, int(d * t.size))] if d > 0 else None for d in density]
        select, operands = _above, ([_below(low) for low, *_ in _limits(t, ranks)],)
    elif member.kept == "between":
        select, operands = _within, ([(_below(low), high) for low, high in _range_limits(t, density, gamma)],)
    elif member.kept == "random":
        select, operands = _chosen, (density, t.keys)
    else:
        # At density 0 and 1 nothing is left to chance.
        spread = [e if 0 < d < 1 else 0.0 for d, e in zip(density, epsilon, strict=True)]
        chance = (density, spread, t.keys)
        select, operands = _stored, (t.masks_by_rank(magnitudes, _least_ranks, *chance),)
    if not rescale:
        scales = [1.0] * t.branches
    elif member.kept == "random" and t.compat != "mergekit":
        scales = [1.0 / d if d > 0 else 1.0 for d in density]
    else:
        # The L1 norm of each change over that of what is kept of it; 1 where either is nothing.
        norms = t.sums(_kept_norms, *operands, select=select)
        whole, kept = norms[0::2], norms[1::2]
        some = (whole > 1e-7) & (kept > 1e-7)
        scales = list(np.where(some, whole / np.where(some, kept, 1.0), 1.0))
    return t.map(_consensus, weight, scales, lambda_, *operands, select=select, elect=member.elect, normalize=normalize)


def _parameters(member: Member) -> dict[str, Parameter]:
    """Return the member's own table: the parameters it has, with its defaults and what they mean to it."""
    table = parameters_of(merge)
    unused = {"density", "gamma", "epsilon"}.difference(member.chosen_by)
    for name in unused if member.rescale is not None else unused | {"rescale"}:
        del table[name]
    table["normalize"] = replace(table["normalize"], default=member.normalize)
    if member.elect:
        about = About("divide by the sum of the weights that took part in an entry")
        table["normalize"] = replace(table["normalize"], about=about)
    if member.rescale is not None:
        about = About("divide what is kept by the density") if member.kept == "random" else table["rescale"].about
        table["rescale"] = replace(table["rescale"], default=member.rescale, about=about)
    return table


def _check(member: Member, parameters: Mapping[str, Any]) -> None:
    if "epsilon" in parameters:
        for d, e in zip(parameters["density"], parameters["epsilon"], strict=True):
            if 0 < d < 1 and not (d - e >= 0 and d + e <= 1):
                raise UserError(
                    f"epsilon: {e:g} around density {d:g} leaves the range 0 to 1; "
                    f"give at most {min(d, 1 - d):g}, or another density"
                )
    if not member.elect:
        weights_sum(parameters)


for _member in FAMILY:
    METHODS[_member.name] = Method(
        _member.name,
        functools.partial(merge, _member),
        base="required",
        branches=(1, None),
        parameters=_parameters(_member),
        summary=inspect.cleandoc(_member.summary),
        check=functools.partial(_check, _member),
        by_row=_member.kept == "random by rank",
    )


def _limits(t: Tensor, ranks: Sequence[Sequence[int] | None]) -> list[Sequence[float]]:
    """Return the magnitudes of each change at its ranks; infinity, so that nothing is kept, where there are none."""
    if all(r is None or list(r) == [0] for r in ranks):
        # The smallest magnitude need not be looked for: all are at least 0.
        return [[math.inf] if r is None else [0.0] for r in ranks]
    statistics = t.order_statistics(magnitudes, [[0] if r is None else r for r in ranks])
    return [[math.inf] if r is None else list(values) for r, values in zip(ranks, statistics, strict=True)]


def _range_limits(t: Tensor, density: Sequence[float], gamma: Sequence[float]) -> list[tuple[float, float]]:
    """Return the least and the largest magnitude of each change that breadcrumbs keeps."""
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


# Kernels


def _above(x: Block, limits: Array) -> Masks:
    """Keep entries whose magnitude is above a limit of at least 0. limits: [branches]."""
    return [m > limits[b] for b, m in enumerate(magnitudes(x))]


def _within(x: Block, limits: Array) -> Masks:
    """Keep entries whose magnitude is above the first of two limits, and at most the second. limits: [branches, 2]."""
    return [(m > limits[b, 0]) & (m <= limits[b, 1]) for b, m in enumerate(magnitudes(x))]


def _below(limit: float) -> np.float32:
    """Return the largest float32 below a limit that is kept itself; at least 0, since no change is nothing to keep."""
    return np.maximum(np.nextafter(np.float32(limit), np.float32(-np.inf)), np.float32(0))


def _chosen(x: Block, density: Array, keys: Array) -> Masks:
    return [(random_bits(x, keys[b]) < density[b]) & (d != 0) for b, d in enumerate(deltas(x))]


def _stored(x: Block, masks: Masks) -> Masks:
    return masks


def _least_ranks(x: Block, density: Array, epsilon: Array, keys: Array) -> list[Array]:
    """Return for every entry the least rank in its row at which it is kept; the row's length m where it never is.

    An entry with random number u is kept where u < density - epsilon + 2 epsilon rank / (m - 1).
    """
    least = []
    for b, branch in enumerate(x.branches):
        m = branch.shape[-1]
        spread = epsilon[b] if m > 1 else 0.0 * epsilon[b]  # one entry alone has no rank
        excess = random_bits(x, keys[b]) - (density[b] - spread)
        step = 2.0 * spread / max(1, m - 1)
        above = jnp.floor(excess / jnp.where(step > 0, step, 1.0)) + 1.0
        rank = jnp.where(step > 0, jnp.clip(above, 0.0, m), m).astype(jnp.int32)
        least.append(jnp.where(excess < 0, 0, rank))
    return least


def _kept_norms(x: Block, *operands: Any, select: Kernel) -> list[Array]:
    """Return the terms of the L1 norm of each change, and of what is kept of it."""
    pairs = zip(magnitudes(x), select(x, *operands), strict=True)
    return [norm for m, kept in pairs for norm in (m, jnp.where(kept, m, 0.0))]


def _consensus(
    x: Block, weight: Array, scales: Array, lambda_: Array, *operands: Any, select: Kernel, elect: bool, normalize: bool
) -> tuple[Array, Masks]:
    """Compute base + lambda * sum of the weighted kept changes, those against the elected sign left out."""
    masks = select(x, *operands)
    terms = [jnp.where(k, w * (s * d), 0.0) for k, w, s, d in zip(masks, weight, scales, deltas(x), strict=True)]
    if elect:
        # Each term's mask is whether its sign is the elected one, so that it is read off the term alone.
        positive = add(terms) >= 0
        masks = [jnp.where(positive, term, -term) > 0 for term in terms]
    total = add_kept(masks, terms) if elect else add(terms)
    if normalize:
        divisor = add_kept(masks if elect else [jnp.bool_(True)] * len(masks), weight)
        total = total / jnp.where(divisor == 0, 1.0, divisor)
    return x.base + lambda_ * total, masks
