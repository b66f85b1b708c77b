"""Asks math-verify (sympy) whether two pieces of mathematics are equal, in a worker process that can be killed.

sympy can run for ever or eat all memory on a hostile expression, and its own time-outs need the main thread. So one
worker process (symbolic_worker.py) answers, one JSON line a question. Past the time limit it is killed, and the next
question gets a new one.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from bmjax.teach.judges.verdict import JudgeError

START_SECONDS = 90.0
WORKER = Path(__file__).with_name("symbolic_worker.py")


class _Worker:
    """The worker process, started at the first question. Any thread may ask; questions are answered one at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, object]:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            return self._exchange(json.dumps(question).encode() + b"\n", seconds)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _start(self) -> None:
        self.stop()
        # -P: the script's own folder must not come first on the path, its names would hide the standard library's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        ready = self._exchange(b"", START_SECONDS)
        if not ready.get("ready"):
            self.stop()
            raise JudgeError(str(ready.get("error", "the worker did not start")))

    def _exchange(self, line: bytes, seconds: float) -> dict[str, object]:
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise JudgeError("the worker is not running")
        try:
            if line:
                process.stdin.write(line)
            answer = _read_line(process.stdout.fileno(), seconds)
            return json.loads(answer)
        except (OSError, ValueError) as error:
            self.stop()
            raise JudgeError(str(error) or type(error).__name__) from None


def _read_line(descriptor: int, seconds: float) -> bytes:
    """Read up to a newline within `seconds`. Raises OSError when the time is over or the other end closed."""
    deadline, received = time.monotonic() + seconds, b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise OSError("out of time")
        chunk = os.read(descriptor, 65536)
        if not chunk:
            raise OSError("the worker ended")
        received += chunk
    return received


_WORKER = _Worker()
atexit.register(_WORKER.stop)


def equal(reference: str, answer: str, seconds: float = 10.0) -> bool:
    """Return whether math-verify finds `answer` equal to `reference`. Raises JudgeError when it cannot tell."""
    result = _WORKER.ask({"reference": reference, "answer": answer}, seconds)
    if "equal" not in result:
        raise JudgeError(str(result.get("error", "no verdict")))
    return bool(result["equal"])
