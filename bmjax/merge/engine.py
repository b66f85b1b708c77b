"""Merging Hugging Face directories: all steps of a recipe, tensor by tensor, straight from file to file.

Any architecture: what counts is that names and shapes agree. All headers are read and compared before the first tensor
is; one tensor of every model is in memory at a time; results of earlier steps never touch the disk. The output
appears whole, or not at all.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import UserError, nearest
from bmjax.merge.journal import Journal
from bmjax.merge.plan import plan
from bmjax.merge.recipe import Recipe, read_recipe
from bmjax.merge.steps import report
from bmjax.merge.stream import FLOATS, Progress, Stream
from bmjax.model.spec import read_hf_config
from bmjax.version import __version__
from bmjax.weights.atomic import resuming
from bmjax.weights.hf import TOKENIZER_FILES
from bmjax.weights.safetensors import Checkpoint, Plan, SharedWriter, open_checkpoint

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
)
REPORT = "merge_report.json"
MEMORY = 2**30
_MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def merge(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path,
    overwrite: bool = False,
    *,
    overrides: Sequence[str] = (),
    shard_bytes: float = 5e9,
    memory: int = MEMORY,
    log: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges the recipe's models into the Hugging Face directory `output`; returns what its merge_report.json holds.

    output: must not exist or be empty, unless `overwrite`; never an input. Config, tokenizer and chat template come
    from the last step's base (traced back to a directory), or its first model. Each tensor is rounded once, to the
    recipe's dtype or to the type in which that base stores it. memory: bytes for buffers; it changes no result. log:
    gets one line a remark. progress: is called with (bytes of inputs done, bytes of inputs in all, tensor name).
    A merge that was killed goes on where it was, when it is run again. Raises UserError, one line, for anything a user
    can mend; `output` is then as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    say = log or (lambda line: None)
    directories = {name: _directory(recipe, name) for name in recipe.inputs}
    target = Path(output)
    _check_target(target, directories.values(), overwrite)
    models = {name: open_checkpoint(directory) for name, directory in directories.items()}
    donor = models[recipe.donor]
    for name, model in models.items():
        _check_same(name, model, recipe.donor, donor)
    planned = plan(recipe, models)
    for line in (*recipe.notes, *planned.notes, *_config_notes(recipe, directories)):
        say(line)
    rows = [(node.name, node.dtype, node.shape) for node in planned.nodes]
    _check_space(target, rows)
    with resuming(target) as folder, contextlib.ExitStack() as stack:
        journal = Journal(folder, _fingerprint(recipe, models, rows, shard_bytes))
        stack.callback(journal.close)
        writer = SharedWriter(folder, rows, shard_bytes)
        stack.callback(writer.close)
        journal.check(writer, rows)
        stream = Stream(recipe, models, writer, journal, memory)
        stack.callback(stream.close)
        tensors = stream.run(planned.nodes, progress or (lambda done, total, name: None))
        writer.finish()
        result = {
            "recipe": dict(recipe.text),
            "seed": recipe.seed,
            "sources": {name: _source(recipe, name, model, journal) for name, model in models.items()},
            "dtypes": sorted({dtype.name for _, dtype, _ in rows}),
            "checksums": journal.checksums(),
            "versions": {package: version(package) for package in ("jax", "numpy")},
            **report(recipe, tensors),
        }
        _copy_side_files(donor.directory, folder, {dtype for _, dtype, _ in rows}, planned.config_changes)
        (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        journal.close(remove=True)
    return result


def _fingerprint(recipe: Recipe, models: Mapping[str, Checkpoint], rows: Plan, shard_bytes: float) -> dict[str, Any]:
    """What must be the same for an unfinished merge to go on."""
    files = {info.file for model in models.values() for info in model.tensors.values()}
    state = {str(file): [(found := file.stat()).st_size, found.st_mtime_ns] for file in sorted(files)}
    written = [[name, dtype.name, list(shape)] for name, dtype, shape in rows]
    plain = [recipe.text, recipe.seed, recipe.compat, state, written, shard_bytes, version("jax"), __version__]
    return {"merge": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _directory(recipe: Recipe, name: str) -> Path:
    """Where a model lies: an alias of `sources`, a directory, or a hub id."""
    text = recipe.sources.get(name, name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model '{name}': {text} is a file, expected a model directory")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
        from bmjax.weights.hf import resolve_model  # loads the hub client, which local merges do not need

        return resolve_model(text)
    known = [*recipe.sources, *(step.name for step in recipe.steps)]
    beside = [str(path.parent / p.name) for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(name, [*known, *beside])
    if "did you mean" not in hint:
        hint = f"; known here: {', '.join(known)}" if recipe.sources or len(recipe.steps) > 1 else ""
    at = f"model '{name}': " if name in recipe.sources else ""
    raise UserError(f"{at}{text}: no such model directory{hint}")


def _check_target(target: Path, inputs: Any, overwrite: bool) -> None:
    resolved = target.resolve()
    for directory in inputs:
        source = Path(directory).resolve()
        if source == resolved or resolved in source.parents:
            raise UserError(f"{target}: is (or contains) the input {directory}; choose another output directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory; choose another output directory")
    names = [path.name for path in target.iterdir()]
    if not names:
        return
    if not overwrite:
        raise UserError(f"{target}: exists and is not empty; choose another output directory, or add --overwrite")
    if "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{target}: does not look like a model directory, so it is not overwritten; remove it yourself")


def _check_same(name: str, model: Checkpoint, donor_name: str, donor: Checkpoint) -> None:
    """Both models hold the same tensors: names, shapes, and floating-point where the other is."""
    absent, surplus = donor.tensors.keys() - model.tensors.keys(), model.tensors.keys() - donor.tensors.keys()
    if absent == {"lm_head.weight"} or surplus == {"lm_head.weight"}:
        one, other = (donor_name, name) if absent else (name, donor_name)
        raise UserError(
            f"model '{one}' has its own lm_head.weight, '{other}' shares its embedding's (tied); "
            "tied and untied models cannot be merged: save both the same way"
        )
    for missing, holder, lacker in ((absent, donor_name, name), (surplus, name, donor_name)):
        if missing:
            first = min(missing)
            raise UserError(
                f"model '{lacker}' lacks {len(missing)} tensors that '{holder}' has, among them '{first}'; "
                "only models of one architecture can be merged"
            )
    for info in donor.tensors.values():
        other_info = model.tensors[info.name]
        if other_info.shape != info.shape:
            raise UserError(
                f"tensor '{info.name}' has shape {list(other_info.shape)} in model '{name}' and {list(info.shape)} "
                f"in '{donor_name}'; only models of equal sizes can be merged"
            )
        if other_info.dtype != info.dtype and not {other_info.dtype, info.dtype} <= set(FLOATS):
            raise UserError(
                f"tensor '{info.name}' is {other_info.dtype} in model '{name}' and {info.dtype} in '{donor_name}'; "
                f"only {', '.join(FLOATS)} can be mixed: convert one of them (quantized models: from the original)"
            )


def _config_notes(recipe: Recipe, directories: Mapping[str, Path]) -> list[str]:
    """One line for every input whose config differs from the donor's in more than bookkeeping."""
    configs = {n: read_hf_config(d) for n, d in directories.items() if (d / "config.json").exists()}
    if recipe.donor not in configs:
        return [f"model '{recipe.donor}' has no config.json, so the result has none either"]
    ours, notes = configs[recipe.donor], []
    for name, config in configs.items():
        if bool(config.get("tie_word_embeddings")) != bool(ours.get("tie_word_embeddings")):
            raise UserError(
                f"model '{name}': tie_word_embeddings is {bool(config.get('tie_word_embeddings'))}, "
                f"unlike '{recipe.donor}'; tied and untied models cannot be merged: save both the same way"
            )
        keys = sorted(k for k in {*ours, *config} - _MAY_DIFFER if ours.get(k) != config.get(k))
        if keys:
            notes.append(f"config.json of '{name}' differs from '{recipe.donor}' in {', '.join(keys)}; it is not used")
    return notes


def _check_space(target: Path, rows: Plan) -> None:
    needed = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in rows)
    parent = next(p for p in target.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{target}: the result takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")


def _source(recipe: Recipe, name: str, model: Checkpoint, journal: Journal) -> dict[str, Any]:
    infos = model.tensors.values()
    return {
        "directory": str(recipe.sources.get(name, name)),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": sorted({info.numpy_dtype.name for info in infos}),
        "checksum": journal.source(name),
    }


def _copy_side_files(donor: Path, folder: Path, types: set[np.dtype], changes: Mapping[str, Any]) -> None:
    for name in SIDE_FILES:
        if (donor / name).is_file():
            shutil.copyfile(donor / name, folder / name)
    if (donor / "additional_chat_templates").is_dir():
        shutil.copytree(donor / "additional_chat_templates", folder / "additional_chat_templates")
    if not (folder / "config.json").exists():
        return
    # A loader takes the type from the config: it must be the one that was written.
    config = read_hf_config(folder)
    floats = {dtype.name for dtype in types if dtype.name in ("float32", "bfloat16", "float16", "float64")}
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    changed = {**config, **changes, **({key: floats.pop()} if len(floats) == 1 else {})}
    if changed != config:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
