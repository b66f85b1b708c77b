"""Which records a traces file holds, without reading all of it again: an index beside it.

FILE.index has a JSON line for each stretch of the traces file, {"end", "hash", "ids", "state"}: the byte behind it, the
xxh3 of its bytes, the ids as hex, and the traces file's inode, size and time of change when the line was written. A
traces file in the state of the last line is as it was. In any other its bytes are hashed: stretches that changed are
read anew, and so is what follows them. The index may be deleted at any time.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from bmjax.config import UserError
from bmjax.io.atomic import replacing_file
from bmjax.io.jsonl import JsonLines, json_line, read_lines

_STRETCH = 2**24  # bytes of a stretch, at least
_CHUNK = 2**22
_CLOCK_TICK = 0.02  # seconds within which a file system may give two changes the same time
_LINE = re.compile(rb'\{"id": "([0-9a-f]{64})", .*\}\s*')

Stretch = dict[str, Any]


def id_key(identity: str) -> bytes:
    """Return 32 bytes that stand for an id: those of a sha256, the hash of any other text."""
    if len(identity) == 64:
        with contextlib.suppress(ValueError):
            return bytes.fromhex(identity)
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()


def read_ids(traces: Path, keep_index: bool = False) -> set[bytes]:
    """Return the ids of a traces file, see `id_key`; none when it does not exist.

    Arguments:
        traces: the file. A torn last line, which a killed writer left, does not count.
        keep_index: whether to write the index. Only who holds the lock of the traces file may.

    Raises:
        UserError: naming the line that is no record.
    """
    if not traces.exists():
        return set()
    state = _state(traces)
    stretches = _stretches(traces)
    known = len(stretches)
    if not stretches or stretches[-1]["state"] != state:
        stretches = _unchanged(traces, stretches)
    is_new = len(stretches) < known
    start = stretches[-1]["end"] if stretches else 0
    added = list(_scan(traces, start, state))
    if keep_index and (added or is_new or (stretches and stretches[-1]["state"] != state)):
        _write(traces, stretches, added, rewrite=is_new or not added or not stretches)
    text = "".join(stretch["ids"] for stretch in stretches + added)
    content = bytes.fromhex(text)
    return {content[at : at + 32] for at in range(0, len(content), 32)}


def update_index(traces: Path) -> None:
    """Bring the index up to what was appended to the traces file, at the end of a run."""
    time.sleep(_CLOCK_TICK)
    read_ids(traces, keep_index=True)


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_ctime_ns]


def _path(traces: Path) -> Path:
    return traces.with_name(f"{traces.name}.index")


def _stretches(traces: Path) -> list[Stretch]:
    """Return the lines of the index; none when it is missing or not one."""
    stretches: list[Stretch] = []
    try:
        for _, line in read_lines(_path(traces)) if _path(traces).exists() else ():
            end, digest, ids, _ = line["end"], line["hash"], line["ids"], line["state"]
            is_stretch = isinstance(end, int) and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]*", ids)
            if not is_stretch or len(ids) % 64:
                return []
            stretches.append(line)
    except (UserError, KeyError, TypeError, OSError):
        return []
    return stretches


def _unchanged(traces: Path, stretches: list[Stretch]) -> list[Stretch]:
    """Return the stretches, from the start, whose bytes in the traces file are still those of the index."""
    position = 0
    with traces.open("rb") as file:
        for number, stretch in enumerate(stretches):
            digest, left = xxhash.xxh3_128(), stretch["end"] - position
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            if left or digest.hexdigest() != stretch["hash"]:
                return stretches[:number]
            position = stretch["end"]
    return stretches


def _scan(traces: Path, start: int, state: list[int]) -> Iterator[Stretch]:
    """Yield stretches of the lines from a byte on."""
    digest, end, ids = xxhash.xxh3_128(), start, bytearray()
    with traces.open("rb") as file:
        file.seek(start)
        size = start
        for line in file:
            if not line.endswith(b"\n"):
                break  # a torn line, or one that another process is writing
            size += len(line)
            if line.strip():
                ids += _id_of(line, traces, size - len(line))
            digest.update(line)
            if size - end >= _STRETCH:
                yield {"end": size, "hash": digest.hexdigest(), "ids": ids.hex(), "state": state}
                digest, end, ids = xxhash.xxh3_128(), size, bytearray()
    if size > end:
        yield {"end": size, "hash": digest.hexdigest(), "ids": ids.hex(), "state": state}


def _id_of(line: bytes, traces: Path, offset: int) -> bytes:
    """Return the id of a record's line. The lines that `collect` wrote need no decoding."""
    if match := _LINE.fullmatch(line):
        return bytes.fromhex(match[1].decode())
    try:
        identity = json.loads(line)["id"]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        identity = None
    if not isinstance(identity, str):
        with traces.open("rb") as file:
            number = sum(1 for _ in iter(lambda: file.readline() if file.tell() < offset else b"", b"")) + 1
        raise UserError(f"{traces}, line {number}: not a record with an id; delete this line or mend it")
    return id_key(identity)


def _write(traces: Path, kept: list[Stretch], added: list[Stretch], rewrite: bool) -> None:
    """Append the new stretches to the index, or write all of it anew. An index that cannot be written is no loss."""
    with contextlib.suppress(UserError, OSError):
        if rewrite:
            state = _state(traces)
            with replacing_file(_path(traces)) as file:
                file.writelines(json_line(stretch | {"state": state}) for stretch in kept + added)
        else:
            with JsonLines(_path(traces)) as index:
                for stretch in added:
                    index.append(stretch)
