"""Sizes and times of what names mean, by which whoever keeps a result notices that its inputs have changed.

Caches of tokens, selections and the stages of a run store what these functions return: its form must stay as it is.
"""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmjax.io import bucket, hub
from bmjax.io.rows import files_of, is_here
from bmjax.log import silent
from bmjax.urls import url_of


def data_states(names: Iterable[str]) -> list[list[Any]]:
    """Return [path, bytes, time of the last change] of every file that names of data mean; also of a hub data set's."""
    files = []
    for name in names:
        if hub.is_dataset_id(name):
            files += hub.dataset_files(name)
        elif is_here(name):
            files += files_of(name, silent)
    return [bucket.state(file) for file in files if file.is_file()]


def file_states(names: Iterable[str]) -> list[list[Any]]:
    """Return names of data, models and templates, each with the state of all files that it means.

    Those are a file, all files of a folder, or those of a pattern, on this machine or in a bucket; none for other names
    (a hub id). Paths in a folder are relative, so that it may move. Nothing is copied from a bucket.
    """
    return [[name, *_state(name)] for name in names]


def _state(name: str) -> list[Any]:
    if url_of(name):
        return bucket.states(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _size_and_time(path)
    if path.is_dir():
        files = [(str(file.relative_to(path)), file) for file in path.rglob("*")]
    else:
        files = [(file, Path(file)) for file in glob.glob(str(path), recursive=True)]
    return [[label, *_size_and_time(file)] for label, file in sorted(files) if file.is_file()]


def _size_and_time(file: Path) -> list[int]:
    info = file.stat()
    return [info.st_size, info.st_mtime_ns]
