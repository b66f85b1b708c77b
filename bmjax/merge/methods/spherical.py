"""Means on the sphere: a tensor is a vector, its direction and its length are averaged apart.

Every mean is a combination of the models, so its factors follow from the models' products with each other alone: one
pass for those, one for the combination.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from bmjax.config import UserError
from bmjax.merge.lazy import Array
from bmjax.merge.methods.kernels import Block, add, deltas, dot
from bmjax.merge.methods.linear import weights_sum
from bmjax.merge.methods.method import About, Merged, PerModel, Tensor, method

Share = Annotated[PerModel, About("how near the result is to the model", per_model=True)]


def _check_multislerp(parameters: Mapping[str, Any]) -> None:
    weights_sum({"weight": parameters["weight"], "normalize": parameters.get("normalize_weights", True)})


@method("multislerp", base="optional", branches=(1, None), check=_check_multislerp)
def multislerp(
    t: Tensor,
    *,
    weight: Share = (1.0,),
    normalize_weights: Annotated[bool, About("divide the weights by their sum")] = True,
    eps: Annotated[float, About("a mean direction shorter than this is none", least=0)] = 1e-8,
) -> Merged:
    """The direction of sum(weight * model / |model|) with the length sum(weight * |model|); with a base, that of the
    changes from it, added to the base.

    What the weighted barycentre in the tangent space at that mean comes to: it is the mean itself. Where the directions
    cancel out (shorter than `eps`) there is no mean direction, and the plain weighted sum is taken.
    """
    gram = products(t, "base" if t.has_base else "none")
    weights = np.asarray(weight, np.float64)
    if normalize_weights:
        weights = weights / weights.sum()
    lengths, unit = _unit(gram)
    along = np.where(lengths > 0, weights, 0.0)
    mean = np.sqrt(max(0.0, along @ unit @ along))
    directed = mean >= eps and mean > 0
    length = float(weights @ lengths)
    factors = along * length / np.where(lengths > 0, lengths, 1.0) / mean if directed else weights
    return _combination(t, factors, "base" if t.has_base else "none")


def _check_karcher(parameters: Mapping[str, Any]) -> None:
    if any(w < 0 for w in parameters["weight"]):
        raise UserError("weight: a Karcher mean needs weights of at least 0")
    weights_sum(parameters)


@method("karcher", base="unused", branches=(1, None), check=_check_karcher)
def karcher(
    t: Tensor,
    *,
    weight: Share = (1.0,),
    max_iter: Annotated[int, About("most steps towards the mean", least=1)] = 10,
    tol: Annotated[float, About("a step shorter than this is the last", least=0)] = 1e-5,
) -> Merged:
    """The Karcher (Riemannian) mean of the directions on the sphere, with the mean length (Grove and Karcher 1973).

    From the mean direction m, steps of the exponential map along sum(weight * log_m(model)). The mean is a combination
    of the models, which the steps are taken on in float64.
    """
    lengths, unit = _unit(products(t, "none"))
    weights = np.asarray(weight, np.float64) / sum(weight)
    some = lengths > 0
    if not some.any():
        return _combination(t, np.ones(t.branches), "none")
    along = np.where(some, weights, 0.0)
    along = along / along.sum() if along.sum() > 0 else some / some.sum()
    mean = along.copy()
    if np.sqrt(max(0.0, mean @ unit @ mean)) < tol:
        mean = np.eye(t.branches)[int(np.argmax(some))]
    mean = mean / np.sqrt(mean @ unit @ mean)
    for _ in range(max_iter):
        cosine = np.clip(unit @ mean, -1.0, 1.0)
        angle = np.arccos(cosine)
        # log_m(u) = (angle / sin angle) (u - cosine m); opposite to m no direction is best.
        turn = np.where((angle > 1e-12) & (angle < np.pi - 1e-9), angle / np.where(angle > 0, np.sin(angle), 1.0), 0.0)
        turn = np.where(angle <= 1e-12, 1.0, turn) * along
        step = turn - (turn @ cosine) * mean
        length = np.sqrt(max(0.0, step @ unit @ step))
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean = mean / np.sqrt(mean @ unit @ mean)
    factors = mean * float(weights @ lengths) / np.where(some, lengths, 1.0)
    return _combination(t, np.where(some, factors, 0.0), "none")


def products(t: Tensor, against: str) -> np.ndarray:
    """Compute the products of the models, or of their changes, with each other: float64 [branches, branches].

    against: "base" for changes from the base, "none" for the models themselves.
    """
    gram = np.zeros((t.branches, t.branches))
    gram[np.triu_indices(t.branches)] = t.sums(_products, against=against)
    gram = gram + np.triu(gram, 1).T
    if against == "none":
        # Of the first model and the others' differences from it: their products' float32 rounding would be larger than
        # the angles between models that are near each other.
        whole = np.eye(t.branches)
        whole[:, 0] = 1.0
        gram = whole @ gram @ whole.T
    return gram


def _unit(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths, and the products of the unit vectors, 0 for a vector of no length."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.where(lengths > 0, lengths, 1.0)
    return lengths, gram / np.outer(scale, scale)


def _vectors(x: Block, against: str) -> list[Array]:
    return list(x.branches) if against == "none" else deltas(x)


def _products(x: Block, *, against: str) -> list[Array]:
    vectors = _vectors(x, against)
    if against == "none":
        vectors = [vectors[0], *(v - vectors[0] for v in vectors[1:])]
    return [u * v for i, u in enumerate(vectors) for v in vectors[i:]]


def _combination(t: Tensor, factors: np.ndarray, against: str) -> Merged:
    # By how much the factors exceed 1 is taken in float64: rounded to float32, they may add up to one rounding more.
    return t.map(_combine, list(factors), float(factors.sum()) - 1.0, against=against)


def _combine(x: Block, factors: Array, excess: Array, *, against: str) -> tuple[Array, None]:
    vectors = _vectors(x, against)
    if against == "base":
        return x.base + dot(factors, vectors), None
    # In differences from the first, so that an entry on which all agree loses no bit to the factors' rounding.
    first = vectors[0]
    changes = [f * (v - first) for f, v in zip(factors[1:], vectors[1:], strict=True)]
    return first + add([excess * first, *changes]), None
