"""Which tensors of a plan are copied as they are stored, and which lose digits, since arithmetic is float32."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from bmjax.io.safetensors import listing

if TYPE_CHECKING:
    from bmjax.merge.plan.nodes import Node


def is_copy(node: "Node") -> bool:
    """Return whether a node is one model's tensor, multiplied by 1 at most: its bytes, where the types agree.

    Even a product by 1 would be no copy, since float32 arithmetic rounds float64 and flushes the least numbers to zero.
    """
    is_stored = len(node.inputs) == 1 and all(source.node is None for source in node.inputs.values())
    return is_stored and node.step.method.name == "passthrough" and all(s == 1 for s in node.arguments["scale"])


def rounded_to_float32(nodes: Iterable["Node"]) -> Iterator[str]:
    """Yield a line for tensors that are written as float64 and hold no more digits than float32."""
    names = [node.name for node in nodes if node.dtype == np.float64 and not is_copy(node)]
    if names:
        yield f"{listing(names)}: written as float64, with the digits of float32, in which merges compute"
