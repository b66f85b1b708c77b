"""Merging nested dictionaries of arrays in memory, sharded or not: the same steps as over files, no host copy.

Every Hugging Face tensor is merged by itself, as in a file: a parameter stacked over layers is taken layer by layer
(each layer has its own quantiles), and a transposed kernel's rows are its second to last axis. The layouts come from
the parameter table.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from bmjax.config import UserError, nearest
from bmjax.merge.engine import passes
from bmjax.merge.engine.quantile import order_statistics
from bmjax.merge.methods.method import Kernel, Merged, Ranked, find
from bmjax.merge.plan import tensor_names as naming
from bmjax.merge.recipe.recipe import Recipe, Step, read_recipe
from bmjax.merge.report.statistics import Stats, TensorStats, check_overflow, keys, report
from bmjax.model.spec import Param, get, unflatten

Tree = Mapping[str, Any]


def merge_trees(
    method: str,
    base: Tree | None,
    branches: Mapping[str, Tree] | Sequence[Tree],
    table: Sequence[Param],
    *,
    dtype: Any = None,
    **parameters: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One merge: (merged parameters, report).

    parameters: the method's, by recipe name with a trailing underscore for `lambda_`; a per-model one is a number, or
    a sequence in the order of the branches. `rebase` is a parameter tree, `importance` a sequence of them. See
    `run_steps` for the rest.
    """
    named = dict(branches) if isinstance(branches, Mapping) else {f"branch {i}": b for i, b in enumerate(branches)}
    models: dict[str, Tree] = dict(named)
    entries: list[dict[str, Any]] = [{"model": name, "parameters": {}} for name in named]
    block: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": {}}
    if base is not None:
        models["base"], block["base_model"] = base, "base"
    for argument, value in parameters.items():
        name = argument.rstrip("_")
        if isinstance(value, Mapping):
            models[name], block["parameters"][name] = value, name
        elif isinstance(value, (list, tuple)) and all(isinstance(tree, Mapping) for tree in value):
            for i, (entry, tree) in enumerate(zip(entries, value, strict=True)):
                models[f"{name} {i}"], entry["parameters"][name] = tree, f"{name} {i}"
        elif isinstance(value, (list, tuple)):
            if len(value) != len(named):
                raise UserError(f"{name}: {len(value)} values for {len(named)} models; give one a model")
            for entry, number in zip(entries, value, strict=True):
                entry["parameters"][name] = float(number)
        else:
            block["parameters"][name] = value
    return run_steps(read_recipe(block), models, table, dtype=dtype)


def run_steps(
    recipe: Recipe, models: Mapping[str, Tree], table: Sequence[Param], *, dtype: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All steps of a recipe on parameter trees: (the last step's parameters, report as in merge_report.json).

    models: a tree for every name the recipe reads that is not a step. table: `bmjax.model.spec.table(config)`.
    The result is sharded as the recipe's donor (the last step's base) and has type `dtype`, else the recipe's, else
    the donor's. Arithmetic is float32. Raises UserError for a model that is not there, a leaf that is missing or
    misshapen, NaN or infinity in an input.
    """
    for name in recipe.inputs:
        if name not in models:
            raise UserError(f"recipe: no model is named '{name}'{nearest(name, list(models))}")
    for step in recipe.steps:
        if step.slices:
            raise UserError(f"step '{step.name}': slices are for files; parameter trees keep their layers")
    merged: list[tuple[tuple[str, ...], jax.Array]] = []
    tensors: dict[str, TensorStats] = {}
    for row in table:
        leaves = {name: _leaf(models[name], row, name) for name in recipe.inputs}
        kind = np.dtype(dtype or recipe.dtype or leaves[recipe.donor].dtype)
        sharding = leaves[recipe.donor].sharding
        placed = sharding if isinstance(sharding, NamedSharding) else None
        layout = {"stacked": row.stacked, "transposed": row.transposed}
        whole = jnp.zeros(row.shape, kind, device=placed)
        for layer, key in enumerate(row.hf_keys()):
            depth = naming.depth(layer, row.shape[0]) if row.stacked else 0.0
            slots = {name: _take(leaf, layer, **layout) for name, leaf in leaves.items()}
            for name, tensor in slots.items():
                if not bool(_all_finite(tensor)):
                    raise UserError(f"model '{name}': tensor '{key}' holds NaN or infinity; the training run is broken")
            tensor, tensors[key] = _run(recipe, key, depth, slots, kind)
            whole = _put(whole, tensor, layer, **layout, placed=placed)
        merged.append((row.path, whole))
    return unflatten(merged), report(recipe, tensors)


def merge_arrays(
    method: str, base: Any, branches: Sequence[Any], *, seed: int = 0, compat: str | None = None, **parameters: Any
) -> tuple[jax.Array, np.ndarray]:
    """One tensor, in the Hugging Face layout: (merged, float32, and the share of entries taken of each branch).

    parameters: as in `merge_trees`; `rebase` is an array, `importance` one a branch.
    """
    names = [f"branch {i}" for i in range(len(branches))]
    slots = {**dict(zip(names, map(jnp.asarray, branches), strict=True))}
    block: dict[str, Any] = {"merge_method": method, "parameters": {}}
    entries: list[dict[str, Any]] = [{"model": name, "parameters": {}} for name in names]
    if base is not None:
        slots["base"], block["base_model"] = jnp.asarray(base), "base"
    for argument, value in parameters.items():
        name = argument.rstrip("_")
        about = find(method).parameter(name).about
        if about.model and about.each:
            for i, (entry, array) in enumerate(zip(entries, value, strict=True)):
                slots[f"{name} {i}"], entry["parameters"][name] = jnp.asarray(array), f"{name} {i}"
        elif about.model:
            slots[name], block["parameters"][name] = jnp.asarray(value), name
        elif isinstance(value, (list, tuple)):
            for entry, number in zip(entries, value, strict=True):
                entry["parameters"][name] = number
        else:
            block["parameters"][name] = value
    recipe = read_recipe({**block, "models": entries})
    recipe = dataclasses.replace(recipe, seed=seed, compat=compat)
    leaf, stats = _run(recipe, "", 0.0, slots, np.dtype(np.float32))
    found = stats[recipe.steps[-1].name]
    return leaf, found.kept / max(1, found.size)


def _run(
    recipe: Recipe, tensor: str, depth: float, slots: Mapping[str, jax.Array], dtype: Any
) -> tuple[jax.Array, TensorStats]:
    """All steps on one tensor: the last one's result in `dtype`, and what each did."""
    slots, stats = dict(slots), {}
    for step in recipe.steps:
        kind = dtype if step is recipe.steps[-1] else np.dtype(np.float32)
        view = _ArrayTensor(recipe, step, tensor, slots)
        slots[step.name], sums = view.result(step.at(tensor, depth), kind)
        stats[step.name] = Stats.of(view.size, step.branches, sums)
    last = recipe.steps[-1].name
    check_overflow(tensor, stats[last], dtype)
    return slots[last], stats


class _ArrayTensor:
    """One step on one tensor: the `Tensor` of a method, with all rows at once, wherever they lie."""

    def __init__(self, recipe: Recipe, step: Step, tensor: str, slots: Mapping[str, jax.Array]) -> None:
        self._step, self._shape = step, slots[step.branches[0]].shape
        self.size, self.branches = math.prod(self._shape), len(step.branches)
        self.vector = len(self._shape) <= 1
        self.has_base, self.compat, self.rounded_to = step.base is not None, recipe.compat, step.dtype
        self.keys = keys(recipe, step, tensor)
        flat = {name: _as_rows(slots[name]) for name in step.reads}
        models = {name: flat[model] for name, model in step.named.items()}
        base = None if step.base is None else flat[step.base]
        self._block = passes.block(base, [flat[name] for name in step.branches], models)

    def result(self, arguments: Mapping[str, Any], dtype: Any) -> tuple[jax.Array, np.ndarray]:
        """The merged tensor, and the totals of what `passes.statistics` sums."""
        merged = self._step.method.merge(self, arguments)
        run = passes.leaves(merged.kernel, passes.static(merged.static), np.dtype(dtype))
        leaf, kept = run(self._block, self._numbers(merged.numbers))
        rows = passes.statistics()(self._block, leaf, kept)
        return leaf.reshape(self._shape), np.concatenate([np.asarray(_total(r), np.float64) for r in rows])

    def _numbers(self, numbers: Sequence[Any]) -> list[Any]:
        return [self._number(number) for number in numbers]

    def _number(self, number: Any) -> Any:
        if isinstance(number, Ranked):
            arrays = passes.values(number.values, ())(self._block, [])
            places = passes.values(number.places, ())(self._block, self._numbers(number.numbers))
            return [passes.lookup()(_sort_rows(a), p) for a, p in zip(arrays, places, strict=True)]
        if isinstance(number, jax.Array) or (isinstance(number, np.ndarray) and number.dtype == np.uint32):
            return number
        if isinstance(number, list) and any(isinstance(x, jax.Array) for x in number):
            return number
        return np.asarray(number, np.float32)

    def sums(self, kernel: Kernel, *numbers: Any, **static: Any) -> np.ndarray:
        run = passes.row_sums(kernel, passes.static(static))
        return np.asarray(_total(run(self._block, self._numbers(numbers))), np.float64)

    def counts(self, kernel: Kernel, *numbers: Any, **static: Any) -> list[int]:
        return [int(n) for n in self.sums(kernel, *numbers, **static)]

    def highest(self, rows: Any, index: int) -> float:
        return float(jnp.max(rows[index]))

    def columns(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        return passes.column_sums(kernel, passes.static(static))(self._block, self._numbers(numbers))

    def rows(self, kernel: Kernel, *numbers: Any, reorder: bool = False, **static: Any) -> Any:
        return passes.values(kernel, passes.static(static), reorder)(self._block, self._numbers(numbers))

    def whole(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        return passes.values(kernel, passes.static(static))(self._block, self._numbers(numbers))

    def masks(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        return list(passes.values(kernel, passes.static(static))(self._block, self._numbers(numbers)))

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *numbers: Any, **static: Any
    ) -> list[np.ndarray]:
        arrays = passes.values(kernel, passes.static(static))(self._block, self._numbers(numbers))
        return [np.asarray(_statistics(a, np.asarray(r, np.int32))) for a, r in zip(arrays, ranks, strict=True)]

    def map(self, kernel: Kernel, *numbers: Any, **static: Any) -> Merged:
        return Merged(kernel, numbers, static)


_statistics = jax.jit(order_statistics)


@jax.jit
def _total(rows: jax.Array) -> jax.Array:
    """The sums of row sums [K, rows]; apart from them, since in one long float32 sum small terms would be lost."""
    return jnp.sum(rows, axis=1)


@jax.jit
def _sort_rows(x: jax.Array) -> jax.Array:
    return jnp.sort(x, axis=-1)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def _as_rows(x: jax.Array) -> jax.Array:
    """`x` as rows of its last axis; a vector is one row."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1)


def _leaf(tree: Tree, row: Param, name: str) -> jax.Array:
    try:
        leaf = get(tree, row.path)
    except (KeyError, TypeError):
        raise UserError(f"model '{name}': parameter {row.name} is missing") from None
    if tuple(leaf.shape) != row.shape:
        raise UserError(f"model '{name}': parameter {row.name} has shape {tuple(leaf.shape)}, expected {row.shape}")
    return jnp.asarray(leaf)


@functools.partial(jax.jit, static_argnames=("stacked", "transposed"))
def _take(leaf: jax.Array, layer: int, *, stacked: bool, transposed: bool) -> jax.Array:
    """The Hugging Face tensor of one layer."""
    one = lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
    return jnp.swapaxes(one, -1, -2) if transposed else one


@functools.partial(jax.jit, static_argnames=("stacked", "transposed", "placed"), donate_argnums=0)
def _put(
    whole: jax.Array, tensor: jax.Array, layer: int, *, stacked: bool, transposed: bool, placed: NamedSharding | None
) -> jax.Array:
    """`whole` with the Hugging Face tensor of one layer in its place."""
    one = jnp.swapaxes(tensor, -1, -2) if transposed else tensor
    filled = lax.dynamic_update_index_in_dim(whole, one, layer, 0) if stacked else one
    return filled if placed is None else lax.with_sharding_constraint(filled, placed)
