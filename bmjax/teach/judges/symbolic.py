"""Asks math-verify (sympy) whether two pieces of mathematics are equal, in worker processes that can be killed.

sympy can run for ever or eat all memory on a hostile expression, and its own time-outs need the main thread. So as many
workers as there are cores, which run `serve`, answer one JSON line a question. A worker past the time limit is killed,
and the next question gets a new one. Any number of threads may ask at once; they wait for an idle worker.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from functools import lru_cache

from bmjax.teach.judges.verdict import JudgeError

START_SECONDS = 90.0
SECONDS = 10.0
WORKER_BYTES = 3 * 2**30


class _Worker:
    """One worker process, started at its first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, object]:
        if self.process is None or self.process.poll() is not None:
            self.stop()
            code = f"import sys; sys.path = {[*map(str, sys.path)]!r}; from {__name__} import serve; serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            ready = self._exchange(self.process, b"", START_SECONDS)
            if "error" in ready:
                self.stop()
                raise JudgeError(str(ready["error"]))
        return self._exchange(self.process, json.dumps(question).encode() + b"\n", seconds)

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, object]:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)  # which ends the wait for a line
        timer.daemon = True
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
        if self.process is not None:
            self.process.kill()
            # Closing the pipes may write what no one reads.
            with contextlib.suppress(OSError):
                self.process.communicate()
        self.process = None


class _Pool:
    """As many workers as this process may use cores. The most recently used idle worker answers, so few start."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = [_Worker() for _ in range(cores)]
        self.idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, object]:
        worker = self.idle.get()
        try:
            return worker.ask(question, seconds)
        finally:
            self.idle.put(worker)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


_POOL = _Pool()
atexit.register(_POOL.stop)
# A forked child must not share the parent's pipes; it starts workers of its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_POOL=_Pool()))


@lru_cache(maxsize=4096)
def equal(reference: str, answer: str, seconds: float = SECONDS) -> bool:
    """Return whether math-verify finds `answer` equal to `reference`. Raises JudgeError when it cannot tell."""
    result = _POOL.ask({"reference": reference, "answer": answer}, seconds)
    if "error" in result:
        raise JudgeError(str(result["error"]))
    return bool(result["equal"])


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[object, ...]:
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=None))


def _compare(reference: str, answer: str) -> dict[str, object]:
    """Return {"equal": bool}, or {"error": text} for a reference that is no mathematics."""
    from math_verify import verify

    gold = _parsed(f"${reference}$") or _parsed(reference)
    if not gold:
        return {"error": "the reference is not mathematics"}
    bare = len(answer) < 200 and "$" not in answer and "\\boxed" not in answer
    for text in [answer, f"${answer}$"] if bare else [answer]:
        parsed = _parsed(text)
        if parsed and verify(list(gold), list(parsed), timeout_seconds=None):
            return {"equal": True}
    return {"equal": False}


def serve() -> None:
    """Be a worker process: answer one JSON line for each JSON line of stdin."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    except (ImportError, OSError, ValueError):
        pass  # a system without this limit; the time limit holds
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401

        reply: dict[str, object] = {"ready": True}
    except ImportError as error:
        reply = {"error": f"math-verify cannot be imported: {error}"}
    print(json.dumps(reply), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = _compare(**json.loads(line))
        except Exception as error:
            # Any failure inside sympy is the judge's, not the answer's.
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), file=replies, flush=True)
