"""Merging nested dictionaries of arrays in memory, sharded or not: the same steps as over files, without host copies.

`merge_trees` is the public entry for merges inside a training job; no other part of bmjax calls it. Every Hugging Face
tensor is merged by itself, as in a file. A parameter stacked over layers is taken layer by layer, so each layer has its
own quantiles. A transposed kernel's rows are its second to last axis. The layouts come from the parameter table.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from bmjax.config import UserError, nearest
from bmjax.merge.engine.tensor import AllRows, BlockTensor, block_of
from bmjax.merge.plan import tensor_names
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.merge.report.statistics import Stats, TensorStats, check_overflow, report
from bmjax.model.spec import Param, get, unflatten

Tree = Mapping[str, Any]


def merge_trees(
    recipe: Recipe | str | Path | Mapping[str, Any],
    models: Mapping[str, Tree],
    table: Sequence[Param],
    *,
    dtype: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge parameter trees by all steps of a recipe, in float32 arithmetic.

    Arguments:
        recipe: a recipe, or what `read_recipe` reads.
        models: a tree for every name the recipe reads that is not a step. Leaves have the shapes of `table`.
        table: the layout of the trees, `bmjax.model.spec.table(config)`.
        dtype: of the result, a floating-point type; else the recipe's, else the donor's (the last step's base).
    Returns:
        The last step's parameters, sharded as the donor's, and the report as in merge_report.json.
    Raises:
        UserError: a model that is not there, a leaf that is missing or misshapen, NaN or infinity in an input, and
            what a recipe asks for that trees cannot have: slices, rows of other tokens; a dtype of whole numbers.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    for name in recipe.inputs:
        if name not in models:
            raise UserError(f"recipe: no model is named '{name}'{nearest(name, list(models))}")
    if sliced := [step.name for step in recipe.steps if step.slices]:
        raise UserError(f"step '{sliced[0]}': slices are for files; parameter trees keep their layers")
    if recipe.tokenizer is not None and not recipe.tokenizer.is_the_bases:
        raise UserError("tokenizer: other tokens than the base's are for files; parameter trees keep their rows")
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise UserError(
            f"dtype: {jnp.dtype(dtype).name} is no floating-point type, and merged weights would be rounded to 0; "
            "give float32, bfloat16 or float16"
        )
    merged: list[tuple[tuple[str, ...], jax.Array]] = []
    last = recipe.steps[-1]
    tensors: dict[str, TensorStats] = {}
    for row in table:
        leaves = {name: _leaf(models[name], row, name) for name in recipe.inputs}
        donor = leaves[recipe.donor]
        result_dtype = np.dtype(dtype or recipe.dtype or donor.dtype)
        sharding = donor.sharding if isinstance(donor.sharding, NamedSharding) else None
        layout = {"stacked": row.stacked, "transposed": row.transposed}
        whole = jnp.zeros(row.shape, result_dtype, device=sharding)
        for layer, key in enumerate(row.hf_keys()):
            depth = tensor_names.depth(layer, row.shape[0]) if row.stacked else 0.0
            arrays = {name: _take(leaf, layer, **layout) for name, leaf in leaves.items()}
            for name, array in arrays.items():
                if not bool(_all_finite(array)):
                    raise UserError(f"model '{name}': tensor '{key}' holds NaN or infinity; the training run is broken")
            # The steps on one tensor. What only later ones read stays float32.
            stats: dict[str, Stats] = {}
            for whole_step in recipe.steps:
                step = whole_step.kept() if whole_step.keeps(key) else whole_step
                shape = arrays[step.branches[0]].shape
                block = block_of(step, {name: _as_rows(arrays[name]) for name in step.reads})
                tensor = BlockTensor(recipe, step, key, shape, block)
                tensor.prepare(step.at(key, depth))
                leaf, masks = tensor.result(block, AllRows(), result_dtype if whole_step is last else np.float32)
                arrays[step.name] = leaf.reshape(shape)
                stats[step.name] = Stats.of(tensor.size, step.branches, tensor.statistics(block, leaf, masks))
            check_overflow(key, stats[last.name], result_dtype)
            whole = _put(whole, arrays[last.name], layer, **layout, sharding=sharding)
            tensors[key] = stats
        merged.append((row.path, whole))
    return unflatten(merged), report(recipe.steps, tensors)


_all_finite = jax.jit(lambda x: jnp.all(jnp.isfinite(x)))


def _as_rows(x: jax.Array) -> jax.Array:
    """Return `x` as rows of its last axis; a vector is one row."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1)


def _leaf(tree: Tree, row: Param, name: str) -> jax.Array:
    """Return the parameter of a table's row. Raises UserError, naming the model, where it is missing or misshapen."""
    try:
        leaf = get(tree, row.path)
    except (KeyError, TypeError):
        raise UserError(f"model '{name}': parameter {row.name} is missing") from None
    if tuple(leaf.shape) != row.shape:
        raise UserError(f"model '{name}': parameter {row.name} has shape {tuple(leaf.shape)}, expected {row.shape}")
    return jnp.asarray(leaf)


@functools.partial(jax.jit, static_argnames=("stacked", "transposed"))
def _take(leaf: jax.Array, layer: int, *, stacked: bool, transposed: bool) -> jax.Array:
    """Return the Hugging Face tensor of one layer."""
    tensor = lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
    return jnp.swapaxes(tensor, -1, -2) if transposed else tensor


@functools.partial(jax.jit, static_argnames=("stacked", "transposed", "sharding"), donate_argnums=0)
def _put(
    whole: jax.Array, tensor: jax.Array, layer: int, *, stacked: bool, transposed: bool, sharding: NamedSharding | None
) -> jax.Array:
    """Put the Hugging Face tensor of one layer into `whole`."""
    part = jnp.swapaxes(tensor, -1, -2) if transposed else tensor
    filled = lax.dynamic_update_index_in_dim(whole, part, layer, 0) if stacked else part
    return filled if sharding is None else lax.with_sharding_constraint(filled, sharding)
