"""Merging nested dictionaries of arrays in memory, sharded or not: the same steps as over files, no host copy.

Every Hugging Face tensor is merged by itself, as in a file: a parameter stacked over layers is taken layer by layer
(each layer has its own quantiles), and a transposed kernel's rows are its second to last axis. The layouts come from
the parameter table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from bmjax.config import UserError, nearest
from bmjax.merge.recipe import Recipe, read_recipe
from bmjax.merge.steps import TensorStats, merge_leaf, plan, problem, report
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
    a sequence in the order of the branches. `rebase` is a parameter tree. See `run_steps` for the rest.
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
    program, numbers = plan(recipe)
    merged, pending = [], []
    for row in table:
        leaves = [_leaf(models[name], row, name) for name in recipe.inputs]
        donor = leaves[recipe.inputs.index(recipe.donor)]
        placed = getattr(donor, "sharding", None)
        leaf, stats = merge_leaf(
            program,
            numbers,
            leaves,
            dtype=dtype or recipe.dtype or donor.dtype,
            stacked=row.stacked,
            transposed=row.transposed,
            sharding=placed if isinstance(placed, NamedSharding) else None,
        )
        merged.append((row.path, leaf))
        pending.append((row, leaf.dtype, stats))
    tensors = []
    for row, kind, stats in pending:
        host = jax.device_get(stats)
        for i, key in enumerate(row.hf_keys()):
            own = jax.tree.map(lambda x, i=i: np.asarray(x)[i], host) if row.stacked else host
            tensor = TensorStats(key, int(np.prod(row.hf_shape)), own)
            if line := problem(recipe, tensor, kind):
                raise UserError(line)
            tensors.append(tensor)
    return unflatten(merged), report(recipe, tensors)


def _leaf(tree: Tree, row: Param, name: str) -> Any:
    try:
        leaf = get(tree, row.path)
    except (KeyError, TypeError):
        raise UserError(f"model '{name}': parameter {row.name} is missing") from None
    if tuple(leaf.shape) != row.shape:
        raise UserError(f"model '{name}': parameter {row.name} has shape {tuple(leaf.shape)}, expected {row.shape}")
    return leaf
