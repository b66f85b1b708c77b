"""Tensors of which nothing is left: zero in one model alone, or zero in float16, which is written.

stream.py calls it. What it looks at first costs nothing: the sums of a tensor's statistics, and zeros of what is
written. Only where they are suspicious are tensors read once more.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bmjax.merge.engine.chunks import Chunk, StoredTensor
from bmjax.merge.report.statistics import Stats


def zero_models(
    stats: Stats, reference: str, tensors: Mapping[str, StoredTensor], chunks: Sequence[Chunk]
) -> tuple[str, ...]:
    """Return the models whose tensor is zero, where some other model's is not.

    stats: of a step. reference: the model whose norm it has. tensors: stored ones that the step reads, by model.
    """
    changes = dict(zip(stats.branches, np.diagonal(stats.products).tolist(), strict=True))
    if stats.reference == 0:
        suspects = [reference, *(name for name, change in changes.items() if change == 0 and name != reference)]
    else:
        # The change from a tensor to zero is as long as the tensor.
        suspects = [name for name, change in changes.items() if abs(change - stats.reference) <= 1e-5 * stats.reference]
    if len(suspects) == len({reference, *changes}):
        return ()
    return tuple(
        name for name in suspects
        if name in tensors and all(not tensors[name].values(chunk).any() for chunk in chunks)
    )  # fmt: skip


def vanished(leaf: np.ndarray, exact: Callable[[], np.ndarray]) -> np.ndarray:
    """Return how many values that are not zero became zero in float16, and how many remain: int64 [2].

    leaf: float16. exact: returns the values in float32. It is called where most of `leaf` is zero.
    """
    remaining = int(np.count_nonzero(leaf.view(np.uint16) & 0x7FFF))  # quicker than of float16; -0 is zero, too
    lost = 0
    if 2 * remaining < leaf.size:
        lost = int(np.count_nonzero(exact()[leaf == 0]))
    return np.array([lost, remaining])
