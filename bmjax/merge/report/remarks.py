"""Lines on what a merge found out as it read and wrote tensors."""

from collections.abc import Iterator, Mapping

import numpy as np

from bmjax.io.safetensors import listing
from bmjax.merge.report.statistics import TensorStats


def remarks(tensors: Mapping[str, TensorStats], dtypes: Mapping[str, np.dtype]) -> Iterator[str]:
    """Yield a line for each model that alone has zeros in whole tensors, and one on values that became zero.

    tensors: statistics of each step on each tensor. dtypes: the types in which tensors were written.
    """
    zero: dict[str, list[str]] = {}
    vanished: dict[str, list[str]] = {}
    for name, steps in tensors.items():
        for stats in steps.values():
            for model in stats.zero:
                names = zero.setdefault(model, [])
                names += [name] if name not in names[-1:] else []  # several steps may read it
            lost, remaining = stats.vanished
            if lost > remaining:
                vanished.setdefault(np.dtype(dtypes[name]).name, []).append(name)
    for model, names in zero.items():
        yield (
            f"model '{model}': {listing(names)} hold nothing but zeros, those of the other models do not: was "
            "its download or its saving cut off?"
        )
    for type_name, names in vanished.items():
        yield (
            f"{listing(names)}: most values are too small for {type_name} and became 0; write another out_dtype to "
            "keep them"
        )
