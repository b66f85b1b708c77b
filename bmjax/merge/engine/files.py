"""Merging Hugging Face directories: all steps of a recipe, tensor by tensor, straight from file to file.

bmjax/calibrate/ calls it. Any architecture: what counts is that names and shapes agree. Results of earlier steps never
touch the disk. The output appears whole, or not at all.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bmjax.io.atomic import replacing
from bmjax.io.safetensors import Plan, SharedWriter
from bmjax.merge.engine.device import choose
from bmjax.merge.engine.journal import Journal, clear
from bmjax.merge.engine.stream import Progress, Stream
from bmjax.merge.plan.merged_config import set_type
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.plan.output import check_space
from bmjax.merge.plan.quantized import QUANTIZATION_KEYS
from bmjax.merge.plan.side_files import copy_file, side_files
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.report.card import write_card
from bmjax.merge.report.remarks import remarks
from bmjax.merge.report.statistics import merge_report, report, source_entry
from bmjax.model.config import context_length, read_hf_config
from bmjax.version import __version__
from bmjax.weights.tokenizer import read_json, set_longest, write_json

REPORT, RECIPE = "merge_report.json", "recipe.yaml"
MEMORY = 2**30


def merge(
    plan: MergePlan,
    output: str | Path,
    *,
    shard_bytes: float = 5e9,
    memory: int | None = None,
    device: str = "auto",
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
        device: see `bmjax.merge.engine.device.choose`. Another kind of device may round sums otherwise.
        progress: is called with (bytes of inputs done, bytes of inputs in all, tensor name).

    Returns:
        The content of merge_report.json.

    Raises:
        UserError: one line, for anything a user can mend. `output` is then as it was.
    """
    recipe, models, donor = plan.recipe, plan.models, plan.models[plan.recipe.donor].directory
    chosen = choose(device, [step.method.name for step in recipe.steps])
    rows = [(node.name, node.dtype, node.shape) for node in plan.nodes]
    check_space(Path(output), plan.nbytes + side_files(donor).nbytes)
    with replacing(Path(output), resume=True) as folder, contextlib.ExitStack() as stack:
        fingerprint = _fingerprint(plan, rows, shard_bytes, chosen.platform)
        journal = stack.enter_context(contextlib.closing(Journal(folder, fingerprint)))
        writer = stack.enter_context(contextlib.closing(SharedWriter(folder, rows, shard_bytes)))
        # What was killed while it copied the donor's files may have left others than those of now.
        clear(folder, [*writer.files, journal.path])
        journal.check(writer, rows)
        buffers = MEMORY if memory is None else memory
        stream = stack.enter_context(contextlib.closing(Stream(plan, writer, journal, buffers, chosen)))
        tensors = stream.run(plan.nodes, progress or (lambda done, total, name: None))
        writer.finish()
        sources = {
            name: source_entry(recipe.pinned(name), model, journal.source(name)) for name, model in models.items()
        }
        write_beside(folder, plan, [node.dtype.name for node in plan.nodes if node.floating])
        dtypes = sorted({dtype.name for _, dtype, _ in rows})
        statistics = report(recipe.steps, tensors)
        result = merge_report(recipe.text, recipe.seed, sources, journal.checksums(), dtypes, statistics)
        result["device"] = chosen.device_kind
        if lines := list(remarks(tensors, {node.name: node.dtype for node in plan.nodes})):
            result["remarks"] = lines
        finish(folder, plan, result)
        journal.close(remove=True)
    return result


def finish(folder: Path, plan: MergePlan, result: Mapping[str, Any]) -> None:
    """Write a merge's chat template, merge_report.json, recipe.yaml and card. result: what `merge_report` returned."""
    plan.chat.write(folder)
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path)
    set_longest(longest := dict(tokenizer), context_length(read_json(folder / "config.json")))
    if tokenizer and longest != tokenizer:
        write_json(path, longest)
    (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe_text(plan.recipe, folder), encoding="utf-8")
    adapters = {name: plan.recipe.adapter(name, download=False) for name in plan.models}
    write_card(folder, result, {n: [d for d in (m.directory, adapters[n]) if d] for n, m in plan.models.items()})


def recipe_text(recipe: Recipe, folder: Path) -> str:
    """Return a recipe as YAML that `bmjax merge` reads: overrides applied, hub models pinned, paths as given.

    Paths begin at the working directory. The first line says which that was, seen from the result, where no more than
    `..` is needed for it: other directories' names are nobody else's business. folder: the result's, or one beside it.
    """
    plain = json.loads(json.dumps(recipe.pinned_text()))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if not recipe.relative_paths:
        return text
    start = os.path.relpath(os.getcwd(), folder)
    is_above = {*Path(start).parts} <= {".", ".."}
    where = f"in {start}, seen from this file" if is_above else "in the directory where this merge was run"
    return f"# Relative paths begin {where}: run `bmjax merge` there.\n{text}"


def _fingerprint(plan: MergePlan, rows: Plan, shard_bytes: float, platform: str) -> dict[str, Any]:
    """Return a hash of what must be the same for an unfinished merge to go on."""
    recipe, models, tokens = plan.recipe, plan.models, plan.vocabulary
    files = {file for model in models.values() for info in model.tensors.values() for file in info.files}
    if tokens is not None:
        # They say which rows belong together.
        folders = [*(model.directory for model in models.values()), tokens.source]
        files |= {path for folder in folders for path in side_files(folder).paths}
    state = {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in sorted(files)}
    written = [[name, dtype.name, list(shape)] for name, dtype, shape in rows]
    plain = [
        recipe.text,
        recipe.seed,
        recipe.compat,
        state,
        written,
        shard_bytes,
        platform,
        version("jax"),
        __version__,
    ]
    return {"merge": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def write_beside(folder: Path, plan: MergePlan, types: Iterable[str]) -> None:
    """Write what stands beside a result's weights: the donor's small files, its config as changed, the tokenizer.

    types: of the result's floating-point tensors, each once or more. config.json names the one that all have.
    """
    donor = plan.models[plan.recipe.donor].directory
    for path in side_files(donor).paths:
        copy_file(path, folder / path.relative_to(donor))
    for name, content in plan.side_changes.items():
        write_json(folder / name, content)
    if plan.config_changes.get("quantization_config", True) is None:
        (folder / "hf_quant_config.json").unlink(missing_ok=True)
    if (folder / "config.json").exists():
        _change_config(folder, plan, set(types))
    if plan.vocabulary is not None:
        plan.vocabulary.save(folder)


def _change_config(folder: Path, plan: MergePlan, types: set[str]) -> None:
    config = read_hf_config(folder)
    changed = copy.deepcopy({**config, **plan.config_changes})
    changed = {key: value for key, value in changed.items() if key not in QUANTIZATION_KEYS or value is not None}
    # Weights of several types keep what the donor says of them.
    if type_name := plan.recipe.dtype or (types.pop() if len(types) == 1 else None):
        set_type(changed, type_name)
    if changed != config:
        changed.pop("transformers_version", None)  # another program wrote this
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
