"""One tensor of a plan: what it is made of, and how. nodes.py makes them, the engine computes them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmjax.io.safetensors import DTYPES, listing
from bmjax.merge.plan.token_rows import StandIn
from bmjax.merge.recipe.step import Step

FLOATS = ("F32", "BF16", "F16", "F64")
_FLOAT_TYPES = tuple(DTYPES[name] for name in FLOATS)


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Where a node finds one model's tensor.

    Rows of tokens that the model lacks are the mean of those `others` that have a row there, zeros if none has. The
    donor stands in alone where it has the row.
    """

    tensor: str  # its name in the model; a tied model's head is its embedding
    rows: np.ndarray | None = None  # for each row of the result the tensor's, int64, -1 for none; None: the same rows
    node: "Node | None" = None  # what makes it, if the model is an earlier step
    others: tuple[StandIn, ...] = ()


@dataclass(frozen=True, eq=False)
class Node:
    """One tensor of a step's result."""

    name: str
    step: Step  # names the base and the branches; for a slice they are the slice's
    inputs: Mapping[str, TensorSource]  # of every model that is read, the base first
    arguments: Mapping[str, Any]  # the method's, for this tensor
    dtype: np.dtype  # as written; float32 for what only later steps read
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether it is merged. What is not (masks, tables of positions) must be the same in all inputs."""
        return self.dtype in _FLOAT_TYPES

    @property
    def is_copy(self) -> bool:
        """Whether it is one model's tensor, multiplied by 1 at most: its bytes, where the types agree.

        Even a product by 1 would be no copy: float32 arithmetic rounds float64 and flushes the least numbers to zero.
        """
        is_stored = len(self.inputs) == 1 and all(source.node is None for source in self.inputs.values())
        return is_stored and self.step.method.name == "passthrough" and all(s == 1 for s in self.arguments["scale"])

    def files(self) -> list[tuple[str, str]]:
        """Return (input, tensor) of everything that is read from files for it, each once."""
        files: dict[tuple[str, str], None] = {}
        for model, source in self.inputs.items():
            files |= dict.fromkeys([(model, source.tensor)] if source.node is None else source.node.files())
            files |= {(other, tensor): None for other, tensor, _ in source.others}
        return list(files)


def rounded_to_float32(nodes: Iterable[Node]) -> Iterator[str]:
    """Yield a line for tensors that are written as float64 and hold no more digits than float32."""
    names = [node.name for node in nodes if node.dtype == np.float64 and not node.is_copy]
    if names:
        yield f"{listing(names)}: written as float64, with the digits of float32, in which merges compute"
