"""Merging Hugging Face directories: all steps of a recipe, tensor by tensor, straight from file to file.

`bmjax merge` and `bmjax.merge` call it. Any architecture: what counts is that names and shapes agree. All headers are
read and compared before the first tensor is. Results of earlier steps never touch the disk. The output appears whole,
or not at all.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.io.atomic import resuming
from bmjax.io.safetensors import Checkpoint, Plan, SharedWriter, open_checkpoint
from bmjax.log import Log, silent
from bmjax.merge.engine.journal import Journal, clear
from bmjax.merge.engine.stream import Progress, Stream
from bmjax.merge.plan.nodes import plan
from bmjax.merge.plan.output import check_space, check_target, locate, tokenizer_directory
from bmjax.merge.plan.vocabulary import Vocabulary
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.merge.recipe.tokenizer import write_chat_template
from bmjax.merge.report.card import write_card
from bmjax.merge.report.statistics import merge_report, report, source_entry
from bmjax.model.config import read_hf_config
from bmjax.version import __version__
from bmjax.weights.hf import TOKENIZER_FILES

SIDE_FILES = (
    "config.json", "generation_config.json", *TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
REPORT = "merge_report.json"
MEMORY = 2**30


def merge(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path,
    overwrite: bool = False,
    *,
    overrides: Sequence[str] = (),
    shard_bytes: float = 5e9,
    memory: int | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge the recipe's models into a Hugging Face directory.

    Config, tokenizer and chat template come from the last step's base, traced back to a directory, or from its first
    model. Each tensor is rounded once, to the recipe's dtype or to the type in which that base stores it. A merge that
    was killed goes on where it was, when it is run again. Arguments, result and errors are those of `bmjax.merge`.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    say = log or silent
    directories = {name: locate(recipe, name) for name in recipe.inputs}
    target = Path(output)
    check_target(target, [*directories.values(), *tokenizer_directory(recipe)], overwrite)
    models = {name: open_checkpoint(directory) for name, directory in directories.items()}
    donor = models[recipe.donor]
    planned = plan(recipe, models)
    for line in (*recipe.notes, *planned.notes):
        say(line)
    rows = [(node.name, node.dtype, node.shape) for node in planned.nodes]
    side_bytes = sum(path.stat().st_size for path in _side_files(donor.directory))
    check_space(target, side_bytes + sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in rows))
    with resuming(target) as folder, contextlib.ExitStack() as stack:
        fingerprint = _fingerprint(recipe, models, planned.vocabulary, rows, shard_bytes)
        journal = stack.enter_context(contextlib.closing(Journal(folder, fingerprint)))
        writer = stack.enter_context(contextlib.closing(SharedWriter(folder, rows, shard_bytes)))
        # What was killed while it copied the donor's files may have left others than those of now.
        clear(folder, [*writer.files, journal.path])
        journal.check(writer, rows)
        buffers = MEMORY if memory is None else memory
        stream = stack.enter_context(contextlib.closing(Stream(recipe, models, writer, journal, buffers)))
        tensors = stream.run(planned.nodes, progress or (lambda done, total, name: None))
        writer.finish()
        sources = {name: source_entry(recipe, name, model, journal.source(name)) for name, model in models.items()}
        _copy_side_files(donor.directory, folder, {dtype for _, dtype, _ in rows}, planned.config_changes)
        if planned.vocabulary is not None:
            planned.vocabulary.save(folder)
        dtypes = sorted({dtype.name for _, dtype, _ in rows})
        result = merge_report(recipe, sources, journal.checksums(), dtypes, report(recipe, tensors))
        finish(folder, recipe, result)
        journal.close(remove=True)
    return result


def finish(folder: Path, recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Write a merge's chat template, merge_report.json and card. result: what `merge_report` returned."""
    if recipe.chat_template is not None:
        write_chat_template(folder, recipe.chat_template)
    (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_card(folder, recipe, result)


def _fingerprint(
    recipe: Recipe, models: Mapping[str, Checkpoint], tokens: Vocabulary | None, rows: Plan, shard_bytes: float
) -> dict[str, Any]:
    """Return a hash of what must be the same for an unfinished merge to go on."""
    files = {info.file for model in models.values() for info in model.tensors.values()}
    if tokens is not None:
        # They say which rows belong together.
        folders = [*(model.directory for model in models.values()), tokens.source]
        files |= {path for folder in folders for path in _side_files(folder)}
    state = {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in sorted(files)}
    written = [[name, dtype.name, list(shape)] for name, dtype, shape in rows]
    plain = [recipe.text, recipe.seed, recipe.compat, state, written, shard_bytes, version("jax"), __version__]
    return {"merge": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _side_files(donor: Path) -> list[Path]:
    """Return the files beside the weights that the result gets."""
    paths = [donor / name for name in SIDE_FILES]
    return [path for path in (*paths, *sorted((donor / "additional_chat_templates").glob("*"))) if path.is_file()]


def _copy_side_files(donor: Path, folder: Path, types: set[np.dtype], changes: Mapping[str, Any]) -> None:
    for path in _side_files(donor):
        copy = folder / path.relative_to(donor)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if not (folder / "config.json").exists():
        return
    # A loader takes the type from the config: it must be the one that was written.
    config = read_hf_config(folder)
    floats = {dtype.name for dtype in types if dtype.name in ("float32", "bfloat16", "float16", "float64")}
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    changed = {**config, **changes, **({key: floats.pop()} if len(floats) == 1 else {})}
    if changed != config:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
