"""Merging Hugging Face directories: all steps of a recipe, tensor by tensor, straight from file to file.

bmjax/calibrate/ calls it. Any architecture: what counts is that names and shapes agree. Results of earlier steps never
touch the disk. The output appears whole, or not at all.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.io.atomic import replacing
from bmjax.io.safetensors import Plan, SharedWriter
from bmjax.merge.engine.journal import Journal, clear
from bmjax.merge.engine.stream import Progress, Stream
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.plan.output import check_space
from bmjax.merge.recipe.tokenizer import write_chat_template
from bmjax.merge.report.card import write_card
from bmjax.merge.report.statistics import merge_report, report, source_entry
from bmjax.model.config import read_hf_config
from bmjax.version import __version__
from bmjax.weights.tokenizer import TOKENIZER_FILES

SIDE_FILES = (
    "config.json", "generation_config.json", *TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
REPORT = "merge_report.json"
MEMORY = 2**30


def merge(
    plan: MergePlan,
    output: str | Path,
    *,
    shard_bytes: float = 5e9,
    memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carry out a plan: merge its models into a Hugging Face directory.

    Config, tokenizer and chat template come from the last step's base, traced back to a directory, or from its first
    model. Each tensor is rounded once, to the recipe's dtype or to the type in which that base stores it. A merge that
    was killed goes on where it was, when it is run again.

    Arguments:
        plan: of a recipe none of whose steps looks at data, see `bmjax.merge.plan.nodes.prepare`.
        output: the directory that the plan was made for.
        shard_bytes: of a file of the result.
        memory: bytes for buffers (None: MEMORY). It changes no result.
        progress: is called with (bytes of inputs done, bytes of inputs in all, tensor name).

    Returns:
        The content of merge_report.json.

    Raises:
        UserError: one line, for anything a user can mend. `output` is then as it was.
    """
    recipe, models, donor = plan.recipe, plan.models, plan.models[plan.recipe.donor]
    rows = [(node.name, node.dtype, node.shape) for node in plan.nodes]
    check_space(Path(output), plan.nbytes + sum(path.stat().st_size for path in _side_files(donor.directory)))
    with replacing(Path(output), resume=True) as folder, contextlib.ExitStack() as stack:
        journal = stack.enter_context(contextlib.closing(Journal(folder, _fingerprint(plan, rows, shard_bytes))))
        writer = stack.enter_context(contextlib.closing(SharedWriter(folder, rows, shard_bytes)))
        # What was killed while it copied the donor's files may have left others than those of now.
        clear(folder, [*writer.files, journal.path])
        journal.check(writer, rows)
        buffers = MEMORY if memory is None else memory
        stream = stack.enter_context(contextlib.closing(Stream(plan, writer, journal, buffers)))
        tensors = stream.run(plan.nodes, progress or (lambda done, total, name: None))
        writer.finish()
        sources = {
            name: source_entry(recipe.sources.get(name, name), model, journal.source(name))
            for name, model in models.items()
        }
        _copy_side_files(donor.directory, folder, {dtype for _, dtype, _ in rows}, plan.config_changes)
        if plan.vocabulary is not None:
            plan.vocabulary.save(folder)
        dtypes = sorted({dtype.name for _, dtype, _ in rows})
        statistics = report(recipe.steps, tensors)
        result = merge_report(recipe.text, recipe.seed, sources, journal.checksums(), dtypes, statistics)
        finish(folder, recipe.chat_template, result)
        journal.close(remove=True)
    return result


def finish(folder: Path, chat_template: str | None, result: Mapping[str, Any]) -> None:
    """Write a merge's chat template, merge_report.json and card. result: what `merge_report` returned."""
    if chat_template is not None:
        write_chat_template(folder, chat_template)
    (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_card(folder, result)


def _fingerprint(plan: MergePlan, rows: Plan, shard_bytes: float) -> dict[str, Any]:
    """Return a hash of what must be the same for an unfinished merge to go on."""
    recipe, models, tokens = plan.recipe, plan.models, plan.vocabulary
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
