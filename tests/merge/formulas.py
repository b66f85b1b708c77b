"""The merge methods as float64 NumPy formulas, written from their papers and docstrings, not from their code.

`exact(method, base, branches, **parameters)` takes what `tests.merge.reference.merge_arrays` takes.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from tests.merge.reference import EPSILON, softmax

ROUNDING = 2e-6  # relative: a decision this near to its limit may go either way in float32


class Exact(NamedTuple):
    """value: float64. unsure: entries where a decision (kept or not, + or -) lies within rounding of its limit.
    kept: the share of entries taken of each branch."""

    value: np.ndarray
    unsure: np.ndarray
    kept: list[float]


def exact(method, base, branches, **parameters):
    """The merge of one tensor in float64. Rows are its last axis; a vector is one row, and so is a number."""
    shape = branches[0].shape
    if method == "nuslerp" and len(shape) < 2:
        parameters["nuslerp_flatten"] = True

    def rows(x):
        return None if x is None else x.astype(np.float64).reshape(-1, shape[-1] if shape else 1)

    base, branches = rows(base), [rows(x) for x in branches]
    if "rebase" in parameters:
        parameters["rebase"] = rows(parameters["rebase"])
    n = len(branches)
    for name in EACH:
        if name in parameters:
            parameters[name] = np.broadcast_to(np.asarray(parameters[name], np.float64), n)
    result = FORMULAS[method](base, branches, **parameters)
    if not isinstance(result, Exact):
        result = Exact(result, np.zeros(result.shape, bool), [1.0] * n)
    return Exact(result.value.reshape(shape), result.unsure.reshape(shape), result.kept)


EACH = ("weight", "density", "gamma", "scale")


def near(value, limit, scale=None):
    """Where `value` is not `limit`, but may be after rounding."""
    scale = np.abs(limit) if scale is None else scale
    return (value != limit) & (np.abs(value - limit) <= ROUNDING * scale)


# --- averages and arcs


def linear(base, xs, weight=None, normalize=True):
    weight = np.ones(len(xs)) if weight is None else weight
    total = sum(w * x for w, x in zip(weight, xs, strict=True))
    return total / np.sum(weight) if normalize else total


def passthrough(base, xs, scale=(1.0,)):
    return scale[0] * xs[0]


def nearswap(base, xs, t=0.001):
    gap = np.abs(xs[0] - base)
    share = np.where(gap <= t, 1.0, t / np.where(gap > 0, gap, 1.0))
    return (1 - share) * base + share * xs[0]


def arc(u, v, t, axis=None):
    """Shoemake's formula; the straight line where one has no length or they are opposite."""
    lengths = [np.sqrt(np.sum(x * x, axis=axis, keepdims=True)) for x in (u, v)]
    some = (lengths[0] > 0) & (lengths[1] > 0)
    first, second = (x / np.where(length > 0, length, 1.0) for x, length in zip((u, v), lengths, strict=True))
    half = np.sqrt(np.sum((first - second) ** 2, axis=axis, keepdims=True)) / 2
    angle = 2 * np.arcsin(np.clip(half, 0, 1))
    straight = ~some | (angle < 1e-9) | (angle > 3.1415)
    sine = np.where(straight, 1.0, np.sin(angle))
    weight_u = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    weight_v = np.where(straight, t, np.sin(t * angle) / sine)
    return weight_u * u + weight_v * v


def slerp(base, xs, t=0.5):
    return arc(base, xs[0], t)


def nuslerp(base, xs, weight=(1.0, 1.0), nuslerp_flatten=True, nuslerp_row_wise=False, compat=None):
    t = weight[1] / (weight[0] + weight[1])
    rows = nuslerp_row_wise != (compat == "mergekit")
    axis = None if nuslerp_flatten else -1 if rows else 0
    if base is None:
        return arc(*xs, t, axis)
    return base + arc(xs[0] - base, xs[1] - base, t, axis)


def norm(x):
    return np.sqrt(np.sum(x * x))


def unit(x):
    return x / norm(x) if norm(x) > 0 else x


def multislerp(base, xs, weight=None, normalize_weights=True, eps=1e-8):
    """The barycentre in the tangent space at the mean direction, and the way back to the sphere."""
    weight = np.ones(len(xs)) if weight is None else weight
    weight = weight / np.sum(weight) if normalize_weights else weight
    vectors = xs if base is None else [x - base for x in xs]
    mean = sum(w * unit(v) for w, v in zip(weight, vectors, strict=True))
    length = sum(w * norm(v) for w, v in zip(weight, vectors, strict=True))
    if norm(mean) < max(eps, 1e-15):
        merged = sum(w * v for w, v in zip(weight, vectors, strict=True))
    else:
        m = unit(mean)
        tangent = sum(w * (unit(v) - np.sum(unit(v) * m) * m) for w, v in zip(weight, vectors, strict=True))
        merged = length * (np.cos(norm(tangent)) * m + np.sin(norm(tangent)) * unit(tangent))
    return merged if base is None else base + merged


def karcher(base, xs, weight=None, max_iter=10, tol=1e-5):
    weight = np.ones(len(xs)) if weight is None else weight
    share = weight / np.sum(weight)
    length = sum(s * norm(x) for s, x in zip(share, xs, strict=True))
    present = [(s, unit(x)) for s, x in zip(share, xs, strict=True) if norm(x) > 0]
    whole = sum(s for s, _ in present)
    if not present:
        return sum(xs)
    mean = sum(s / whole * u for s, u in present)
    mean = unit(mean) if norm(mean) >= tol else present[0][1]
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for s, u in present:
            across = u - np.sum(u * mean) * mean
            angle = np.arctan2(norm(across), np.sum(u * mean))
            if 1e-12 < angle < np.pi - 1e-6:
                step += s / whole * angle * unit(across)
        if norm(step) < tol:
            break
        mean = unit(np.cos(norm(step)) * mean + np.sin(norm(step)) * unit(step))
    return length * mean


def model_stock(base, xs, weight=None, filter_wise=False):
    part = np.ones(len(xs)) if weight is None else weight
    part = part / np.sum(part)
    flat = base if filter_wise else base.reshape(1, -1)
    d = [x.reshape(flat.shape) - flat for x in xs]
    cosines = []
    for i in range(len(d)):
        for j in range(i + 1, len(d)):
            dot = np.sum(d[i] * d[j], -1, keepdims=True)
            lengths = np.sqrt(np.sum(d[i] ** 2, -1, keepdims=True) * np.sum(d[j] ** 2, -1, keepdims=True))
            cosines.append(np.where(lengths > 0, dot / np.where(lengths > 0, lengths, 1.0), 0.0))
    c, s = np.mean(cosines, axis=0), np.sum(part**2)
    divisor = c + s * (1 - c)
    some = np.abs(divisor) > 1e-6 * s
    ratio = np.where(some, c / np.where(some, divisor, 1.0), 0.0)
    mean = sum(p * (flat + change) for p, change in zip(part, d, strict=True))
    return (ratio * mean + (1 - ratio) * flat).reshape(base.shape)


# --- changes that are kept or not


def task_vectors(base, xs, rebase=None):
    origin = base if rebase is None else rebase
    return [x - origin for x in xs]


def weighted(base, changes, masks, unsure, *, weight, lambda_, normalize, elect, scales=None):
    """base + lambda * the weighted kept changes; with `elect` those of the sign of their sum alone."""
    scales = [1.0] * len(changes) if scales is None else scales
    terms = np.stack([np.where(k, w * s * d, 0) for w, s, d, k in zip(weight, scales, changes, masks, strict=True)])
    masks = np.stack(masks)
    if elect:
        summed = terms.sum(0)
        unsure = unsure | near(summed, 0.0, np.abs(terms).sum(0))
        masks = (terms != 0) & (np.sign(terms) == np.where(summed >= 0, 1, -1))
        terms = terms * masks
    total = terms.sum(0)
    if normalize:
        divisor = (weight[:, None, None] * masks).sum(0) if elect else np.sum(weight)
        total = total / np.where(divisor == 0, 1.0, divisor)
    kept = [float(k.mean()) for k in masks]
    return Exact(base + lambda_ * total, unsure, kept)


def l1_ratios(changes, masks):
    ratios = []
    for d, k in zip(changes, masks, strict=True):
        whole, kept = np.abs(d).sum(), np.abs(d[k]).sum()
        ratios.append(whole / kept if whole > 1e-7 and kept > 1e-7 else 1.0)
    return ratios


def largest(size, density):
    """The density * n largest, and what equals the last of them; where rounding decides."""
    ordered = np.sort(size, axis=None)
    k = max(1, int(density * size.size)) if density > 0 else 0
    if k == 0:
        return np.zeros(size.shape, bool), np.zeros(size.shape, bool)
    limit = ordered[-k]
    return (size >= limit) & (size > 0), near(size, limit)


def between(size, density, gamma):
    """density * n entries below the gamma * n largest, and what equals either end."""
    n, ordered = size.size, np.sort(size, axis=None)
    k, dropped = int(density * n), int(gamma * n)
    if k == 0:
        return np.zeros(size.shape, bool), np.zeros(size.shape, bool)
    first = max(0, n - k - dropped)
    low, high = ordered[first], ordered[first + k - 1]
    return (size >= low) & (size <= high) & (size > 0), near(size, low) | near(size, high)


def task_arithmetic(base, xs, weight=None, lambda_=1.0, normalize=False, rebase=None):
    weight = np.ones(len(xs)) if weight is None else weight
    change = sum(w * d for w, d in zip(weight, task_vectors(base, xs, rebase), strict=True))
    return base + lambda_ * (change / np.sum(weight) if normalize else change)


def sparse(elect, select, normalize_default, rescale_default=False):
    def formula(
        base, xs, weight=None, density=None, gamma=None, lambda_=1.0, normalize=normalize_default,
        rescale=rescale_default, rebase=None,
    ):  # fmt: skip
        n = len(xs)
        weight, density = (np.ones(n) if v is None else v for v in (weight, density))
        changes = task_vectors(base, xs, rebase)
        gamma = np.full(n, 0.01) if gamma is None else gamma
        selections = [select(np.abs(d), p, g) for d, p, g in zip(changes, density, gamma, strict=True)]
        masks, unsure = [m for m, _ in selections], np.any([u for _, u in selections], axis=0)
        return weighted(
            base, changes, masks, unsure, weight=weight, lambda_=lambda_, normalize=normalize, elect=elect,
            scales=l1_ratios(changes, masks) if rescale else None,
        )  # fmt: skip

    return formula


def uniform(shape, seed, tensor, model, start=0):
    """The 24 random bits of every entry as a number in [0, 1): a hash of the entry's index with a key, itself the
    first eight bytes of the SHA-256 of seed, tensor and model. start: the first entry's index."""
    text = f"{seed}\0{tensor}\0{model}"
    low_key, high_key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4")

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    index = np.uint64(start) + np.arange(int(np.prod(shape)), dtype=np.uint64)
    low, high = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    bits = mix(((mix(low) + mix(high)) ^ high_key) + low_key)
    return ((bits >> np.uint32(8)) / 2.0**24).reshape(shape)


def randoms(shape, n, seed, tensor, models):
    return [uniform(shape, seed, tensor, models[i] if models else f"branch {i}") for i in range(n)]


def dare(elect):
    def formula(
        base, xs, weight=None, density=None, lambda_=1.0, normalize=False, rescale=True, rebase=None,
        seed=0, compat=None, tensor="", models=None,
    ):  # fmt: skip
        n = len(xs)
        weight, density = (np.ones(n) if v is None else v for v in (weight, density))
        changes = task_vectors(base, xs, rebase)
        u = randoms(base.shape, n, seed, tensor, models)
        masks = [(r < p) & (d != 0) for r, p, d in zip(u, density, changes, strict=True)]
        scales = None
        if rescale:
            scales = l1_ratios(changes, masks) if compat == "mergekit" else [1 / p if p > 0 else 1 for p in density]
        return weighted(
            base, changes, masks, np.zeros(base.shape, bool), weight=weight, lambda_=lambda_, normalize=normalize,
            elect=elect, scales=scales,
        )  # fmt: skip

    return formula


def della(elect, normalize_default):
    def formula(
        base, xs, weight=None, density=None, epsilon=0.15, lambda_=1.0, normalize=normalize_default, rescale=True,
        rebase=None, seed=0, compat=None, tensor="", models=None,
    ):  # fmt: skip
        n = len(xs)
        weight, density = (np.ones(n) if v is None else v for v in (weight, density))
        epsilon = np.broadcast_to(epsilon, n)
        changes = task_vectors(base, xs, rebase)
        masks, unsure = [], np.zeros(base.shape, bool)
        for d, p, e, u in zip(changes, density, epsilon, randoms(base.shape, n, seed, tensor, models), strict=True):
            rank = np.stack([np.searchsorted(np.sort(row), row) for row in np.abs(d)])
            ranked = 0 < p < 1 and d.shape[1] > 1
            chance = p - e + 2 * e * rank / (d.shape[1] - 1) if ranked else np.full(d.shape, p)
            masks.append((u < chance) & (d != 0))
            unsure |= (np.abs(u - chance) < 1e-7) & (d != 0)
        return weighted(
            base, changes, masks, unsure, weight=weight, lambda_=lambda_, normalize=normalize, elect=elect,
            scales=l1_ratios(changes, masks) if rescale else None,
        )  # fmt: skip

    return formula


def sce(base, xs, select_topk=1.0, rebase=None):
    d = np.stack(task_vectors(base, xs, rebase))
    # n^2 times the variance: exact where the changes are multiples of one step, so that equal ones stay equal.
    spread = len(d) * np.sum(d**2, axis=0) - np.sum(d, axis=0) ** 2
    unsure = np.zeros(base.shape, bool)
    if select_topk < 1:
        k = int(select_topk * np.count_nonzero(np.any(d != d[0], axis=0)))
        limit = np.sort(spread, axis=None)[-k] if k else np.inf
        unsure = near(spread, limit, np.sum(d**2, axis=0)) if k else unsure
        d = d * (spread >= limit)
    square = np.array([np.sum(x**2) for x in d])
    share = square / square.sum() if square.sum() > 0 else np.full(len(d), 1 / len(d))
    summed = d.sum(0)
    unsure = unsure | near(summed, 0.0, np.abs(d).sum(0))
    agree = (d != 0) & (np.sign(d) == np.where(summed >= 0, 1, -1))
    share = share[:, None, None] * agree
    divisor = share.sum(0)
    merged = base + (share * d).sum(0) / np.where(divisor > 0, divisor, 1.0)
    return Exact(merged, unsure, [float(a.mean()) for a in agree])


def ram(base, xs, epsilon=1e-5, r=0.0, alpha=0.0):
    d = np.stack([x - base for x in xs])
    changed = np.abs(d) > epsilon
    unsure = np.any(near(np.abs(d), epsilon), axis=0)
    copies = changed.sum(0)
    total = np.zeros(base.shape)
    for x, k in zip(d, changed, strict=True):
        shared, unique = np.sum(k & (copies > 1)), np.sum(k & (copies == 1))
        factor = 1 + r * min(shared / max(unique, epsilon) if shared else 0.0, alpha)
        total += np.where(k & (copies == 1), factor * x, 0) + np.where(k & (copies > 1), x / np.maximum(copies, 1), 0)
    return Exact(base + total, unsure, [float(k.mean()) for k in changed])


def ramplus_tl(base, xs, epsilon=1e-5, r=0.1, alpha=0.2):
    return ram(base, xs, epsilon, r, alpha)


def arcee_fusion(base, xs, lambda_=1.0, combine="mean", importance="row", rebase=None, compat=None):
    changes = task_vectors(base, xs, rebase)
    masks, unsure = [], np.zeros(base.shape, bool)
    for d in changes:
        score = -d
        if importance == "row":
            b = base.astype(np.longdouble)
            p, q = softmax(b + d) + np.longdouble(EPSILON), softmax(b) + np.longdouble(EPSILON)
            divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
            shifted = d.max(-1, keepdims=True) == d.min(-1, keepdims=True)  # which the softmax does not see
            score = (np.abs(d) * np.where(shifted, 0, divergence)).astype(np.float64)
        ordered = np.sort(score, axis=None)
        low, middle, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
        limit = middle + 1.5 * (high - low)
        masks.append((score >= limit) & (d != 0))
        unsure |= near(score, limit, 20 * np.abs(limit))
    copies = np.sum(masks, axis=0)
    total = np.sum([np.where(k, d, 0) for k, d in zip(masks, changes, strict=True)], axis=0)
    total = total / np.maximum(copies, 1) if combine == "mean" else total
    return Exact(base + lambda_ * total, unsure, [float(np.mean(k)) for k in masks])


FORMULAS = {
    "arcee_fusion": arcee_fusion,
    "breadcrumbs": sparse(False, between, False),
    "breadcrumbs_ties": sparse(True, between, False),
    "dare_linear": dare(False),
    "dare_ties": dare(True),
    "della": della(True, True),
    "della_linear": della(False, False),
    "karcher": karcher,
    "linear": linear,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "nearswap": nearswap,
    "nuslerp": nuslerp,
    "passthrough": passthrough,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "sce": sce,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": sparse(True, lambda size, density, gamma: largest(size, density), True),
}
