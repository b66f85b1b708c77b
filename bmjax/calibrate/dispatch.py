"""The one door for merges of every kind: `merge` and `check`.

A recipe whose steps look at weights alone goes to the file engine as it is; one with a step that looks at data goes to
steps.py. Called by the commands, the pipeline and the Python interface.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.calibrate.needs import Needs, needs_of
from bmjax.chat.forms import UNSUPPORTED
from bmjax.config import UserError
from bmjax.io.rows import mapped, read_rows
from bmjax.log import Log, silent
from bmjax.merge.plan.check import check as check_plan
from bmjax.merge.plan.nodes import MergePlan, prepare
from bmjax.merge.plan.output import check_space
from bmjax.merge.plan.side_files import side_files
from bmjax.merge.recipe.recipe import Recipe, Step, read_recipe
from bmjax.model.config import ModelConfig


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
    # Everything that can be known beforehand, before the first step takes its time.
    if recipe.is_calibrated:
        _check_space(plan, output, _check_steps(plan))
    say = log or silent
    for line in plan.notes:
        say(line)
    if recipe.is_calibrated:
        from bmjax.calibrate import steps

        return steps.merge_steps(plan, Path(output), shard_bytes, say)
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
        checked = _check_steps(plan)
        for step, needs in checked:
            for name, rows in zip(step.branches, step.data, strict=True):
                yield f"read {rows if isinstance(rows, str) else ', '.join(rows)} for '{name}' of step '{step.name}'"
            yield from needs.lines(step)
        _check_space(plan, output, checked)


def _check_space(plan: MergePlan, output: str | Path, steps: Sequence[tuple[Step, Needs]]) -> None:
    beside = side_files(plan.models[plan.recipe.donor].directory).nbytes
    check_space(Path(output), plan.nbytes + beside + max(needs.disk for _, needs in steps))


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


def _check_steps(plan: MergePlan) -> list[tuple[Step, Needs]]:
    """Return what each step that looks at data needs; UserError for what one would refuse, known without a tensor."""
    checked = []
    for step in plan.recipe.steps:
        if step.calibration is None:
            continue
        # The base's directory, or that of the model that its config comes from.
        config = ModelConfig.from_dir(plan.models[plan.recipe.donor_of(step.donor)].directory)
        if step.calibration.seq_len > config.max_length:
            raise UserError(
                f"step '{step.name}': seq_len: {step.calibration.seq_len} is more than the base's context of "
                f"{config.max_length} tokens; lower it"
            )
        for name, rows, columns in zip(step.branches, step.data, step.columns, strict=True):
            next(mapped(read_rows(rows, f"models.{name}.data"), columns, UNSUPPORTED))
        read = [plan.models[name] for name in step.reads if name in plan.models]
        stored = [info for model in read for info in model.tensors.values()]
        itemsize = max((info.numpy_dtype.itemsize for info in stored), default=4)  # steps are stored in float32
        checked.append((step, needs_of(step, config, itemsize if len(read) == len(step.reads) else 4)))
    return checked
