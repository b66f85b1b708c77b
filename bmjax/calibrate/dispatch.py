"""The one door for merges of every kind: `merge` and `check`.

A recipe whose steps look at weights alone goes to the file engine as it is; one with a step that looks at data goes to
steps.py. Called by the commands, the pipeline and the Python interface.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.rows import read_rows
from bmjax.io.safetensors import open_checkpoint
from bmjax.log import Log, silent
from bmjax.merge.plan.check import check as check_plan
from bmjax.merge.plan.nodes import plan
from bmjax.merge.plan.output import check_space, check_target, locate, tokenizer_directory
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.model.config import ModelConfig


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
    """Merge the recipe's models into a Hugging Face directory. Arguments, result and errors are those of `bmjax.merge`.

    progress: of the file engine; is called with (bytes of inputs done, bytes in all, tensor name).
    """
    from bmjax.merge.engine import files  # loads jax, which a check does not need

    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    if not recipe.is_calibrated:
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
    """Raise a UserError for what a step that looks at data would refuse, known without reading a tensor."""
    for step in recipe.steps:
        if step.calibration is None:
            continue
        # The base's directory, or that of the model that its config comes from.
        config = ModelConfig.from_dir(directories[recipe.donor_of(step.donor)])
        if step.calibration.seq_len > config.max_length:
            raise UserError(
                f"step '{step.name}': seq_len: {step.calibration.seq_len} is more than the base's context of "
                f"{config.max_length} tokens; lower it"
            )
        for name, rows in zip(step.branches, step.data, strict=True):
            next(read_rows(rows, f"models.{name}.data"))
