"""The one door for merges of every kind: `merge` and `check`.

A recipe whose steps look at weights alone goes to the file engine as it is; one with a step that looks at data goes to
steps.py. Called by the commands, the pipeline and the Python interface.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.log import Log, silent
from bmjax.merge.plan.check import check as check_plan
from bmjax.merge.plan.nodes import MergePlan, prepare
from bmjax.merge.plan.output import check_space
from bmjax.merge.plan.side_files import side_files
from bmjax.merge.recipe.recipe import Recipe, read_recipe


def merge(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path,
    overwrite: bool = False,
    *,
    overrides: Sequence[str] = (),
    shard_bytes: float = 5e9,
    memory: int | None = None,
    device: str = "auto",
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
        device: auto, cpu, gpu or tpu, for the file engine to compute on. auto: the CPU for methods that are as quick as
            copying, else the device that JAX computes on.
        log: gets one line a remark.
        progress: of the file engine; is called with (bytes of inputs done, bytes in all, tensor name).

    Returns:
        what `output`/merge_report.json holds.

    Raises:
        UserError: for anything that a user can mend; `output` is then as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    _refuse_options(recipe, memory, device)
    plan = prepare(recipe, output, overwrite)
    say = log or silent
    if recipe.is_calibrated:
        from bmjax.calibrate import steps
        from bmjax.calibrate.check import check_steps  # loads jax, which a check of other recipes does not need

        # Everything that can be known beforehand, before the first step takes its time.
        checked = check_steps(plan)
        _check_space(plan, output, max(of_step.needs.disk for of_step in checked))
        for line in (*plan.notes, *(line for of_step in checked for line in of_step.notes)):
            say(line)
        domains = {of_step.step.name: of_step.domains for of_step in checked if of_step.domains is not None}
        return steps.merge_steps(plan, Path(output), shard_bytes, say, domains)
    for line in plan.notes:
        say(line)
    from bmjax.merge.engine import files  # loads jax, which a check does not need
    from bmjax.parallel.start import keep_compiled_programs

    keep_compiled_programs()
    report = files.merge(plan, output, shard_bytes=shard_bytes, memory=memory, device=device, progress=progress)
    for line in report.get("remarks", ()):
        say(line)
    return report


def check(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    *,
    memory: int | None = None,
    device: str = "auto",
    shard_bytes: float = 5e9,
) -> Iterator[str]:
    """Yield what `merge` with the same arguments would do, line by line. Raises UserError as it would."""
    _refuse_options(recipe, memory, device)
    plan = prepare(recipe, output, overwrite, download=False)
    yield from check_plan(plan, output, memory=memory, shard_bytes=shard_bytes)
    if recipe.is_calibrated:
        from bmjax.calibrate.check import check_steps

        checked = check_steps(plan)
        for of_step in checked:
            step = of_step.step
            for name, *sources in zip(step.branches, step.data, step.held_out_data, strict=True):
                for rows, use in zip(sources, ("", " to judge by,"), strict=True):
                    if rows is not None:
                        listed = rows if isinstance(rows, str) else ", ".join(rows)
                        yield f"read {listed}{use} for '{name}' of step '{step.name}'"
            yield from of_step.needs.lines(step)
        _check_space(plan, output, max(of_step.needs.disk for of_step in checked))
        yield from (f"note: {line}" for of_step in checked for line in of_step.notes)


def _check_space(plan: MergePlan, output: str | Path, scratch: int) -> None:
    beside = side_files(plan.models[plan.recipe.donor].directory).nbytes
    check_space(Path(output), plan.nbytes + beside + scratch)


def _refuse_options(recipe: Recipe, memory: int | None, device: str) -> None:
    """Raise a UserError for options of the file engine beside a step that looks at data, and for an absent device."""
    method = next((step.method.name for step in recipe.steps if step.calibration is not None), None)
    if method is not None and memory is not None:
        raise UserError(f"--memory: {method} holds one layer of every model at a time; leave it out")
    if device == "auto":
        return
    if method is not None:
        raise UserError(f"--device: {method} computes on the devices of its `mesh`; leave it out")
    from bmjax.merge.engine.device import choose  # loads jax, which a check does not need otherwise

    choose(device, [step.method.name for step in recipe.steps])
