"""Where a merge reads and writes: model directories, hub models, the output directory, and sizes in words."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from bmjax.config import UserError, is_text, nearest
from bmjax.merge.recipe.recipe import Recipe

_UNITS = {"B": 1} | {f"{prefix}{kind}": base ** (i + 1)
                     for kind, base in (("B", 1000), ("iB", 1024)) for i, prefix in enumerate("KMGT")}  # fmt: skip


def locate(recipe: Recipe, name: str, *, download: bool = True, weights: bool = True) -> Path:
    """The directory of one of the recipe's inputs: an alias of `sources`, a directory, or a hub model `org/name@rev`.

    download False: a hub model must have been fetched before. weights False: only config and tokenizer are fetched.
    """
    text, revision = recipe.path(name), recipe.revision(name)
    path = Path(text).expanduser()
    try:
        with contextlib.suppress(ValueError):  # a zero byte
            os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"model '{name[:80]}...': {error.strerror}") from None
    if path.is_dir():
        if revision is not None:
            raise UserError(f"model '{name}': {text} is a directory, which has no revisions; remove @{revision}")
        return path
    if path.exists():
        raise UserError(f"model '{name}': {text} is a file, expected a model directory")
    if "+" in text:
        raise UserError(
            f"model '{name}': no such directory; LoRA adapters (MODEL+ADAPTER) are not merged on the way: "
            "merge the adapter into its model first (peft: merge_and_unload) and name the result"
        )
    if "@" in text:
        raise UserError(f"model '{name}': no such directory; a hub model's revision is given as org/name@revision")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
        return _hub(text, revision, download, weights)
    known = [*recipe.sources, *(step.name for step in recipe.steps)]
    beside = [str(path.parent / p.name) for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(text, [*known, *beside])
    if "did you mean" not in hint:
        hint = f"; known here: {', '.join(known)}" if recipe.sources or len(recipe.steps) > 1 else ""
    at = f"model '{name}': " if name in recipe.sources else ""
    raise UserError(f"{at}{text}: no such model directory{hint}")


def _hub(text: str, revision: str | None, download: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    at = "" if revision is None else f"@{revision}"
    if not download:
        try:
            return Path(snapshot_download(text, revision=revision, local_files_only=True))
        except Exception:
            raise UserError(
                f"{text}{at}: no such directory, and the hub's model is not here yet, so it cannot be checked"
            ) from None
    from bmjax.weights.hf import HUB_FILES

    patterns = [pattern for pattern in HUB_FILES if weights or "safetensors" not in pattern]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{text}{at}: no such directory, and the Hugging Face Hub did not give it: {line[:200]}"
        ) from None


def tokenizer_directory(recipe: Recipe, *, download: bool = True) -> list[Path]:
    """The directory that nothing but the tokenizer comes from, if there is one."""
    source = None if recipe.tokenizer is None else recipe.tokenizer.source
    if source in (None, "base", "union", *recipe.inputs):
        return []
    return [locate(recipe, str(source), download=download, weights=False)]


def check_target(target: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """UserError unless `target` may be written: not an input, around one or in one, and empty unless `overwrite`."""
    if not is_text(str(target)):
        raise UserError(f"{ascii(str(target))[:80]}: its name is no Unicode text; choose another output directory")
    try:
        os.stat(target)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; choose another output directory") from None
    resolved = target.resolve()
    for directory in inputs:
        source = Path(directory).resolve()
        if source == resolved or resolved in source.parents:
            raise UserError(f"{target}: is (or contains) the input {directory}; choose another output directory")
        if source in resolved.parents:
            raise UserError(f"{target}: is inside the input {directory}; choose another output directory")
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


def check_space(target: Path, needed: int) -> int:
    """The free bytes where `target` will be; UserError if they are fewer than `needed`."""
    parent = next(p for p in target.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{target}: the result takes {size_text(needed)}, {size_text(free)} are free there")
    return free


def parse_size(text: str, option: str) -> int:
    """Bytes of `2GiB`, `512MiB`, `5GB`."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMGT]?i?B)", text, re.ASCII)
    if found is None or found[2] not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise UserError(f"{option}: expected a size such as 512MiB, 2GiB or 5GB, found '{text}'")
    return size


def size_text(size: int) -> str:
    """A number of bytes in the largest decimal unit that leaves at least one whole."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"
