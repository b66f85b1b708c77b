"""A step of some of its models: for a tensor that the others are not made to have, such as a head of another kind.

Planners call it. The arguments of a method speak of all models, so those of the rest are made of them here.
"""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from bmjax.config import UserError
from bmjax.merge.recipe.step import Step


def without_models(step: Step, left_out: Collection[str], arguments: Mapping[str, Any]) -> Step:
    """Return the step that merges one tensor without some models; a copy where too little is left to merge.

    A method without a base averages models. Its weights keep their sum, so that the tensor keeps its size; one model
    alone is copied, whatever its weight. With a base a model that is left out changes nothing.

    Arguments:
        step: what merges all of them.
        left_out: names of its models.
        arguments: the step's for this tensor, see `Step.at`.
    """
    rest = [i for i, branch in enumerate(step.branches) if branch not in left_out]
    if step.base is None and len(rest) == 1:
        return replace(step.kept(), branches=(step.branches[rest[0]],))
    if step.base in left_out or len(rest) < step.method.branches[0]:
        return step.kept()
    chosen = {
        name: tuple(value[i] for i in rest) if isinstance(value, tuple) else value for name, value in arguments.items()
    }
    if step.base is None and "weight" in chosen:
        total, sum_of_rest = sum(arguments["weight"]), sum(chosen["weight"])
        if abs(sum_of_rest) < 1e-6:
            return step.kept()
        chosen["weight"] = tuple(weight * total / sum_of_rest for weight in chosen["weight"])
    with contextlib.suppress(UserError):
        if step.method.check:
            step.method.check(chosen)
        return replace(step, branches=tuple(step.branches[i] for i in rest), arguments=chosen)
    return step.kept()
