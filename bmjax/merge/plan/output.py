"""The directory that a merge writes, and sizes in words."""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from bmjax.config import UserError, is_text
from bmjax.io import bucket
from bmjax.io.atomic import replacement_problem
from bmjax.urls import url_of

_UNITS = {"B": 1} | {f"{prefix}{kind}": base ** (i + 1)
                     for kind, base in (("B", 1000), ("iB", 1024)) for i, prefix in enumerate("KMGT")}  # fmt: skip


def check_target(target: Path, inputs: Iterable[Path], overwrite: bool) -> set[str]:
    """Return the names of what `target` holds, which the merge replaces.

    Raises a UserError unless it may be written: no input, not around or in one, empty unless `overwrite`.
    """
    if not is_text(str(target)):
        raise UserError(f"{ascii(str(target))[:80]}: its name is no Unicode text; choose another output directory")
    url = url_of(target)
    shown = url or str(target)
    if url is None:
        try:
            os.stat(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{target}: {error.strerror}; choose another output directory") from None
    resolved = bucket.mirror(target).resolve()  # inputs in a bucket were copied to the same tree
    for directory in inputs:
        source = directory.resolve()
        if resolved in (source, *source.parents):
            raise UserError(f"{shown}: is (or contains) the input {directory}; choose another output directory")
        if source in resolved.parents:
            raise UserError(f"{shown}: is inside the input {directory}; choose another output directory")
    if url is not None:
        if bucket.is_unfinished(url):
            return set()
        return _checked_content(url, {name.partition("/")[0] for name in bucket.names_in(url)}, overwrite)
    names = set()
    if target.exists():
        if not target.is_dir():
            raise UserError(f"{target}: exists and is not a directory; choose another output directory")
        names = _checked_content(str(target), {path.name for path in target.iterdir()}, overwrite)
    if problem := replacement_problem(resolved):
        raise UserError(f"{target}: {problem}")
    return names


def _checked_content(target: str, names: set[str], overwrite: bool) -> set[str]:
    if names and "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{target}: exists and is not a model directory, so it is never overwritten; choose another output "
            "directory, or remove it yourself"
        )
    if names and not overwrite:
        raise UserError(f"{target}: exists and is not empty; choose another output directory, or add --overwrite")
    return names


def check_space(target: Path, needed: int) -> int:
    """Return the free bytes where `target` will be; UserError if they are fewer than `needed`."""
    parent = next(p for p in bucket.mirror(target).resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{target}: the result takes {size_text(needed)}, {size_text(free)} are free there; free some, or "
            "choose another output directory"
        )
    return free


def parse_size(text: str, option: str) -> int:
    """Return the bytes of `2GiB`, `512MiB`, `5GB`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMGT]?i?B)", text, re.ASCII)
    if match is None or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise UserError(f"{option}: expected a size such as 512MiB, 2GiB or 5GB, found '{text}'")
    return size


def size_text(size: int) -> str:
    """Return a number of bytes in the largest decimal unit that leaves at least one whole."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"
