"""Safetensors files: strict reading by byte range, streamed writing, and outputs that appear whole or not at all.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from bmjax.config import UserError, is_text, read_text
from bmjax.io.atomic import replacing, write_atomic

__all__ = [
    "DTYPES", "DTYPE_NAMES", "Checkpoint", "Reader", "SharedWriter", "TensorInfo", "Writer", "listing",
    "open_checkpoint", "read_header", "replacing", "write_atomic",
]  # fmt: skip

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
    """Where one tensor lies: `start` is the absolute byte offset in `file`, `dtype` the format's own name."""

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
        """A tensor, or the block of it that `index` selects, in its stored dtype (bf16 as ml_dtypes.bfloat16).

        index: slices of step 1 for the leading dimensions; absent ones are whole. Only the bytes of the rows
        (first dimension) that it selects are read.
        """
        info = self.tensors[name]
        index = index + (slice(None),) * (len(info.shape) - len(index))
        bounds = [part.indices(size) for part, size in zip(index, info.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{name}: slices must have step 1, found {index}")
        inner = tuple(slice(start, stop) for start, stop, _ in bounds[1:])
        shape = tuple(max(0, stop - start) for start, stop, _ in bounds)
        out = np.empty(shape, info.numpy_dtype)
        if not out.size:
            return out
        with _regular_file(info.file) as fd:
            if not info.shape:
                _read_into(fd, out, info.start, info.file)
                return out
            row = info.nbytes // info.shape[0]
            first, rows = bounds[0][0], shape[0]
            if shape[1:] == info.shape[1:]:
                _read_into(fd, out, info.start + first * row, info.file)
                return out
            count = max(1, min(rows, BOUNCE_BYTES // row))
            bounce = np.empty((count, *info.shape[1:]), info.numpy_dtype)
            for done in range(0, rows, count):
                part = bounce[: min(count, rows - done)]
                _read_into(fd, part, info.start + (first + done) * row, info.file)
                out[done : done + len(part)] = part[:, *inner]
        return out


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """The checkpoint of a Hugging Face directory: model.safetensors, or the shards that its index names.

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
        raise UserError(f"{path}: not valid JSON: {_short(error)}") from None
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path}: 'weight_map' must map tensor names to files, found {_short(mapping)}")
    by_file: dict[str, list[str]] = {}
    for name, file in mapping.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0\ud800-\udfff]", file):
            raise UserError(
                f"{path}: tensor {_short(name)} is said to be in {_short(file)}; "
                "expected the name of a file in the same directory"
            )
        by_file.setdefault(file, []).append(name)
    tensors: dict[str, TensorInfo] = {}
    for file, named in sorted(by_file.items()):
        found = read_header(directory / file)
        if absent := sorted(set(named) - set(found)):
            raise UserError(f"{directory / file}: lacks {listing(absent)} that {INDEX} says it holds")
        if surplus := sorted(set(found) - set(named)):
            raise UserError(f"{directory / file}: holds {listing(surplus)} that {INDEX} does not place there")
        tensors.update(found)
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file in the order of their bytes. UserError unless header and file agree exactly."""
    with _regular_file(path) as fd:
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
        raise UserError(f"{path}: the header is not valid JSON: {_short(error)}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header must be a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map names to texts, found {_short(metadata)}")
    data = 8 + length
    infos = [_tensor(path, name, entry, data) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    end = data
    for info in infos:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise UserError(f"{path}: tensor {_short(info.name)} starts at byte {info.start - data} and {what}")
        end += info.nbytes
    if end != size:
        more = f"{size - end} more than" if size > end else f"{end - size} less than"
        raise UserError(f"{path}: {size} bytes, {more} its header describes; it was cut off or damaged")
    return {info.name: info for info in infos}


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    where = f"{path}: tensor {_short(name)}"
    if not is_text(name):
        raise UserError(f"{where}: its name is no text: half a character")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected dtype, shape and data_offsets, found {_short(entry)}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: dtype {_short(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"{where}: shape {_short(shape)}, expected at most {MAX_DIMENSIONS} whole numbers >= 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where}: data_offsets {_short(offsets)}, expected [start, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise UserError(f"{where}: {offsets[1] - offsets[0]} bytes, but {dtype} {_short(shape)} takes {_short(nbytes)}")
    return TensorInfo(name, path, dtype, tuple(shape), data + offsets[0], nbytes)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {_short(key)} stands twice")
            seen.add(key)
    return result


def _short(value: Any) -> str:
    """`value` on one line of at most 80 characters."""
    if isinstance(value, BaseException):
        text = " ".join(str(value).split()) or type(value).__name__
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"about 2**{value.bit_length()}"
    else:
        text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listing(names: Sequence[str]) -> str:
    """Up to three names and a count, for one-line errors: `2 tensors (a, b)`."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(_short(n)[1:-1] for n in names[:3])}{more})"


@contextlib.contextmanager
def _regular_file(path: Path) -> Iterator[int]:
    """A descriptor for reading; symbolic links are followed, anything that is not a regular file is refused."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot open: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"{path}: not a regular file")
        yield fd
    finally:
        os.close(fd)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_into(fd: int, out: np.ndarray, offset: int, path: Path) -> None:
    view = _bytes_of(out)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done : done + 2**30]], offset + done)
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from None
        if count == 0:
            raise UserError(f"{path}: ended at byte {offset + done}; it was cut off while being read")
        done += count


class Reader:
    """Reads parts of tensors from any thread; files stay open until `close`."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[int, contextlib.ExitStack]] = {}
        self._lock = threading.Lock()

    def _fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                stack = contextlib.ExitStack()
                self._files[path] = (stack.enter_context(_regular_file(path)), stack)
            return self._files[path][0]

    def read(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fills `out`, of the tensor's dtype, with its entries from flat index `start` on."""
        _read_into(self._fd(info.file), out, info.start + start * info.numpy_dtype.itemsize, info.file)

    def advise(self, info: TensorInfo) -> None:
        """Has the system read a tensor's first part ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd(info.file), info.start, min(info.nbytes, BOUNCE_BYTES), os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1][1].close()


class Writer:
    """Writes tensors of a known plan as Hugging Face does, one at a time, holding none of them.

    plan: (name, dtype, shape) in the order of the `write` calls. A file is closed when the next tensor would take
    it over `shard_bytes`; several files get an index. On a clean exit the files are complete and on disk; after
    an error they are removed. Use it inside `replacing`, so that a reader never sees a part of them.
    """

    def __init__(
        self, directory: str | Path, plan: Plan, shard_bytes: float = 5e9, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.directory = Path(directory)
        self._plan = [(name, np.dtype(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in plan]
        if len({name for name, _, _ in self._plan}) != len(self._plan):
            raise ValueError("the plan names a tensor twice")
        self._metadata = dict(metadata if metadata is not None else {"format": "pt"})
        self._shard_of = _split(self._plan, shard_bytes)
        self._shards = (self._shard_of[-1] if self._shard_of else 0) + 1
        self._next, self._open, self._fd = 0, -1, -1
        self._offsets: dict[str, int] = {}
        self._created: list[Path] = []

    def __enter__(self) -> "Writer":
        return self

    def write(self, name: str, array: Any) -> None:
        """The next tensor of the plan; ValueError when it is not the one planned."""
        planned = self._plan[self._next] if self._next < len(self._plan) else None
        array = np.asarray(array, order="C")
        if (name, array.dtype, array.shape) != planned:
            raise ValueError(f"write of {name} {array.dtype} {array.shape}, the plan has {planned}")
        self._open_shard(self._shard_of[self._next])
        _write_at(self._fd, _bytes_of(array), self._offsets[name])
        self._next += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._next != len(self._plan):
                    raise ValueError(f"{len(self._plan) - self._next} planned tensors were not written")
                self._open_shard(self._shards - 1)
                self._close_shard()
                if self._shards > 1:
                    _write_index(self.directory, self._plan, self._shard_of)
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _open_shard(self, shard: int) -> None:
        if shard == self._open:
            return
        self._close_shard()
        tensors = [row for row, of in zip(self._plan, self._shard_of, strict=True) if of == shard]
        header, self._offsets, _ = _header(tensors, self._metadata)
        path = self.directory / _file_name(shard, self._shards)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._created.append(path)
        self._open = shard
        _write_at(self._fd, memoryview(header), 0)

    def _close_shard(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for path in self._created:
            path.unlink(missing_ok=True)


class SharedWriter:
    """The files of a plan with all their tensors at once, for writing any part at any time from any thread.

    The files have their full size from the start, so that a disk too small is known before anything is computed. Made
    again in a directory where they are, it goes on with them. `finish` puts them on disk.
    """

    def __init__(
        self, directory: str | Path, plan: Plan, shard_bytes: float = 5e9, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.directory = Path(directory)
        self._plan = [(name, np.dtype(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in plan]
        self._shard_of = _split(self._plan, shard_bytes)
        self.files: list[Path] = []
        self._at: dict[str, tuple[int, int, int]] = {}
        self._fds: list[int] = []
        try:
            for shard in range((self._shard_of[-1] if self._shard_of else 0) + 1):
                self._open(shard, dict(metadata if metadata is not None else {"format": "pt"}))
        except BaseException:
            self.close()
            raise

    def _open(self, shard: int, metadata: dict[str, str]) -> None:
        tensors = [row for row, of in zip(self._plan, self._shard_of, strict=True) if of == shard]
        header, offsets, size = _header(tensors, metadata)
        path = self.directory / _file_name(shard, (self._shard_of[-1] if self._shard_of else 0) + 1)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        self.files.append(path)
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
        _write_at(fd, memoryview(header), 0)
        sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in tensors}
        self._at |= {name: (fd, offset, sizes[name]) for name, offset in offsets.items()}

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """The bytes of `data` from byte `start` of a tensor on."""
        fd, offset, size = self._at[name]
        if start + data.nbytes > size:
            raise ValueError(f"{name}: bytes {start} to {start + data.nbytes}, the tensor has {size}")
        _write_at(fd, _bytes_of(data), offset + start)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` with what was written from byte `start` of a tensor on."""
        fd, offset, _ = self._at[name]
        _read_into(fd, out, offset + start, self.directory)

    def flush(self, name: str) -> None:
        """Puts the file that holds a tensor on disk as far as it is written."""
        os.fdatasync(self._at[name][0])

    def finish(self) -> None:
        """Everything is written: put it on disk and write the index of several files."""
        for fd in self._fds:
            os.fsync(fd)
        self.close()
        if len(self.files) > 1:
            _write_index(self.directory, self._plan, self._shard_of)

    def close(self) -> None:
        """Lets go of the files as they are."""
        while self._fds:
            os.close(self._fds.pop())


def _header(tensors: Plan, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file that holds `tensors`, where in the file each begins, and the file's size."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position, starts = 0, {}
    # Widest first, as the safetensors library does: every tensor stays aligned to its own item size.
    for name, dtype, shape in sorted(tensors, key=lambda row: -row[1].itemsize):
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: first + start for n, start in starts.items()}, first + position


def _file_name(shard: int, shards: int) -> str:
    return SINGLE if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def _write_index(directory: Path, plan: Plan, shard_of: Sequence[int]) -> None:
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in plan)
    files = {row[0]: _file_name(shard, shard_of[-1] + 1) for row, shard in zip(plan, shard_of, strict=True)}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    write_atomic(directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(plan: Plan, shard_bytes: float) -> list[int]:
    shard, used, shards = 0, 0, []
    for _, dtype, shape in plan:
        nbytes = math.prod(shape) * dtype.itemsize
        if used and used + nbytes > shard_bytes:
            shard, used = shard + 1, 0
        used += nbytes
        shards.append(shard)
    return shards


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + 2**30], offset + done)
