"""Asks math-verify (sympy) whether two pieces of mathematics are equal, in a worker process that can be killed.

sympy can run for ever or eat all memory on a hostile expression, and its own time-outs need the main thread. So one
worker process, which runs `serve`, answers one JSON line a question. Past the time limit it is killed, and the next
question gets a new one.
"""

import atexit
import contextlib
import json
import logging
import resource
import subprocess
import sys
import threading

from bmjax.teach.judges.verdict import JudgeError

START_SECONDS = 90.0
WORKER_BYTES = 4 * 2**30


class _Worker:
    """The worker process, started at the first question. Any thread may ask; questions are answered one at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, object]:
        with self.lock:
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


_WORKER = _Worker()
atexit.register(_WORKER.stop)


def equal(reference: str, answer: str, seconds: float = 10.0) -> bool:
    """Return whether math-verify finds `answer` equal to `reference`. Raises JudgeError when it cannot tell."""
    result = _WORKER.ask({"reference": reference, "answer": answer}, seconds)
    if "error" in result:
        raise JudgeError(str(result["error"]))
    return bool(result["equal"])


def _compare(reference: str, answer: str) -> dict[str, object]:
    """Return {"equal": bool}, or {"error": text} for a reference that is no mathematics."""
    from math_verify import parse, verify

    gold = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
    if not gold:
        return {"error": "the reference is not mathematics"}
    bare = len(answer) < 200 and "$" not in answer and "\\boxed" not in answer
    parsed = [parse(text, parsing_timeout=None) for text in ([answer, f"${answer}$"] if bare else [answer])]
    return {"equal": any(verify(gold, expression, timeout_seconds=None) for expression in parsed if expression)}


def serve() -> None:
    """Be the worker process: answer one JSON line for each JSON line of stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
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
