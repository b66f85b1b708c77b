"""Locks in buckets, where there is no file lock: an object that its holder writes again and again while it lives.

Whoever finds one waits for a sign of life, unless it knows that the holder is dead: the holder also held a file lock on
this machine, and left the lock's token in that file.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bmjax.errors import UserError
from bmjax.io.bucket import mirror, read, remove, write
from bmjax.log import write_line

BEAT = 5.0  # seconds between signs of life
SILENT = 20.0  # seconds without one, after which a lock's holder is taken for dead


@contextlib.contextmanager
def held(url: str, holder: str) -> Iterator[None]:
    """Hold a lock object while the block runs. It is written again every BEAT seconds, so that a dead holder shows.

    The caller holds the file lock of its copy, `mirror(url)`, already.

    Raises:
        UserError: with the words of `holder`, when another process holds it and lives.
    """
    token = secrets.token_hex(16)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "nonce": token, "beat": 0}
    folder = url.rpartition("/")[0]

    def current() -> dict[str, Any] | None:
        data = read(url)
        with contextlib.suppress(ValueError):
            return None if data is None else dict(json.loads(data))
        return {}

    other = current()
    # The process that wrote the file's token held its lock, which the caller has now: it is gone.
    if other and other.get("nonce") != _last_token(mirror(url)):
        write_line(f"{folder}: a lock of {other.get('host')}, process {other.get('pid')}; looking whether it lives ...")
        ended = time.monotonic() + SILENT
        while time.monotonic() < ended:
            time.sleep(1.0)
            if (now := current()) is None:
                break
            if now != other:
                where = f"process {other.get('pid')} of {other.get('host')}"
                raise UserError(f"{folder}: {holder} ({where}); wait for it or choose another output")
    if other is not None:
        write_line(f"{folder}: taking over from process {other.get('pid')} of {other.get('host')}, which is gone")
        remove(url)
    mirror(url).write_text(f"{_boot()} {token}")
    with contextlib.suppress(UserError):  # another process may have been quicker, which the next look shows
        write(url, json.dumps(mine).encode(), new=True)
    if (now := current()) is None or now.get("nonce") != token:
        raise UserError(f"{folder}: {holder}; wait for it or choose another output")
    ended_event = threading.Event()

    def is_mine() -> bool:
        return (now := current()) is None or now.get("nonce") == token

    def beat() -> None:
        while not ended_event.wait(BEAT):
            mine["beat"] = int(str(mine["beat"])) + 1
            with contextlib.suppress(UserError):
                if not is_mine():
                    write_line(
                        f"{folder}: another process took this lock, as nothing was heard of this one for {SILENT:g} s; "
                        "stop one of the two"
                    )
                    return
                write(url, json.dumps(mine).encode())

    thread = threading.Thread(target=beat, name="bmjax-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended_event.set()
        thread.join()
        with contextlib.suppress(UserError):
            if is_mine():
                remove(url)


def _boot() -> str:
    """Return the id of this start of the machine, empty where the system tells none: no other machine has it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _last_token(file: Path) -> str | None:
    """Return the token of the lock that a process of this machine held last; None where it is not known."""
    with contextlib.suppress(OSError, ValueError):
        boot, token = file.read_text().split()
        # A cache on a network's disk may hold the file of another machine, whose file locks need not be seen here.
        return token if boot == _boot() else None
    return None
