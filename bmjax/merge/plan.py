"""Which tensors of which models each tensor of the result is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bmjax.merge.recipe import Recipe, Step
from bmjax.weights.safetensors import Checkpoint


@dataclass(frozen=True)
class Source:
    """Where a step finds a model's tensor: a stored one, or the result of an earlier step (`node`). rows: for each row
    of the result the model's row, -1 where it has none; None: the same."""

    tensor: str
    rows: np.ndarray | None = None
    node: "Node | None" = None


@dataclass(frozen=True)
class Node:
    """One tensor of a step's result: inputs by model name, the method's arguments for it."""

    name: str
    step: Step
    inputs: Mapping[str, Source]
    arguments: Mapping[str, Any]
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    nodes: tuple[Node, ...]
    config_changes: Mapping[str, Any]
    notes: tuple[str, ...]


def plan(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Plan:
    donor = models[recipe.donor]
    steps = {step.name: step for step in recipe.steps}

    def node(step: Step, info) -> Node:
        inputs = {
            m: Source(info.name, node=node(steps[m], info) if m in steps else None) for m in dict.fromkeys(step.models)
        }
        dtype = info.numpy_dtype
        if recipe.dtype and info.dtype in ("F32", "BF16", "F16", "F64"):
            dtype = np.dtype(ml_dtypes.bfloat16) if recipe.dtype == "bfloat16" else np.dtype(recipe.dtype)
        return Node(info.name, step, inputs, step.arguments, dtype, info.shape)

    return Plan(tuple(node(recipe.steps[-1], info) for info in donor.tensors.values()), {}, ())
