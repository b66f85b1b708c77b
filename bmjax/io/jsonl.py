"""Append-only files of JSON lines: the only writer and reader of files that grow while a run goes on.

A crash in mid-write leaves a torn last line. Opening the file to append cuts it off, so that it never glues itself to
the next line; reading skips it.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bmjax.config import UserError
from bmjax.io.atomic import lock_file, replacing_file


def json_line(values: Mapping[str, Any]) -> bytes:
    """Return a mapping as one UTF-8 JSON line. Lone surrogates, which UTF-8 has no form for, become escapes."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values).encode() + b"\n"


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a file of JSON lines, whole or not at all, and return the number of lines."""
    count = 0
    with replacing_file(path) as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


class JsonLines:
    """An append-only file of JSON lines, held by one process, used as a context manager.

    Opening it repairs a torn end. Every `sync_every` lines are forced to the disk.

    Raises:
        UserError: when the file cannot be opened or written, or another process holds it.
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
            lock_file(self._file, self.path, "another process is writing it")
        except UserError:
            self._file.close()
            raise
        _mend_end(self.path)
        return self

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line. It survives the end of this process at once, a power cut after the next sync."""
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
        """Force all lines to the disk."""
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
    """Cut off a half-written last line. A whole one that only lacks its newline gets it."""
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


def read_lines(path: str | Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (byte offset, line number from 1, value) of every line; blank lines and a torn last one are skipped.

    Raises:
        UserError: for a missing file, and for a whole line that is not JSON; the lines before it have been yielded.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    if not line.endswith(b"\n"):
                        return
                    raise UserError(f"{path}, line {number}: not valid JSON; delete this line or mend it") from None
                yield offset, number, value
            offset += len(line)
