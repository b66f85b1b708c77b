"""A recipe in which some step looks at data, carried out step by step. Called by dispatch.py alone.

A step that looks at data has its models as directories. Earlier steps that it reads, and its own result when a later
step reads it, are written in float32 inside the output's temporary directory, which vanishes whatever happens.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmjax.calibrate.run import merge_step
from bmjax.io.atomic import replacing
from bmjax.io.safetensors import Checkpoint, open_checkpoint
from bmjax.log import Log
from bmjax.merge.engine import files
from bmjax.merge.engine.chunks import CHUNK, block_digest, digest, digest_of_tensors
from bmjax.merge.recipe.recipe import Recipe, Step, read_recipe
from bmjax.merge.report.statistics import merge_report, report, source_entry
from bmjax.weights.hf import stored_dtype


def merge_steps(
    recipe: Recipe, inputs: Mapping[str, Path], output: Path, shard_bytes: float, log: Log
) -> dict[str, Any]:
    """Carry out the steps in order and write the last one's result to `output`; returns the report.

    inputs: the directory of every input. log: gets a line for what was learned and not kept.
    """
    last = recipe.steps[-1]
    dtype = recipe.dtype or stored_dtype(inputs[recipe.donor]).name
    read_with_data = {name for step in recipe.steps if step.calibration is not None for name in step.models}
    temporary: dict[str, Path] = {}  # directories of steps, and of inputs with the result's tokenizer
    sources: dict[str, Any] = {}
    statistics: dict[str, Any] = {"tensors": {}, "layers": {}, "total": {}}
    details: dict[str, Any] = {}
    with replacing(output) as folder:
        work = folder / "steps"
        # With a tokenizer of the result's own, every model's rows of tokens are put in its order first.
        if recipe.tokenizer is not None:
            for i, name in enumerate(inputs):
                temporary[name] = work / f"input-{i}"
                converted = files.merge(_conversion(recipe, name), temporary[name], shard_bytes=shard_bytes)
                sources[name] = converted["sources"][name]
        for i, step in enumerate(recipe.steps):
            target = work / f"step-{i}"
            if step.calibration is not None:
                models = {name: {**inputs, **temporary}[name] for name in step.models}
                stats, results = merge_step(
                    step, models, target, dtype=dtype if step is last else "float32", seed=recipe.seed,
                    shard_bytes=shard_bytes, log=log,
                )  # fmt: skip
                summary = report(replace(recipe, steps=(step,)), stats)
                counts = Counter(details.get("tokens", {})) + Counter(results["tokens"])
                details = {**details, **results, "tokens": dict(counts)}
            elif step is last or step.name in read_with_data:
                streamed = _until(recipe, step, temporary)
                if step is not last:
                    streamed = replace(streamed, dtype="float32")
                elif streamed.donor not in inputs:
                    streamed = replace(streamed, dtype=dtype)  # the donor is a step, stored in float32
                summary = files.merge(streamed, target, shard_bytes=shard_bytes)
                sources |= {name: entry for name, entry in summary["sources"].items() if name not in temporary}
            else:
                continue  # a later step of the file engine reads it in memory
            temporary[step.name] = target
            statistics["total"] |= summary["total"]
            for part in ("tensors", "layers"):
                for name, by_step in summary[part].items():
                    statistics[part].setdefault(name, {}).update(by_step)
        for path in temporary[last.name].iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(work)
        # The report of all steps, and the card.
        written = open_checkpoint(folder)
        for name in recipe.inputs:
            if name not in sources:
                model = open_checkpoint(inputs[name])
                sources[name] = source_entry(recipe, name, model, digest_of_tensors(_checksums(model)))
        types = {info.numpy_dtype.name for info in written.tensors.values()}
        result = merge_report(recipe, sources, _checksums(written), sorted(types), statistics) | details
        files.finish(folder, recipe, result)
    return result


def _conversion(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe that puts an input's rows of tokens in the order of the result's tokenizer."""
    block = {
        "name": f"{name} with the tokenizer of the result",
        "merge_method": "passthrough",
        "base_model": recipe.donor,
        "models": [name],
        "sources": dict(recipe.sources),
        "dtype": None if name == recipe.donor else "float32",
    }
    return replace(read_recipe(block), tokenizer=recipe.tokenizer, vocabularies=recipe.inputs)


def _until(recipe: Recipe, step: Step, temporary: Mapping[str, Path]) -> Recipe:
    """Return the recipe of a step of the file engine: it, and the steps that it reads in memory."""
    needed = {step.name}
    for earlier in reversed(recipe.steps):
        if earlier.name in needed and earlier.name not in temporary:
            needed |= set(earlier.models)
    steps = tuple(s for s in recipe.steps if s.name in needed and s.name not in temporary)
    sources = {**recipe.sources, **{name: str(directory) for name, directory in temporary.items()}}
    return replace(recipe, steps=steps, sources=sources, notes=(), tokenizer=None, chat_template=None)


def _checksums(model: Checkpoint) -> dict[str, str]:
    """Return the checksum of every tensor, by name, as the file engine computes it."""
    checksums = {}
    for name in sorted(model.tensors):
        flat = model.read(name).reshape(-1)
        checksums[name] = digest(block_digest(flat[i : i + CHUNK]) for i in range(0, max(1, len(flat)), CHUNK))
    return checksums
