"""Merging nested dictionaries of arrays in memory, sharded or not: the same steps as over files, no host copy.

Every Hugging Face tensor is merged by itself, as in a file: a parameter stacked over layers is taken layer by layer
(each layer has its own quantiles), and a transposed kernel's rows are its second to last axis. The layouts come from
the parameter table.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from bmjax.config import UserError, nearest
from bmjax.merge.recipe import Recipe, read_recipe
from bmjax.merge.steps import TensorStats, problem, report, rounded, run
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
    merged, pending = [], []
    for row in table:
        leaves = {name: _leaf(models[name], row, name) for name in recipe.inputs}
        kind = np.dtype(dtype or recipe.dtype or leaves[recipe.donor].dtype)
        sharding = leaves[recipe.donor].sharding
        placed = sharding if isinstance(sharding, NamedSharding) else None
        layout = {"stacked": row.stacked, "transposed": row.transposed}
        whole = jnp.zeros(row.shape, kind, device=placed)
        for layer, key in enumerate(row.hf_keys()):
            tensor, stats = run(recipe, {name: _take(leaf, layer, **layout) for name, leaf in leaves.items()})
            tensor, stats["overflow"] = rounded(tensor, kind)
            whole = _put(whole, tensor, layer, **layout, placed=placed)
            pending.append((key, int(np.prod(row.hf_shape)), kind, stats))
        merged.append((row.path, whole))
    tensors = []
    for key, size, kind, stats in pending:
        tensor_stats = TensorStats(key, size, jax.device_get(stats))
        if wrong := problem(recipe, tensor_stats, kind):
            raise UserError(wrong)
        tensors.append(tensor_stats)
    return unflatten(merged), report(recipe, tensors)


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
