"""Masks of infinities, which are no weights: those that all models share are copied.

stream.py calls it where a tensor's values are not finite.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

from bmjax.merge.engine.chunks import Chunk, StoredTensor

_MASK = re.compile(r"mask|alibi|(attn|attention)\.bias$")
_EXTREME = 1e30  # what masks without infinities hold is the least number of a type


def is_shared_mask(tensors: Collection[StoredTensor], chunks: Sequence[Chunk]) -> bool:
    """Return whether tensors are a mask, the same in all: one extreme value, as -inf, and one other beside it.

    A mask by its name may have several others. NaN is in no mask.
    """
    first, *others = tensors
    extremes, ordinary = set[float](), set[float]()
    for chunk in chunks:
        values, *copies = (tensor.values(chunk) for tensor in (first, *others))
        if np.isnan(values).any() or not all(np.array_equal(values, copy) for copy in copies):
            return False
        is_extreme = np.abs(values) > _EXTREME
        for part, known in ((values[is_extreme], extremes), (values[~is_extreme], ordinary)):
            known |= {float(part.min()), float(part.max())} if part.size else set()
    if _MASK.search(first.tensor):
        return bool(extremes)
    return len(extremes) == len(ordinary) == 1
