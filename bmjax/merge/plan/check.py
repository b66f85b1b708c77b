"""`--check`: what a merge reads and writes, and how long it takes, from headers alone."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bmjax.io import bucket
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.plan.output import check_space, size_text

RATE = 0.5e9  # bytes of inputs a second on two cores, about what the methods that select take; others are faster


def check(plan: MergePlan, output: str | Path, *, memory: int | None = None, shard_bytes: float = 5e9) -> Iterator[str]:
    """Yield what a merge with the same arguments would do, line by line.

    Steps that look at data are planned as all others: their results have the tensors of their base.
    """
    recipe, free = plan.recipe, check_space(Path(output), plan.nbytes)
    for step in recipe.steps:
        base = "" if step.base is None else f" into {step.base}"
        layers = sum(part.layers for part in step.slices)
        slices = f", {len(step.slices)} slices of {layers} layers" if step.slices else ""
        yield f"step {step.name}: {step.method.name} of {', '.join(step.branches)}{base}{slices}"
    # What is read of each input; a tensor that several need is read for each.
    read: Counter[str] = Counter()
    for node in plan.nodes:
        for model, tensor in node.files():
            read[model] += plan.models[model].tensors[tensor].nbytes
    for name, checkpoint in plan.models.items():
        infos = checkpoint.tensors.values()
        source = name if str(checkpoint.directory) == name else f"{name} ({checkpoint.directory})"
        types = ", ".join(dict.fromkeys(info.numpy_dtype.name for info in infos))
        part = size_text(read[name]) if read[name] else "config and tokenizer only"
        revision = f", revision {recipe.revision(name)}" if recipe.revision(name) else ""
        files = _files(len({info.file for info in infos}))
        yield f"read {source}: {len(infos)} tensors, {types}, {files}, {part}{revision}"
    # What is written.
    types = ", ".join(dict.fromkeys(node.dtype.name for node in plan.nodes))
    files = _files(max(1, math.ceil(plan.nbytes / shard_bytes)))
    yield (
        f"write {bucket.join(output)}: {len(plan.nodes)} tensors, {size_text(plan.nbytes)}, {types}, {files}; "
        f"{size_text(free)} are free there"
    )
    for key, value in plan.config_changes.items():
        yield f"config.json: {key}: {value}"[:200]
    if memory is not None:
        yield f"memory: at most {size_text(memory)} of tensors at a time"
    if not recipe.is_calibrated:
        total = read.total()
        seconds = max(1, round(total / RATE))
        yield (
            f"time: about {seconds} s for {size_text(total)} at {size_text(int(RATE))}/s, and seconds of compiling "
            "where these shapes were not merged here before"
        )
    yield from (f"note: {line}" for line in plan.notes)


def _files(count: int) -> str:
    return f"{count} file{'s' * (count > 1)}"
