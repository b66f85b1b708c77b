"""Models and data sets by name: the only place that resolves a directory or asks the Hugging Face Hub.

A model's name is a directory, a URL of a bucket (gs://, s3://), or a hub id: `org/name`, `name` (such as `gpt2`), each
with an optional `@revision`. What exists on disk comes first; a directory that only shares the owner's name hides
nothing.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line, nearest
from bmjax.errors import DISK_ERRORS, disk_problem, maker_hint
from bmjax.io import bucket
from bmjax.io.model_files import check_files, check_names
from bmjax.io.safetensors import INDEX, SINGLE
from bmjax.urls import url_of

SMALL_FILES = (
    "*.json", "*.txt", "*.jinja", "tokenizer*", "*.model", "*.spm", "*.tiktoken", "vocab.*", "bpe.codes", "*.py",
    "*.yaml", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md",
)  # fmt: skip
# Other forms of the same model, and what a trainer left behind.
NEEDLESS_FILES = ("onnx/*", "openvino/*", "original/*", "checkpoint*/*", "runs/*", "trainer_state.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What the makers of an adapter save beside it, which a merge speaks of.
ADAPTER_SIDE_FILES = ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MODULE_FILES = "[1-9]_*/*.safetensors"  # weights of what sentence-transformers puts behind a model
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow")
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")

_WITHOUT_HUB = "give a directory, or set HF_HOME to a cache that has it"

_ID = r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?"


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into (id, revision); a name that exists on disk, or has no @, has no revision."""
    match = re.fullmatch(rf"({_ID})@([\w./-]+)", name)
    return (name, None) if match is None or os.path.lexists(Path(name)) else (match[1], match[2])


def split_adapter(name: str) -> tuple[str, str | None]:
    """Split `MODEL+ADAPTER` into (model, adapter); a name that exists on disk, or has no +, has no adapter.

    A URL may have a + of its own: it is split before another URL, before what is here, and elsewhere only where the
    bucket has nothing of the whole name.
    """
    if "+" not in name or os.path.lexists(Path(name)):
        return name, None
    splits = [(name[: m.start()], name[m.end() :]) for m in re.finditer(r"\+", name)]
    splits = [(model, adapter) for model, adapter in splits if model and adapter]
    if url_of(name):
        sure = [pair for pair in splits if url_of(pair[1]) or os.path.lexists(Path(pair[1]).expanduser())]
        if not sure and bucket.exists(name):
            return name, None
        return next(iter([*sure[::-1], *splits]), (name, None))
    on_disk = [pair for pair in splits if os.path.lexists(Path(pair[0]).expanduser())]
    return next(iter([*on_disk, *splits]), (name, None))


def is_hub_id(name: str) -> bool:
    """Return whether a name without a revision can only mean a hub model of an owner: nothing here is called so."""
    return "/" in name and re.fullmatch(_ID, name) is not None and not os.path.lexists(Path(name))


def pinned(name: str) -> str:
    """Return a hub id with the commit of its copy that is here, `org/name@COMMIT`; any other name as it is."""
    text, revision = split_revision(name.rstrip("/"))
    if url_of(text) or os.path.lexists(Path(text).expanduser()) or not re.fullmatch(_ID, text):
        return name
    try:
        commit = _snapshot(text, revision, "", "", False, ()).name
    except UserError:
        return name
    return f"{text}@{commit}" if re.fullmatch(r"[0-9a-f]{40}", commit) else name


def adapter_directory(name: str, *, label: str = "", download: bool = True) -> Path:
    """Return the directory of an adapter: one that is here, a bucket's, or a hub model's (`@revision` if wanted)."""
    files = (*ADAPTER_FILES, *ADAPTER_SIDE_FILES)
    if url := url_of(name):
        if "adapter_config.json" not in bucket.names_in(url):
            raise UserError(f"{label}{url}: no such adapter directory in the bucket, it has no adapter_config.json")
        bucket.fetch(url, lambda file: file in files)
        return bucket.mirror(url)
    text, revision = split_revision(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if os.path.lexists(path) or not re.fullmatch(_ID, text):
        raise UserError(f"{label}{text}: no such adapter directory")
    return _snapshot(text, revision, label, "", download, files)


def model_directory(
    name: str | Path, *, label: str = "", known: Sequence[str] = (), download: bool = True, weights: bool = True
) -> Path:
    """Return the directory of a model, fetched from the hub or a bucket when it is no directory here.

    label: what errors begin with, for instance "model 'math': ". known: other names that were possible there, for the
    hint of an error. download: whether the hub may be asked; otherwise a hub model must have been fetched before.
    weights: whether weights are fetched, too; otherwise config and tokenizer only. UserError for a file, a misspelt
    directory, and a model that the hub does not give.
    """
    if url := url_of(name):
        return _bucket_model(url, label, weights)
    text, revision = split_revision(str(name))
    path = Path(text).expanduser()
    if re.fullmatch(rf"{_ID}/", text):
        text = text[:-1]  # an id with a slash behind it, as a directory may have
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
            f"{label}{text}: no such directory; a LoRA adapter (MODEL+ADAPTER) is an input of `bmjax merge` alone: "
            "merge the adapter into its model first and name the result"
        )
    if "@" in text:
        raise UserError(f"{label}{text}: no such directory; a hub model's revision is given as org/name@revision")
    siblings = [str(entry) for entry in path.parent.glob("*") if entry.is_dir()]
    hint = nearest(text, [*known, *siblings])
    if maker := maker_hint(text):
        hint = maker
    elif "did you mean" not in hint:
        form = "" if re.fullmatch(_ID, text) else "; a hub id looks like org/name"
        hint = f"; known here: {', '.join(known)}" if known else form
    if not re.fullmatch(_ID, text):
        raise UserError(f"{label}{text or repr(text)}: no such model directory{hint}")
    snapshot = _snapshot(text, revision, label, hint, download, SMALL_FILES)
    if weights:
        # Beside the shards of the index, a repository may hold the same weights once more under other names.
        if download:
            files = (*ADAPTER_FILES, MODULE_FILES, *_weight_files(snapshot))
            snapshot = _snapshot(text, revision, label, hint, download, files)
            if not any(snapshot.glob("*.safetensors")):
                check_names(_names_on_hub(text, revision), str(name), label)
        check_files(snapshot, label)
    return snapshot


def _names_on_hub(name: str, revision: str | None) -> list[str]:
    """Return the files of a hub model; none where the hub does not say."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(name, revision=revision)
    except Exception:  # its own and its HTTP library's errors, and those of values that it refuses
        return []


def _weight_files(directory: Path) -> list[str]:
    """Return the names of the files that hold a model's weights, by the index in a directory if it has one."""
    try:
        names = set(json.loads((directory / INDEX).read_text("utf-8-sig"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [SINGLE]
    return sorted(name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name))


def _bucket_model(url: str, label: str, weights: bool) -> Path:
    """Copy a model out of a bucket; UserError where it is not whole."""
    inside = bucket.names_in(url)
    if not inside:
        raise UserError(f"{label}{url}: no such model directory in the bucket")
    if "config.json" not in inside:
        raise UserError(
            f"{label}{url}: holds {', '.join(inside[:3])}{' ...' if inside[3:] else ''} but no config.json, which is "
            "written last; is the model still being written?"
        )
    if weights and not any("/" not in name and name.endswith(".safetensors") for name in inside):
        raise UserError(f"{label}{url}: no safetensors weights; it holds {', '.join(inside[:8])}")
    bucket.fetch(url, lambda name: _matches(name, SMALL_FILES) and not _matches(name, NEEDLESS_FILES))
    if weights:
        files = set(_weight_files(bucket.mirror(url)))
        bucket.fetch(url, lambda name: name in files or _matches(name, (MODULE_FILES,)))
        check_files(bucket.mirror(url), label)
    return bucket.mirror(url)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a file, by its path in a model's directory, fits a pattern, as the hub reads patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _snapshot(name: str, revision: str | None, label: str, hint: str, download: bool, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Of a model that must be here already, whatever was fetched counts.
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns] if download else None,
                ignore_patterns=[*(pattern for pattern in NEEDLESS_FILES if download)] or None,
                local_files_only=not download,
            )
        )
    except Exception as error:
        # A copy that lacks some file of the repository, but perhaps none that is read.
        partial = getattr(error, "snapshot_path", None)
        if partial and (not download or not any("safetensors" in pattern for pattern in patterns)):
            return Path(partial)
        fetch = f"hf download {name}" if revision is None else f"hf download {name} --revision {revision}"
        reason = (
            "the hub's model of that name is not in the cache, so it cannot be checked; "
            f"run `{fetch}` first, or merge without --check"
        )
        if download:
            reason = f"the Hugging Face Hub did not give it, either: {_reason(error, name, revision)}"
        spelt = name if revision is None else f"{name}@{revision}"
        raise UserError(f"{label}{spelt}: no such model directory{hint}; {reason}") from None


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """Return in a few words why the hub did not give a model, and what helps."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; accept its terms at {constants.ENDPOINT}/{name}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it has no model of that name, or a private one; for that, run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"its model has no revision '{revision}'"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.is_offline_mode():
            return f"HF_HUB_OFFLINE is set, and the cache does not have it; unset that, or {_WITHOUT_HUB}"
        cause = f": {first_line(error.__cause__)}" if error.__cause__ else ""
        return f"it cannot be reached{cause}; the cache does not have it; without a network {_WITHOUT_HUB}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or constants.HF_HOME}: {disk_problem(error)}; HF_HOME says where the cache is"
    return first_line(error)


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
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            reason = f"{error.filename or datasets.config.HF_CACHE_HOME}: {disk_problem(error)}; HF_HOME says where"
            raise UserError(f"{key}: {name}: the hub's data set cannot be kept: {reason}") from None
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
