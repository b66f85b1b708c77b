"""Safetensors files: strict reading by byte range, and writing in parts. Import, export and merging call it.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. Reading trusts nothing
of the header before it agrees with the file's real size, so a hostile file cannot make it allocate or read
beyond the file. Weights in pickle are refused.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from bmjax.config import UserError, first_line, is_text, read_text
from bmjax.io.atomic import write_atomic
from bmjax.io.open_files import OpenFiles
from bmjax.io.other_layouts import is_trainer_state, layout_problem

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
    "I8": np.dtype(np.int8), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz), "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn), "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
}  # fmt: skip
# Types that files pack and numpy does not: they are copied, byte by byte, and never read as numbers.
PACKED_BITS = {DTYPES["F4"]: 4, DTYPES["F6_E2M3"]: 6, DTYPES["F6_E3M2"]: 6}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_INDEX_CHARACTERS = 2**25  # that of 90,000 tensors has 9 million
MAX_DIMENSIONS = 32
BOUNCE_BYTES = 16 * 2**20
LFS_POINTER = b"version https://git-lfs"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Plan = Sequence[tuple[str, np.dtype, tuple[int, ...]]]


def byte_count(dtype: np.dtype, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor takes in a file, rounded up where its type is packed."""
    return -(-math.prod(shape) * PACKED_BITS.get(dtype, 8 * dtype.itemsize) // 8)


def units(dtype: np.dtype, shape: Sequence[int]) -> tuple[np.dtype, int]:
    """Return in what a tensor can be copied, and how many of it there are: its entries, or bytes of a packed type."""
    return (np.dtype(np.uint8), byte_count(dtype, shape)) if dtype in PACKED_BITS else (dtype, math.prod(shape))


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's bytes: `start` is the absolute offset in `file`, `dtype` the format's name for it.

    Tensors that are computed as they are read (io/tensor_forms.py) are subclasses with a `fill` of their own.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def kept_dtype(self) -> str:
        """The type that a result takes from this tensor where nothing else is asked for."""
        return self.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read for it."""
        return (self.file,)

    def fill(self, reader: "Reader", start: int, out: np.ndarray) -> None:
        """Fill `out`, of the tensor's dtype (uint8 for a packed one), with what follows its flat index `start`."""
        reader.read_bytes(self.file, self.start + start * out.itemsize, out)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory by name; only headers have been read."""

    directory: Path
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()  # on weights beside those, which are not read

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, or the block of it that `index` selects, in its stored dtype (bf16 as ml_dtypes.bfloat16).

        index: slices of step 1 for the leading dimensions; absent dimensions are whole. Only the bytes of the rows
        (first dimension) that it selects are read.
        """
        info = self.tensors[name]
        if info.numpy_dtype in PACKED_BITS:
            raise UserError(f"{info.file}: tensor {_short(name)}: {info.dtype} is packed; it can only be copied")
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
    """Open the checkpoint of a Hugging Face directory: the shards that its index names, else model.safetensors.

    Other weights there are not read; the checkpoint's `notes` name them. An index that speaks of files none of which
    is there was left behind when its shards became model.safetensors, so it is noted, too.

    Raises UserError, one line naming the file, for anything missing, truncated, inconsistent or unsafe.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory")
    # Links that lead nowhere are there, too.
    has_single, has_index = (os.path.lexists(directory / name) for name in (SINGLE, INDEX))
    if has_index:
        mapping = _read_index(directory / INDEX)
        if not has_single or any(os.path.lexists(directory / file) for file in mapping.values()):
            tensors, notes = _read_shards(directory, mapping)
            return Checkpoint(
                directory, tensors, (*notes, *_strays(directory, set(mapping.values()), f"{INDEX} names others"))
            )
    if has_single:
        left_behind = [f"{INDEX} names files that are not there; {SINGLE} is read"] if has_index else []
        notes = [*left_behind, *_strays(directory, {SINGLE}, f"{SINGLE} is, and no index names them")]
        return Checkpoint(directory, read_header(directory / SINGLE), tuple(notes))
    if problem := layout_problem(directory):
        raise UserError(f"{directory}: {problem}")
    names = sorted(path.name for path in directory.iterdir() if not is_trainer_state(path.name))
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?$", name)]
    if shards:
        raise UserError(f"{directory}: has {shards[0]} but neither {SINGLE} nor {INDEX}; add the missing file")
    if pickles:
        raise UserError(f"{directory}: {pickles[0]}: pickle weights are refused; convert to safetensors")
    raise UserError(f"{directory}: no weights, expected {SINGLE} or {INDEX}")


def _strays(directory: Path, read: set[str], reason: str) -> Iterator[str]:
    """Yield a line on the weights of a directory that are not among those that are read."""
    strays = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in read)
    if strays:
        shown = ", ".join(_short(name)[1:-1] for name in strays[:3]) + (", ..." if strays[3:] else "")
        yield f"{shown}: {len(strays)} more file{'s' * (len(strays) > 1)} of weights, not read: {reason}"


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor that an index names."""
    try:
        index = json.loads(read_text(path, MAX_INDEX_CHARACTERS), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {first_line(error)}") from None
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path}: 'weight_map' must map tensor names to files, found {_short(mapping)}")
    for name, file in mapping.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0\ud800-\udfff]", file):
            raise UserError(
                f"{path}: tensor {_short(name)} is said to be in {_short(file)}; "
                "expected the name of a file in the same directory"
            )
    return mapping


def _read_shards(directory: Path, mapping: dict[str, str]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors of an index, each from the file that it names, and notes on what its files hold beside.

    A tensor that the index leaves out is read where one of its files alone holds it: loaders load files as a whole.
    """
    by_file: dict[str, set[str]] = {}
    for name, file in mapping.items():
        by_file.setdefault(file, set()).add(name)
    tensors: dict[str, TensorInfo] = {}
    notes, unplaced = [], dict[str, str]()
    for file, named in sorted(by_file.items()):
        in_file = read_header(directory / file)
        if absent := sorted(named - in_file.keys()):
            raise UserError(f"{directory / file}: lacks {listing(absent)} that {INDEX} says it holds")
        if surplus := sorted(in_file.keys() - mapping.keys()):
            if twice := [name for name in surplus if name in unplaced]:
                raise UserError(
                    f"{directory / file}: holds {listing(twice)}, as {unplaced[twice[0]]} does, and {INDEX} does not "
                    "say which is meant"
                )
            unplaced |= dict.fromkeys(surplus, file)
            named |= {*surplus}
            notes.append(f"{file}: holds {listing(surplus)} that {INDEX} leaves out; read, as loaders do")
        if overlaid := sorted(in_file.keys() - named):
            notes.append(f"{file}: holds {listing(overlaid)} that {INDEX} places in other files; those are read")
        tensors |= {name: info for name, info in in_file.items() if name in named}
    return tensors, notes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file in the order of their bytes. UserError unless header and file agree exactly."""
    with contextlib.closing(Reader()) as reader, reader.files.use(path) as fd:
        size = os.fstat(fd).st_size
        if os.pread(fd, len(LFS_POINTER), 0) == LFS_POINTER:
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` in its directory")
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
    nbytes = byte_count(DTYPES[dtype], shape)
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


def _open_regular(path: Path) -> int:
    """Open a regular file for reading; symbolic links are followed."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot open: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path}: not a regular file")
    return fd


class Reader:
    """Reads parts of tensors from any thread; as many files stay open until `close` as the system allows."""

    def __init__(self) -> None:
        self.files = OpenFiles(_open_regular)

    def read(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill `out`, of the tensor's dtype, with its entries from flat index `start` on."""
        info.fill(self, start, out)

    def read_bytes(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill `out` with the bytes of a file from `offset` on."""
        with self.files.use(path) as fd:
            _read_into(fd, out, offset, path)

    def advise(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Have the system read bytes of a tensor ahead."""
        if hasattr(os, "posix_fadvise"):
            with self.files.use(info.file) as fd:
                os.posix_fadvise(fd, info.start + start, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        self.files.close()


class SharedWriter:
    """The files of a plan with all their tensors, for writing any part at any time from any thread.

    plan: (name, dtype, shape) of every tensor. A file ends where the next tensor would take it over `shard_bytes`;
    several files get an index. The files have their full size from the start, so that a disk too small is known before
    anything is computed. Made again in a directory with these files, it goes on with them. `finish` puts them on disk,
    and so does a `with` block that ends well. Use it inside `replacing`, so that a reader never sees a part of them.
    """

    def __init__(self, directory: str | Path, plan: Plan, shard_bytes: float = 5e9) -> None:
        self.directory = Path(directory)
        self._extents: dict[str, tuple[Path, int, int]] = {}  # file, offset and bytes of every tensor
        self._open, self._closed = OpenFiles(self._reopen), False
        sizes = {name: byte_count(dtype, shape) for name, dtype, shape in plan}
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

    def _reopen(self, path: Path) -> int:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _begin(self, path: Path, tensors: Plan) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest first, as the safetensors library does: every tensor stays aligned to its own item size.
        for name, dtype, shape in sorted(tensors, key=lambda row: -row[1].itemsize):
            start, end = end, end + byte_count(dtype, shape)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)

        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        with self._open.use(path) as fd:
            if os.fstat(fd).st_size != data + end:
                os.ftruncate(fd, 0)
                allocate = getattr(os, "posix_fallocate", lambda fd, _, size: os.ftruncate(fd, size))
                allocate(fd, 0, data + end)
            _write_at(fd, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for name, _, _ in tensors:
            start, end = header[name]["data_offsets"]
            self._extents[name] = path, data + start, end - start

    def __enter__(self) -> "SharedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        self.close()

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write the bytes of `data` from byte `start` of a tensor on."""
        path, offset, size = self._extents[name]
        if start + data.nbytes > size:
            raise ValueError(f"{name}: bytes {start} to {start + data.nbytes}, the tensor has {size}")
        with self._open.use(path) as fd:
            _write_at(fd, _bytes_of(data), offset + start)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with what was written from byte `start` of a tensor on."""
        path, offset, _ = self._extents[name]
        with self._open.use(path) as fd:
            _read_into(fd, out, offset + start, path)

    def flush(self, name: str) -> None:
        """Put the file that holds a tensor on disk as far as it is written."""
        with self._open.use(self._extents[name][0]) as fd:
            os.fdatasync(fd)

    def finish(self) -> None:
        """Put the files on disk and write the index of several files; everything is written."""
        for path in self.files:
            with self._open.use(path) as fd:
                os.fsync(fd)
        self.close()
        if len(self.files) > 1:
            total = sum(size for _, _, size in self._extents.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
            write_atomic(self.directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Close the files as they are, for good."""
        self._closed = True
        self._open.close()


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + 2**30], offset + done)
