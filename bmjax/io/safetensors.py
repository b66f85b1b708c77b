"""Safetensors files: strict reading by byte range, and writing in parts. Import, export and merging call it.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. Reading trusts nothing
of the header before it agrees with the file's real size, so a hostile file cannot make it allocate or read
beyond the file. Weights in pickle are refused.
"""

import contextlib
import json
import math
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from bmjax.config import UserError, first_line, is_text, read_text
from bmjax.io.atomic import write_atomic

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
    "I8": np.dtype(np.int8), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_INDEX_CHARACTERS = 2**25  # that of 90,000 tensors has 9 million
MAX_DIMENSIONS = 32
BOUNCE_BYTES = 16 * 2**20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Plan = Sequence[tuple[str, np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's bytes: `start` is the absolute offset in `file`, `dtype` the format's name for it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory by name; only headers have been read."""

    directory: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, or the block of it that `index` selects, in its stored dtype (bf16 as ml_dtypes.bfloat16).

        index: slices of step 1 for the leading dimensions; absent dimensions are whole. Only the bytes of the rows
        (first dimension) that it selects are read.
        """
        info = self.tensors[name]
        index = index + (slice(None),) * (len(info.shape) - len(index))
        bounds = [part.indices(size) for part, size in zip(index, info.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{name}: slices must have step 1, found {index}")
        out = np.empty([max(0, stop - start) for start, stop, _ in bounds], info.numpy_dtype)
        if not out.size:
            return out
        row = math.prod(info.shape[1:])  # entries
        first = bounds[0][0] * row if bounds else 0
        with contextlib.closing(Reader()) as reader:
            if out.shape[1:] == info.shape[1:]:
                reader.read(info, first, out)
                return out
            # Of rows that are needed in part, some at a time are read whole into a bounce buffer.
            count = max(1, min(len(out), BOUNCE_BYTES // (row * out.itemsize)))
            bounce = np.empty((count, *info.shape[1:]), info.numpy_dtype)
            for done in range(0, len(out), count):
                part = bounce[: len(out) - done]
                reader.read(info, first + done * row, part)
                out[done : done + len(part)] = part[:, *index[1:]]
        return out


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open the checkpoint of a Hugging Face directory: model.safetensors, or the shards that its index names.

    Raises UserError, one line naming the file, for anything missing, truncated, inconsistent or unsafe.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory")
    # Links that lead nowhere are there, too.
    if os.path.lexists(directory / SINGLE):
        return Checkpoint(directory, read_header(directory / SINGLE))
    if os.path.lexists(directory / INDEX):
        return Checkpoint(directory, _read_shards(directory))
    names = sorted(path.name for path in directory.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?$", name)]
    if shards:
        raise UserError(f"{directory}: has {shards[0]} but neither {SINGLE} nor {INDEX}; add the missing file")
    if pickles:
        raise UserError(f"{directory}: {pickles[0]}: pickle weights are refused; convert to safetensors")
    raise UserError(f"{directory}: no weights, expected {SINGLE} or {INDEX}")


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    path = directory / INDEX
    try:
        index = json.loads(read_text(path, MAX_INDEX_CHARACTERS), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {first_line(error)}") from None
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path}: 'weight_map' must map tensor names to files, found {_short(mapping)}")
    by_file: dict[str, set[str]] = {}
    for name, file in mapping.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0\ud800-\udfff]", file):
            raise UserError(
                f"{path}: tensor {_short(name)} is said to be in {_short(file)}; "
                "expected the name of a file in the same directory"
            )
        by_file.setdefault(file, set()).add(name)
    tensors: dict[str, TensorInfo] = {}
    for file, named in sorted(by_file.items()):
        in_file = read_header(directory / file)
        if absent := sorted(named - in_file.keys()):
            raise UserError(f"{directory / file}: lacks {listing(absent)} that {INDEX} says it holds")
        if surplus := sorted(in_file.keys() - named):
            raise UserError(f"{directory / file}: holds {listing(surplus)} that {INDEX} does not place there")
        tensors.update(in_file)
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file in the order of their bytes. UserError unless header and file agree exactly."""
    with contextlib.closing(Reader()) as reader:
        fd = reader.descriptor(path)
        size = os.fstat(fd).st_size
        if size < 8:
            raise UserError(f"{path}: {size} bytes, too short for a safetensors file; it was cut off")
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{path}: the header claims {length} bytes, the file has {size}; not safetensors, or it was cut off"
            )
        raw = np.empty(length, np.uint8)
        _read_into(fd, raw, 8, path)
    try:
        header = json.loads(raw.tobytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the header is not valid JSON: {first_line(error)}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header must be a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map names to texts, found {_short(metadata)}")
    data = 8 + length
    infos = sorted((_tensor(path, *item, data) for item in header.items()), key=lambda info: (info.start, info.nbytes))
    end = data
    for info in infos:
        if info.start != end:
            problem = "overlaps the tensor" if info.start < end else "leaves a gap"
            start = info.start - data
            raise UserError(f"{path}: tensor {_short(info.name)} starts at byte {start} and {problem} before it")
        end += info.nbytes
    if end != size:
        difference = f"{size - end} more than" if size > end else f"{end - size} less than"
        raise UserError(f"{path}: {size} bytes, {difference} its header describes; it was cut off or damaged")
    return {info.name: info for info in infos}


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    label = f"{path}: tensor {_short(name)}"
    if not is_text(name):
        raise UserError(f"{label}: its name is no text: half a character")
    if not isinstance(entry, dict):
        raise UserError(f"{label}: expected dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{label}: dtype {_short(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"{label}: shape {_short(shape)}, expected at most {MAX_DIMENSIONS} whole numbers >= 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{label}: data_offsets {_short(offsets)}, expected [start, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise UserError(f"{label}: {offsets[1] - offsets[0]} bytes, but {dtype} {_short(shape)} takes {_short(nbytes)}")
    return TensorInfo(name, path, dtype, tuple(shape), data + offsets[0], nbytes)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {_short(key)} stands twice")
        result[key] = value
    return result


def _short(value: Any) -> str:
    """Return `value` on one line of at most 80 characters."""
    text = f"about 2**{value.bit_length()}" if isinstance(value, int) and value.bit_length() > 256 else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listing(names: Sequence[str]) -> str:
    """Return up to three names and a count, for one-line errors: `2 tensors (a, b)`."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(_short(n)[1:-1] for n in names[:3])}{more})"


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_into(fd: int, out: np.ndarray, offset: int, path: Path) -> None:
    view, done = _bytes_of(out), 0
    try:
        while done < len(view):
            count = os.preadv(fd, [view[done : done + 2**30]], offset + done)
            if count == 0:
                raise UserError(f"{path}: ended at byte {offset + done}; it was cut off while being read")
            done += count
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


class Reader:
    """Reads parts of tensors from any thread; files stay open until `close`."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of a regular file, opened once; symbolic links are followed."""
        with self._lock:
            if path not in self._fds:
                try:
                    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    raise UserError(f"{path}: cannot open: {error.strerror}") from None
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    os.close(fd)
                    raise UserError(f"{path}: not a regular file")
                self._fds[path] = fd
            return self._fds[path]

    def read(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill `out`, of the tensor's dtype, with its entries from flat index `start` on."""
        _read_into(self.descriptor(info.file), out, info.start + start * info.numpy_dtype.itemsize, info.file)

    def advise(self, info: TensorInfo) -> None:
        """Have the system read a tensor's first part ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self.descriptor(info.file), info.start, min(info.nbytes, BOUNCE_BYTES), os.POSIX_FADV_WILLNEED
            )

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class SharedWriter:
    """The files of a plan with all their tensors, for writing any part at any time from any thread.

    plan: (name, dtype, shape) of every tensor. A file ends where the next tensor would take it over `shard_bytes`;
    several files get an index. The files have their full size from the start, so that a disk too small is known before
    anything is computed. Made again in a directory with these files, it goes on with them. `finish` puts them on disk,
    and so does a `with` block that ends well. Use it inside `replacing`, so that a reader never sees a part of them.
    """

    def __init__(self, directory: str | Path, plan: Plan, shard_bytes: float = 5e9) -> None:
        self.directory = Path(directory)
        self._extents: dict[str, tuple[int, int, int]] = {}  # descriptor, offset and bytes of every tensor
        self._fds: list[int] = []
        sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in plan}
        if len(sizes) != len(plan):
            raise ValueError("the plan names a tensor twice")

        # Deal the tensors out to files.
        shards: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
        used = 0
        for name, dtype, shape in plan:
            if used and used + sizes[name] > shard_bytes:
                shards.append([])
                used = 0
            used += sizes[name]
            shards[-1].append((name, dtype, shape))
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
        self.files = [self.directory / name for name in names]
        self._weight_map = {row[0]: file for file, shard in zip(names, shards, strict=True) for row in shard}

        # Open the files, take their space and write their headers.
        try:
            for path, shard in zip(self.files, shards, strict=True):
                self._begin(path, shard)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, tensors: Plan) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest first, as the safetensors library does: every tensor stays aligned to its own item size.
        for name, dtype, shape in sorted(tensors, key=lambda row: -row[1].itemsize):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)

        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        if os.fstat(fd).st_size != data + end:
            os.ftruncate(fd, 0)
            allocate = getattr(os, "posix_fallocate", lambda fd, _, size: os.ftruncate(fd, size))
            allocate(fd, 0, data + end)
        _write_at(fd, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for name, _, _ in tensors:
            start, end = header[name]["data_offsets"]
            self._extents[name] = fd, data + start, end - start

    def __enter__(self) -> "SharedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        self.close()

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write the bytes of `data` from byte `start` of a tensor on."""
        fd, offset, size = self._extents[name]
        if start + data.nbytes > size:
            raise ValueError(f"{name}: bytes {start} to {start + data.nbytes}, the tensor has {size}")
        _write_at(fd, _bytes_of(data), offset + start)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with what was written from byte `start` of a tensor on."""
        fd, offset, _ = self._extents[name]
        _read_into(fd, out, offset + start, self.directory)

    def flush(self, name: str) -> None:
        """Put the file that holds a tensor on disk as far as it is written."""
        os.fdatasync(self._extents[name][0])

    def finish(self) -> None:
        """Put the files on disk and write the index of several files; everything is written."""
        for fd in self._fds:
            os.fsync(fd)
        self.close()
        if len(self.files) > 1:
            total = sum(size for _, _, size in self._extents.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
            write_atomic(self.directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Close the files as they are."""
        while self._fds:
            os.close(self._fds.pop())


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + 2**30], offset + done)
