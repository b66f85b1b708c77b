"""Traces on disk: content-addressed records, one JSON line each, in a file that is only ever appended to.

The id of a record is what was asked (domain, normalised prompt, teacher, sampling parameters, sample index), so an
input may be reordered or extended and nothing already paid for is asked again. A crash in mid-write leaves a torn
last line; opening the store cuts it off, so it never glues itself to the next record.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bmjax.config import UserError


@dataclass(frozen=True)
class Record:
    """One sampled answer of a teacher. `reference` is text, a number or {"tests": [...]}; None when unknown.

    `reasoning` is what stood between <think> and </think>, `response` what followed. A reply that was not of that
    form is kept whole in `response`. `teacher` holds the model and its sampling parameters, `usage` its token counts.
    """

    id: str
    domain: str
    prompt: str
    response: str
    reasoning: str = ""
    reference: Any = None
    source: str = ""
    finish_reason: str = "stop"
    teacher: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    verdict: str = "unjudged"
    verdict_by: str = "none"

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """A record from a parsed line; ValueError says which field is missing or of the wrong type."""
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
        for name in ("id", "domain", "prompt", "response"):
            if name not in values:
                raise ValueError(f"field '{name}' is missing")
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name, value in known.items():
            expected = dict if name in ("teacher", "usage") else object if name == "reference" else str
            if not isinstance(value, expected):
                raise ValueError(f"field '{name}': expected {expected.__name__}, found {type(value).__name__}")
        return cls(**known)


def normalise_prompt(prompt: str) -> str:
    """The prompt without the differences that do not change the question: line ends, trailing and outer spaces."""
    return "\n".join(line.rstrip() for line in prompt.strip().splitlines())


def record_id(domain: str, prompt: str, teacher: str, sampling: Mapping[str, Any], sample: int) -> str:
    """sha256 (hex) of the canonical JSON of what was asked; see the module's docstring."""
    asked = {
        "domain": domain,
        "prompt": normalise_prompt(prompt),
        "teacher": teacher,
        "sampling": dict(sampling),
        "sample": sample,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def json_line(values: Mapping[str, Any]) -> bytes:
    """One UTF-8 JSON line. Lone surrogates, which UTF-8 has no form for, are written as escapes."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values).encode() + b"\n"


class JsonLines:
    """An append-only JSON-lines file held by one process.

    Opening it repairs a torn end; every `sync_every` lines are forced to the disk.

    Use as a context manager. UserError when the file cannot be opened or written or another process holds it.
    """

    def __init__(self, path: str | Path, sync_every: int = 256) -> None:
        self.path, self.sync_every, self._unsynced = Path(path), sync_every, 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{self.path}: another process is writing it; wait for it or choose another output"
            ) from None
        _mend_end(self.path)
        return self

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line: it outlives this process at once, and a power cut from the next sync on."""
        if self._file is None:
            raise ValueError("the file is not open")
        try:
            self._file.write(json_line(values))
            self._file.flush()
            self._unsynced += 1
            if self._unsynced >= self.sync_every:
                self.sync()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def sync(self) -> None:
        """Flush to the disk itself."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file = self._file
        if file is None:
            return
        try:
            self.sync()
        except OSError as problem:
            if kind is None:
                raise UserError(f"{self.path}: cannot be written: {problem.strerror}") from None
        finally:
            self._file = None
            with contextlib.suppress(OSError):
                file.close()


def _mend_end(path: Path) -> None:
    """Cut off a last line that a crash left half-written; give a whole one that only lacks its newline that newline."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end == size:
            return
        file.seek(end)
        try:
            whole = isinstance(json.loads(file.read()), dict)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            file.write(b"\n")
        else:
            file.truncate(end)
        file.flush()
        os.fsync(file.fileno())


def lines_with_offsets(path: str | Path) -> Iterator[tuple[int, int, Any]]:
    """(byte offset, line number from 1, parsed value) of each line; blank lines and a torn last one are skipped.

    UserError for a missing file, and for a complete line that is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    if not whole:
                        return
                    raise UserError(f"{path}:{number}: not a JSON line; delete this line or mend it") from None
                yield offset, number, value
            offset += len(line)


def indexed_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """(byte offset, record) of each line of a traces file. UserError naming the line of a bad one."""
    for offset, number, value in lines_with_offsets(path):
        try:
            yield offset, Record.from_json(value)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a record: {error}") from None


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a traces file in the order they were written. UserError naming the line of a bad one."""
    for _, record in indexed_records(path):
        yield record


def ids_present(path: str | Path) -> set[str]:
    """The ids already in a traces file; empty when it does not exist."""
    return {record.id for record in read_records(path)} if Path(path).exists() else set()


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well (fsync, rename) and vanishes when it does not."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
