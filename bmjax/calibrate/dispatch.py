"""The one door for merges of every kind: `merge` and `check`.

A recipe whose steps look at weights alone goes to the file engine as it is; one with a step that looks at data goes to
steps.py. Called by the commands, the pipeline and the Python interface.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.log import Log, silent
from bmjax.merge.plan.check import check as check_plan
from bmjax.merge.plan.nodes import plan
from bmjax.merge.plan.output import check_space, check_target, locate, tokenizer_directory
from bmjax.merge.recipe.recipe import Recipe, read_recipe


def merge(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path,
    overwrite: bool = False,
    *,
    overrides: Sequence[str] = (),
    shard_bytes: float = 5e9,
    memory: int | None = None,
    log: Log | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Merge the recipe's models into the Hugging Face directory `output`.

    Arguments:
        recipe: a recipe, a YAML file, or the mapping that one holds.
        output: must not exist or be empty, unless `overwrite`; is never an input. It appears whole, or not at all.
        overrides: `key.sub=value`, of a file or mapping.
        shard_bytes: the largest file of weights.
        memory: bytes for the file engine's buffers; changes no result.
        log: gets one line a remark.
        progress: of the file engine; is called with (bytes of inputs done, bytes in all, tensor name).

    Returns:
        what `output`/merge_report.json holds.

    Raises:
        UserError: for anything that a user can mend; `output` is then as it was.
    """
    from bmjax.merge.engine import files  # loads jax, which a check does not need

    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    if not recipe.is_calibrated:
        memory = files.MEMORY if memory is None else memory
        return files.merge(
            recipe, output, overwrite, shard_bytes=shard_bytes, memory=memory, log=log, progress=progress
        )
    from bmjax.calibrate import steps

    _refuse_memory(recipe, memory)
    say = log or silent
    # Everything that can be known beforehand, before the first step takes its time.
    directories = {name: locate(recipe, name) for name in recipe.inputs}
    check_target(Path(output), [*directories.values(), *tokenizer_directory(recipe)], overwrite)
    planned = plan(recipe, {name: open_checkpoint(directory) for name, directory in directories.items()})
    check_space(Path(output), sum(math.prod(node.shape) * node.dtype.itemsize for node in planned.nodes))
    _check_steps(recipe, directories)
    for line in (*recipe.notes, *planned.notes):
        say(line)
    return steps.merge_steps(recipe, directories, Path(output), shard_bytes, say)


def check(
    recipe: Recipe, output: str | Path, overwrite: bool = False, *, memory: int | None = None, shard_bytes: float = 5e9
) -> Iterator[str]:
    """Yield what `merge` with the same arguments would do, line by line. Raises UserError as it would."""
    _refuse_memory(recipe, memory)
    yield from check_plan(recipe, output, overwrite, memory=memory, shard_bytes=shard_bytes)
    if recipe.is_calibrated:
        _check_steps(recipe, {name: locate(recipe, name, download=False) for name in recipe.inputs})
        for step in recipe.steps:
            for name, rows in zip(step.branches, step.data, strict=False):
                yield f"read {rows if isinstance(rows, str) else ', '.join(rows)} for '{name}' of step '{step.name}'"
            if step.calibration is not None:
                yield f"memory: all models of step '{step.name}' at once; they are run on the rows"


def _refuse_memory(recipe: Recipe, memory: int | None) -> None:
    if recipe.is_calibrated and memory is not None:
        method = next(step.method.name for step in recipe.steps if step.calibration is not None)
        raise UserError(f"--memory: {method} holds all its models in memory; leave it out")


def _check_steps(recipe: Recipe, directories: Mapping[str, Path]) -> None:
    from bmjax.calibrate import run

    for step in recipe.steps:
        if step.calibration is not None:
            run.check_step(step, directories[recipe.donor_of(step.donor)])
