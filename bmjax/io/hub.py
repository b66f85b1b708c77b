"""Models and data sets by name: the only place that resolves a directory or asks the Hugging Face Hub.

A model's name is a directory, or a hub id: `org/name`, `name` (such as `gpt2`), each with an optional `@revision`. What
exists on disk comes first; a directory that only shares the owner's name hides nothing.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line, nearest
from bmjax.io.model_files import check_files

WEIGHT_FILES = ("*.safetensors",)
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*")
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow")
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")

_ID = r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?"


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into (id, revision); a name that exists on disk, or has no @, has no revision."""
    match = re.fullmatch(rf"({_ID})@([\w./-]+)", name)
    return (name, None) if match is None or os.path.lexists(Path(name)) else (match[1], match[2])


def model_directory(
    name: str | Path, *, label: str = "", known: Sequence[str] = (), download: bool = True, weights: bool = True
) -> Path:
    """Return the directory of a model, fetched from the hub when it is no directory here.

    label: what errors begin with, for instance "model 'math': ". known: other names that were possible there, for the
    hint of an error. download: whether the hub may be asked; otherwise a hub model must have been fetched before.
    weights: whether weights are fetched, too; otherwise config and tokenizer only. UserError for a file, a misspelt
    directory, and a model that the hub does not give.
    """
    text, revision = split_revision(str(name))
    path = Path(text).expanduser()
    if len(text) > 4096 or any(len(part) > 255 for part in path.parts):
        raise UserError(f"{label}{text[:80]}...: the name is too long")
    directory, _, suffix = str(name).rpartition("@")
    if directory and not os.path.lexists(name) and os.path.lexists(directory):
        raise UserError(f"{label}{directory} is a directory, which has no revisions; remove @{suffix}")
    if text and path.is_dir():
        if weights:
            check_files(path, label)
        return path
    if text and os.path.lexists(path):
        problem = "is a file," if path.exists() else "no such model directory, only a link that leads nowhere;"
        raise UserError(f"{label}{text}: {problem} expected a model directory or a hub id like org/name")
    if "+" in text:
        raise UserError(
            f"{label}{text}: no such directory; LoRA adapters (MODEL+ADAPTER) are not merged on the way: "
            "merge the adapter into its model first (peft: merge_and_unload) and name the result"
        )
    if "@" in text:
        raise UserError(f"{label}{text}: no such directory; a hub model's revision is given as org/name@revision")
    siblings = [str(entry) for entry in path.parent.glob("*") if entry.is_dir()]
    hint = nearest(text, [*known, *siblings])
    if "did you mean" not in hint:
        hint = f"; known here: {', '.join(known)}" if known else "; a hub id looks like org/name"
    if not re.fullmatch(_ID, text):
        raise UserError(f"{label}{text or repr(text)}: no such model directory{hint}")
    snapshot = _snapshot(text, revision, label, hint, download, weights)
    if weights:
        check_files(snapshot, label)
    return snapshot


def _snapshot(name: str, revision: str | None, label: str, hint: str, download: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHT_FILES, *SMALL_FILES] if weights else [*SMALL_FILES]
    try:
        # Of a model that must be here already, whatever was fetched counts.
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns if download else None, local_files_only=not download
            )
        )
    except Exception as error:
        reason = "the hub's model of that name is not here yet, so it cannot be checked"
        if download:
            reason = f"the Hugging Face Hub did not give it, either: {first_line(error)}"
        spelt = name if revision is None else f"{name}@{revision}"
        raise UserError(f"{label}{spelt}: no such model directory{hint}; {reason}") from None


def is_data_file(path: Path) -> bool:
    """Return whether a path is called as files of rows are, packed ones too."""
    unpacked = path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path
    return unpacked.suffix in DATA_SUFFIXES


def is_dataset_id(name: str) -> bool:
    """Return whether `name` means a hub data set: no file of that name, and of the form of an id."""
    path = Path(name)
    form = re.fullmatch(rf"{_ID}(?:@[\w./-]+)?(?::[\w.-]*){{0,2}}", name)
    return form is not None and not is_data_file(path) and not os.path.lexists(path)


def dataset_rows(name: str, key: str = "data") -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub data set. Without a network, its copy in the cache is read.

    name: `org/name`, `org/name:subset` or `org/name:subset:split`, with `@revision` after the id; without a split,
    `train`. key: the setting that named it, for errors.
    """
    yield from _load_dataset(name, key)


def dataset_files(name: str) -> list[Path]:
    """Return the files in the cache of `datasets` that hold a hub data set; none where it cannot be had."""
    try:
        return [Path(file["filename"]) for file in getattr(_load_dataset(name, "data"), "cache_files", ())]
    except UserError:
        return []


def _load_dataset(name: str, key: str) -> Any:
    import datasets

    identity, _, rest = name.partition(":")
    repository, _, revision = identity.partition("@")
    subset, _, split = rest.partition(":")
    offline = not _hub_answers()
    before, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    try:
        if offline:
            # Keeps `datasets` from the network, and its warning about that from the terminal.
            datasets.config.HF_HUB_OFFLINE = True
            datasets.logging.set_verbosity_error()
        rows = datasets.load_dataset(repository, subset or None, split=split or "train", revision=revision or None)
    except Exception as error:
        reason = f"{'the hub cannot be reached; ' if offline else ''}{first_line(error)}"
        raise UserError(f"{key}: {name}: no such file, nor a data set that the hub gives: {reason}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)
    if offline and revision and not all(revision in file["filename"] for file in rows.cache_files):
        raise UserError(f"{key}: {name}: the hub cannot be reached, and the cached copy is not known to be @{revision}")
    return rows


def _hub_answers() -> bool:
    """Ask the hub for anything, once. The libraries would try six times, for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # its HTTP library's errors, which differ between versions
        return False
    return True
