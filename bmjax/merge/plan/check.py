"""`--check`: whether a merge will work, what it reads and writes, and how long it takes, from headers alone."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bmjax.io.safetensors import Checkpoint, open_checkpoint
from bmjax.merge.plan.nodes import plan
from bmjax.merge.plan.output import check_space, check_target, locate, size_text, tokenizer_directory
from bmjax.merge.recipe.recipe import Recipe, Step

RATE = 0.5e9  # bytes of inputs a second on two cores, about what the methods that select take; others are faster


def check(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    *,
    memory: int | None = None,
    shard_bytes: float = 5e9,
) -> Iterator[str]:
    """Yield what a merge with the same arguments would do, line by line. Reads only headers, writes nothing.

    Steps that look at data are planned as all others: their results have the tensors of their base.

    Raises:
        UserError: for whatever the merge would refuse before it reads the first tensor.
    """
    target = Path(output)
    directories = {name: locate(recipe, name, download=False) for name in recipe.inputs}
    check_target(target, [*directories.values(), *tokenizer_directory(recipe, download=False)], overwrite)
    models = {name: open_checkpoint(directory) for name, directory in directories.items()}
    planned = plan(recipe, models)
    written = sum(math.prod(node.shape) * node.dtype.itemsize for node in planned.nodes)
    free = check_space(target, written)
    # What is read of each input; a tensor that several need is read for each.
    read: Counter[str] = Counter()
    for node in planned.nodes:
        for model, tensor in node.files():
            read[model] += models[model].tensors[tensor].nbytes
    yield from (f"step {_describe_step(step)}" for step in recipe.steps)
    for name in recipe.inputs:
        yield f"read {_describe_input(recipe, name, directories[name], models[name], read[name])}"
    types = Counter(node.dtype.name for node in planned.nodes)
    files = max(1, math.ceil(written / shard_bytes))
    yield (
        f"write {target}: {len(planned.nodes)} tensors, {size_text(written)}, {', '.join(types)}, "
        f"{files} file{'s' * (files > 1)}; {size_text(free)} are free there"
    )
    for key, value in planned.config_changes.items():
        yield f"config.json: {key}: {value}"[:200]
    if memory is not None:
        yield f"memory: at most {size_text(memory)} of tensors at a time"
    if not recipe.is_calibrated:
        total = read.total()
        yield f"time: about {max(1, round(total / RATE))} s for {size_text(total)} at {size_text(int(RATE))}/s"
    yield from (f"note: {line}" for line in (*recipe.notes, *planned.notes))


def _describe_step(step: Step) -> str:
    base = "" if step.base is None else f" into {step.base}"
    layers = sum(part.layers for part in step.slices)
    slices = f", {len(step.slices)} slices of {layers} layers" if step.slices else ""
    return f"{step.name}: {step.method.name} of {', '.join(step.branches)}{base}{slices}"


def _describe_input(recipe: Recipe, name: str, directory: Path, model: Checkpoint, read: int) -> str:
    infos = model.tensors.values()
    types = ", ".join(dict.fromkeys(info.numpy_dtype.name for info in infos))
    files = len({info.file for info in infos})
    source = name if str(directory) == name else f"{name} ({directory})"
    part = "config and tokenizer only" if not read else size_text(read)
    revision = f", revision {recipe.revision(name)}" if recipe.revision(name) else ""
    return f"{source}: {len(infos)} tensors, {types}, {files} file{'s' * (files > 1)}, {part}{revision}"
