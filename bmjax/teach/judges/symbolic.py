"""Asks math-verify (sympy) whether two pieces of mathematics are equal, in a worker process that can be killed.

sympy can run for ever or eat all memory on a hostile expression, and its own time-outs need the main thread. So one
worker process (symbolic_worker.py) answers, one JSON line a question. Past the time limit it is killed, and the next
question gets a new one.
"""

import atexit
import contextlib
import json
import subprocess
import sys
import threading
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
                self.stop()
                # -P: the script's folder must not come first on the path, its names would hide the standard library's.
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                ready = self._exchange(self.process, b"", START_SECONDS)
                if not ready.get("ready"):
                    self.stop()
                    raise JudgeError(str(ready.get("error", "the worker did not start")))
            return self._exchange(self.process, json.dumps(question).encode() + b"\n", seconds)

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, object]:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)  # which ends the wait for a line
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            self.stop()
            raise JudgeError(f"math-verify ended, or took more than {seconds:g} s") from None
        finally:
            timer.cancel()

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            # Closing the pipes may write what no one reads.
            with contextlib.suppress(OSError):
                process.communicate()


_WORKER = _Worker()
atexit.register(_WORKER.stop)


def equal(reference: str, answer: str, seconds: float = 10.0) -> bool:
    """Return whether math-verify finds `answer` equal to `reference`. Raises JudgeError when it cannot tell."""
    result = _WORKER.ask({"reference": reference, "answer": answer}, seconds)
    if "equal" not in result:
        raise JudgeError(str(result.get("error", "no verdict")))
    return bool(result["equal"])
