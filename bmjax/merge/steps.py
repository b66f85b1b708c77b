"""The steps of a recipe on one tensor: the program that both engines compile, so that they agree."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.merge.methods import find
from bmjax.merge.quantile import add_each
from bmjax.merge.recipe import Recipe


@dataclass(frozen=True)
class PlannedStep:
    """A step whose models are slots: 0.. are the recipe's inputs, then one slot for each step's result."""

    method: str
    base: int | None
    branches: tuple[int, ...]
    models: tuple[tuple[str, int], ...]
    choices: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """What of a recipe decides the compiled program: all but its numbers. Hashable: the key of the jit cache."""

    inputs: int
    steps: tuple[PlannedStep, ...]


Numbers = tuple[dict[str, np.ndarray], ...]


def plan(recipe: Recipe) -> tuple[Plan, Numbers]:
    """The program of a recipe, and its numbers (weights, lambda, ...) by step and argument, float32."""
    slots = {name: i for i, name in enumerate((*recipe.inputs, *(step.name for step in recipe.steps)))}
    steps, numbers = [], []
    for step in recipe.steps:
        parameters = step.method.parameters.values()
        given = {p: step.arguments[p.name] for p in parameters}
        models = tuple((p.argument, slots[v]) for p, v in given.items() if p.about.model and v is not None)
        choices = tuple((p.argument, v) for p, v in given.items() if not p.traced and not p.about.model)
        numbers.append({p.argument: np.asarray(v, np.float32) for p, v in given.items() if p.traced})
        base = None if step.base is None else slots[step.base]
        branches = tuple(slots[name] for name in step.branches)
        steps.append(PlannedStep(step.method.name, base, branches, models, choices))
    return Plan(len(recipe.inputs), tuple(steps)), tuple(numbers)


def run(plan: Plan, numbers: Numbers, leaves: Sequence[jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
    """The recipe's result for one tensor of every input model, float32, and what happened.

    leaves: [inputs] arrays of one shape, Hugging Face layout. The second result holds `finite` [inputs] bool and
    `steps`: for each `kept` [branches] (share of entries), `delta` [branches] (norm of each model's change),
    `reference` and `moved` (norms of the base, and of the result's change from it).
    """
    slots = [leaf.astype(jnp.float32) for leaf in leaves]
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in slots])
    stats = []
    for step, values in zip(plan.steps, numbers, strict=True):
        branches = [slots[i] for i in step.branches]
        base = None if step.base is None else slots[step.base]
        models = {name: slots[i] for name, i in step.models}
        merged = find(step.method).leaf(base, branches, **values, **models, **dict(step.choices))
        reference = branches[0] if base is None else base
        origin = models.get("rebase", reference)
        norms = _norms([*(branch - origin for branch in branches), reference, merged.leaf - reference])
        stats.append({"kept": merged.kept, "delta": norms[:-2], "reference": norms[-2], "moved": norms[-1]})
        slots.append(merged.leaf)
    return slots[-1], {"finite": finite, "steps": stats}


def _norms(arrays: Sequence[jax.Array]) -> jax.Array:
    """The Euclidean norm of each array [len(arrays)]; all have one shape."""
    # One reduction for all reads each array once. In two sums, kept apart by the barrier, because in one long float32
    # sum small squares would be lost to rounding.
    squares = [jnp.square(jnp.atleast_1d(x)) for x in arrays]
    rows = lax.reduce(squares, [np.float32(0)] * len(squares), add_each, (squares[0].ndim - 1,))
    return jnp.sqrt(jnp.stack([jnp.sum(row) for row in lax.optimization_barrier(rows)]))


def merge_leaf(
    plan: Plan,
    numbers: Numbers,
    leaves: Sequence[jax.Array],
    *,
    dtype: Any,
    stacked: bool = False,
    transposed: bool = False,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """`run`, compiled once a shape, on leaves as a model holds them; rounded once, to `dtype`.

    stacked: the first axis counts layers, each a tensor of its own (statistics then have a leading layer axis).
    transposed: the last two axes are swapped against the Hugging Face layout. sharding: of the result.
    """
    return _compiled(plan, np.dtype(dtype), stacked, transposed, sharding)(numbers, tuple(leaves))


@functools.lru_cache(maxsize=256)
def _compiled(plan: Plan, dtype: Any, stacked: bool, transposed: bool, sharding: NamedSharding | None) -> Any:
    def one(numbers: Numbers, leaves: Sequence[jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        if transposed:
            leaves = [jnp.swapaxes(leaf, -1, -2) for leaf in leaves]
        leaf, stats = run(plan, numbers, leaves)
        stats["overflow"] = ~jnp.all(jnp.isfinite(leaf.astype(dtype)))
        return (jnp.swapaxes(leaf, -1, -2) if transposed else leaf).astype(dtype), stats

    def program(numbers: Numbers, leaves: Sequence[jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        # One layer at a time: temporaries (importance, float32 copies) then take one layer's memory, not the stack's.
        return lax.map(functools.partial(one, numbers), leaves) if stacked else one(numbers, leaves)

    if sharding is None:
        return jax.jit(program)
    return jax.jit(program, out_shardings=(sharding, NamedSharding(sharding.mesh, PartitionSpec())))


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
