"""Append-only files of JSON lines: the only writer and reader of files that grow while a run goes on.

A crash in mid-write leaves a torn last line. Opening the file to append cuts it off, so that it never glues itself to
the next line; reading skips it.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.atomic import lock_file, replacing_file, writable
from bmjax.urls import url_of


def json_line(values: Mapping[str, Any]) -> bytes:
    """Return a mapping as one UTF-8 JSON line. Lone surrogates, which UTF-8 has no form for, become escapes."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values).encode() + b"\n"


def compact_line(values: Mapping[str, Any]) -> bytes:
    """Return a mapping as one UTF-8 JSON line without blanks, several times as fast as `json_line`."""
    try:
        return msgspec.json.encode(values) + b"\n"
    except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError):  # large numbers, halves of surrogate pairs
        return json_line(values)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    with replacing_file(path) as file:
        file.writelines(map(json_line, rows))


class JsonLines:
    """An append-only file of JSON lines, held by one process from its opening on, used as a context manager.

    Opening it repairs a torn end. Every `sync_every` lines are forced to the disk. A URL's file grows here and is sent
    again and again, see `bmjax.io.bucket.sending`. UserError when the file cannot be opened or written, or another
    process holds it.
    """

    def __init__(self, path: str | Path, sync_every: int = 256) -> None:
        url = url_of(path)
        self.path, self.sync_every, self._unsynced = (
            Path(path) if url is None else bucket.open_growing(url),
            sync_every,
            0,
        )
        self._sending = contextlib.ExitStack()
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with writable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        try:
            lock_file(self._file, self.path, "another process is writing it")
            # Who had the lock may have replaced the file meanwhile.
            if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise UserError(f"{path}: another process has replaced it just now; run again")
            _mend_end(self.path)
            if url is not None:
                self._sending.enter_context(bucket.sending([self.path]))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line. It survives the end of this process at once, a power cut after the next sync."""
        with writable(self.path):
            self._file.write(json_line(values))
            self._file.flush()
            self._unsynced += 1
            if self._unsynced >= self.sync_every:
                self.sync()

    def sync(self) -> None:
        """Force the lines written so far to the disk; another thread may call it."""
        with writable(self.path):
            if self._unsynced:
                self._unsynced = 0
                os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with writable(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            if kind is not None and self._made and not self._file.tell():
                self._remove()
        self._sending.close()

    def _remove(self) -> None:
        """Remove a file that was made in vain, and the directories that were made for it."""
        self.path.unlink()
        for folder in self._made[1:]:
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()


def _mend_end(path: Path) -> None:
    """Cut off a half-written last line. A whole one that only lacks its newline gets it."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            last = content[end:]
        if not last:
            return
        try:
            whole = isinstance(json.loads(last), dict)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            file.seek(size)
            file.write(b"\n")
        else:
            file.truncate(end)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path, growing: bool = True) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of every line that is not blank.

    growing: whether a torn last line, which a killed writer left, is skipped. UserError for a missing file, and for a
    line that is not JSON; the lines before it have been yielded.
    """
    copy = bucket.local(path)
    if not copy.is_file():
        raise UserError(f"{path}: no such file")
    with copy.open("rb") as file:
        yield from parse_lines(file, path, growing)


def parse_lines(lines: Iterable[bytes | str], name: str | Path, growing: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of lines, as `read_lines` does; errors say `name`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
        except (ValueError, RecursionError) as error:
            if growing and line[-1:] not in ("\n", b"\n"):
                return
            raise UserError(f"{name}, line {number}: not valid JSON: {error}; delete this line or mend it") from None
        yield number, value


def _parse(line: bytes | str) -> Any:
    """Parse JSON; what the fast parser refuses, such as NaN and halves of surrogate pairs, Python's own decides."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError):
        return json.loads(line)
