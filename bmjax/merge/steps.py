"""The steps of a recipe on one tensor, as both engines run them, and the report of what they did."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bmjax.merge.methods.method import float32
from bmjax.merge.quantile import add_each
from bmjax.merge.recipe import Recipe, Step


def run(recipe: Recipe, leaves: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
    """The recipe's result for one tensor, float32, and what happened.

    leaves: for every input of the recipe the tensor, all of one shape, Hugging Face layout. The second result holds
    `finite` [inputs] bool and `steps`: for each `kept` [branches] (share of entries), `delta` [branches] (norm of each
    model's change), `reference` and `moved` (norms of the base, and of the result's change from it).

    It can be traced. Called as it is, it runs programs compiled once a shape, which steps and recipes share: numbers
    (weights, lambda) are run-time inputs.
    """
    slots = {name: leaves[name] for name in recipe.inputs}
    finite = [_all_finite(slots[name]) for name in recipe.inputs]
    stats = []
    for step in recipe.steps:
        branches = [slots[name] for name in step.branches]
        base = None if step.base is None else slots[step.base]
        merged = step.method.leaf(base, branches, **_arguments(step, slots))
        reference = branches[0] if base is None else base
        rebase = step.arguments.get("rebase")
        norms = _norms(branches, reference if rebase is None else slots[rebase], reference, merged.leaf)
        stats.append({"kept": merged.kept, **norms})
        slots[step.name] = merged.leaf
    return slots[recipe.steps[-1].name], {"finite": finite, "steps": stats}


def _arguments(step: Step, slots: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The method's keyword arguments: models as their tensors, numbers as float32, the rest as it stands."""
    arguments: dict[str, Any] = {}
    for parameter in step.method.parameters.values():
        value = step.arguments[parameter.name]
        if parameter.about.model:
            value = None if value is None else slots[value]
        elif parameter.traced:
            value = np.asarray(value, np.float32)
        arguments[parameter.argument] = value
    return arguments


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


@jax.jit
def _norms(
    branches: Sequence[jax.Array], origin: jax.Array, reference: jax.Array, merged: jax.Array
) -> dict[str, jax.Array]:
    reference = float32(reference)
    arrays = [*(float32(branch) - float32(origin) for branch in branches), reference, float32(merged) - reference]
    # One reduction for all reads each array once. In two sums, kept apart by the barrier, because in one long float32
    # sum small squares would be lost to rounding.
    squares = [jnp.square(x) for x in arrays]
    rows = lax.reduce(squares, [np.float32(0)] * len(squares), add_each, (squares[0].ndim - 1,))
    norms = jnp.sqrt(jnp.stack([jnp.sum(row) for row in lax.optimization_barrier(rows)]))
    return {"delta": norms[:-2], "reference": norms[-2], "moved": norms[-1]}


@functools.partial(jax.jit, static_argnames="dtype")
def rounded(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`x` in `dtype`, and whether a value overflowed it."""
    x = x.astype(dtype)
    return x, ~jnp.all(jnp.isfinite(x))


@dataclass(frozen=True)
class TensorStats:
    """The statistics of one Hugging Face tensor on the host."""

    name: str
    size: int
    stats: Mapping[str, Any]


def problem(recipe: Recipe, tensor: TensorStats, dtype: Any) -> str | None:
    """What is wrong with a merged tensor, as one line, or None."""
    bad = [name for name, ok in zip(recipe.inputs, tensor.stats["finite"], strict=True) if not ok]
    if bad:
        return f"model '{bad[0]}': tensor '{tensor.name}' holds NaN or infinity; the file or the training run is broken"
    if tensor.stats["overflow"]:
        return (
            f"tensor '{tensor.name}': the merged values overflow {np.dtype(dtype).name}; "
            "write another out_dtype, or lower the weights"
        )
    return None


def report(recipe: Recipe, tensors: Sequence[TensorStats]) -> dict[str, Any]:
    """What a merge did: `tensors`, `layers` and `total`, each {step: {reference_norm, moved_norm, models: {name:
    {kept, delta_norm}}}}. `kept` is a share of entries; a layer's is its tensors' mean weighted by their sizes."""
    groups: dict[str, list[TensorStats]] = {}
    for tensor in tensors:
        groups.setdefault(layer_of(tensor.name), []).append(tensor)
    return {
        "tensors": {t.name: {"size": t.size, **_summary(recipe, [t])} for t in tensors},
        "layers": {
            layer: {"size": sum(t.size for t in group), **_summary(recipe, group)} for layer, group in groups.items()
        },
        "total": {"size": sum(t.size for t in tensors), **_summary(recipe, tensors)},
    }


def layer_of(name: str) -> str:
    """The layer number in a tensor's name as text, or the part that names it: embed_tokens, norm, lm_head."""
    number = re.search(r"\.(\d+)\.", name)
    if number:
        return number.group(1)
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def _summary(recipe: Recipe, tensors: Sequence[TensorStats]) -> dict[str, Any]:
    size = max(1, sum(t.size for t in tensors))
    summary: dict[str, Any] = {}
    for i, step in enumerate(recipe.steps):
        stats = [t.stats["steps"][i] for t in tensors]

        def norm(key: str, *index: int, stats: list[Any] = stats) -> float:
            return float(np.sqrt(sum(float(s[key][index]) ** 2 for s in stats)))

        def kept(b: int, stats: list[Any] = stats) -> float:
            return sum(float(s["kept"][b]) * t.size for s, t in zip(stats, tensors, strict=True)) / size

        models = {name: {"kept": kept(b), "delta_norm": norm("delta", b)} for b, name in enumerate(step.branches)}
        summary[step.name] = {"reference_norm": norm("reference"), "moved_norm": norm("moved"), "models": models}
    return summary
