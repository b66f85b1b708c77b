"""The files beside a model's weights that a merge's result gets: all but those that are named here.

Plans and the file engine call it. Nothing is run or loaded: a model's code is copied as text.
"""

import contextlib
import json
import os
import re
import shutil
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NoReturn

from bmjax.config import UserError, read_text, shortened
from bmjax.merge.recipe.tokenizer import FURTHER_TEMPLATES

MAX_BYTES = 2**28  # of one file that is not the tokenizer's, without which a result is no use
MAX_FILES = 1000  # of one folder
# Each a pattern of names, of files and of folders at any depth.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data", "*.ot", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.tflite", "*.distcp", "*.nemo",
    "*.safetensors.index.json", "*.bin.index.json",
)  # fmt: skip
_TRAINER = (
    "trainer_state.json", "training_args.*", "optimizer*", "scheduler.*", "rng_state*", "zero_to_fp32.py", "latest",
    "*_results.json", "*.tfevents.*", "adapter_config.json",
)  # fmt: skip
_TRAINER_FOLDERS = (
    "checkpoint-*", "checkpoints", "global_step*", "runs", "wandb", "logs", "tensorboard*", "tb_logs", "lightning_logs",
    "mlruns",
)  # fmt: skip
# What the result has of its own, or what speaks of another model's making.
_OWN = ("README.md", "merge_report.json", "recipe.yaml", "mergekit_config.yml", "mergekit_config.yaml")
_OTHER_FORMATS = ("onnx", "openvino", "original", "gguf", "coreml", "metal")
_DATA = ("*.jsonl", "*.parquet", "*.arrow", "*.csv", "*.tsv", "*.log")
_COMPILED, _COMPILED_FOLDER = ("*.pyc", "*.pyo"), "__pycache__"  # of code that is copied as text
_TOKENIZER = (
    "tokenizer*", "tokenization_*.py", "vocab.*", "vocab-*.json", "merges.txt", "bpe.codes", "*.model", "*.spm",
    "*.tiktoken", "tekken.json", "added_tokens.json", "special_tokens_map.json", "chat_template.*",
    f"{FURTHER_TEMPLATES}/*",
)  # fmt: skip
_NEVER, _FOLDERS = (*_TRAINER, *_DATA, *_COMPILED), (*_TRAINER_FOLDERS, _COMPILED_FOLDER)  # wherever they lie


@dataclass
class SideFiles:
    """Files of a directory, and a line on each kind of those that were left out and are not weights."""

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def side_files(directory: Path) -> SideFiles:
    """Return the files that go with a model's weights, in order of their names.

    Left out are weights, a trainer's state, the same model in other formats, data, hidden files, and what a merge
    writes itself. A folder that holds weights is another model, unless sentence-transformers' modules.json names it:
    then all of it is copied.
    """
    listed, modules = SideFiles(), _module_folders(directory)
    too_large: list[str] = []
    folders_left: list[str] = []

    def add(files: Iterable[Path]) -> None:
        for file in files:
            path = file.relative_to(directory)
            if file.stat().st_size <= MAX_BYTES or is_tokenizer_file(path):
                listed.paths.append(file)
            else:
                too_large.append(path.as_posix())

    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            if not _is(path.name, (*_WEIGHTS, *_OWN, *_NEVER)):
                add([path])
        elif path.is_dir() and not path.is_symlink() and not _is(path.name, (*_FOLDERS, *_OTHER_FORMATS)):
            files = list(_files_in(path))
            is_module = any(folder.parts[0] == path.name for folder in modules)
            weights = [file for file in files if _is(file.name, _WEIGHTS)]
            if len(files) > MAX_FILES or (weights and not is_module):
                folders_left.append(f"{path.name}/")
                continue
            if weights:
                names = ", ".join(file.relative_to(directory).as_posix() for file in weights[:3])
                listed.notes.append(f"{names}: weights of a module that modules.json names; copied, not merged")
            listed.paths += weights
            add(file for file in files if file not in weights)
    if too_large:
        listed.notes.append(f"not copied, more than {MAX_BYTES} bytes: {', '.join(too_large)}")
    if folders_left:
        listed.notes.append(f"not copied, folders with weights of their own or many files: {', '.join(folders_left)}")
    return listed


def lost_by_overwriting(output: str | Path, names: Collection[str], donor: Path) -> str | None:
    """Return a line where a directory that a merge replaces holds what the merge does not write; None where nothing.

    names: of what the directory holds. donor: whose side files the result gets.
    """
    if not names:  # the donor's files need not be looked at
        return None
    written = (*_WEIGHTS, *_OWN, *_TOKENIZER, FURTHER_TEMPLATES, "config.json", "generation_config.json")
    copied = {path.relative_to(donor).parts[0] for path in side_files(donor).paths}
    lost = sorted(name for name in names if name not in copied and not _is(name, written))
    if not lost:
        return None
    return (
        f"{output}: overwriting it removes {shortened(lost, 5)}, which this merge does not write; move what you "
        "want to keep"
    )


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file, and make its folders. JSON loses the byte order mark that no loader reads."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        with source.open("rb") as file:
            if file.read(len(BOM_UTF8)) == BOM_UTF8:
                target.write_bytes(file.read())
                return
    shutil.copyfile(source, target)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return those side files of a directory that make its tokenizer and chat template."""
    return [path for path in side_files(directory).paths if is_tokenizer_file(path.relative_to(directory))]


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file, by its path in a model's directory, belongs to the tokenizer."""
    return _is(path.as_posix(), _TOKENIZER)


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its folders that may be copied, weights among them.

    Links to folders are not followed, they may lead in a circle.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}; get the right to, or move it away")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is(name, _FOLDERS))
        kept = (name for name in sorted(names) if not name.startswith(".") and not _is(name, _NEVER))
        yield from (path for name in kept if (path := Path(parent, name)).is_file())


def _module_folders(directory: Path) -> list[PurePosixPath]:
    """Return the folders that sentence-transformers' modules.json names inside a directory."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    with contextlib.suppress(UserError, ValueError, RecursionError, AttributeError):
        paths = [str(module.get("path") or "") for module in json.loads(read_text(path))]
        return [PurePosixPath(text) for text in paths if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", text)]
    return []
