"""Are two pieces of mathematics equal? math-verify (sympy) in a worker process that can be killed.

sympy can run for ever or eat all memory on a hostile expression, and its own time-outs need the main thread. So one
worker process answers, one JSON line a question; past the time limit it is killed and the next question gets a
new one. Run as a script, this file is that worker.
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

START_SECONDS = 90.0
WORKER_BYTES = 4 * 2**30


class JudgeError(Exception):
    """The judge itself failed (time, memory, an unreadable reference): says nothing about the answer."""


class _Worker:
    """One worker process, started at the first question. Safe to call from any thread, one question at a time."""

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
            [sys.executable, "-P", os.path.abspath(__file__)],
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
    """Bytes up to a newline within `seconds`; OSError when the time is over or the other end closed."""
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
    """Whether math-verify finds `answer` equal to the gold `reference`. JudgeError when it cannot tell."""
    result = _WORKER.ask({"reference": reference, "answer": answer}, seconds)
    if "equal" not in result:
        raise JudgeError(str(result.get("error", "no verdict")))
    return bool(result["equal"])


def _judge(reference: str, answer: str) -> dict[str, object]:
    from math_verify import parse, verify

    gold = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
    if not gold:
        return {"error": "the reference is not mathematics"}
    written = [answer]
    if len(answer) < 200 and "$" not in answer and "\\boxed" not in answer:
        written.append(f"${answer}$")
    found = [parse(text, parsing_timeout=None) for text in written]
    return {"equal": any(verify(gold, one, timeout_seconds=None) for one in found if one)}


def _serve() -> None:
    import logging
    import resource

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
            reply = _judge(**json.loads(line))
        except Exception as error:
            # Any failure inside sympy is the judge's, not the answer's.
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
