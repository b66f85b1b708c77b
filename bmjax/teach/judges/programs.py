"""Judges programs by running them against their tests: a process with real stdin, limits and an empty folder.

This keeps honest programs apart and stops runaway ones; it is not a sandbox against a hostile one, which can read
what the user can. Run untrusted models inside a container.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from bmjax.teach.judges.verdict import JudgeError, Verdict

MEMORY_BYTES = 2 * 2**30
OUTPUT_BYTES = 16 * 2**20

_ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Limits are set in the new process, not by preexec_fn, which is unsafe in a process with threads.
_LAUNCH = """
import os, resource, sys
seconds, memory, output = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "main.py"])
"""


def judge(reference: Any, answer: str) -> Verdict:
    """Run the last code block of an answer against the reference's tests. It is a model's output: ask first."""
    tests = reference.get("tests") if isinstance(reference, dict) else None
    if not isinstance(tests, list) or not tests:
        return Verdict("unjudged", "the reference has no tests", "none")
    program = last_code_block(answer)
    if program is None:
        return Verdict("wrong", "no complete code block", "tests")
    try:
        passed = passes(program, tests)
    except JudgeError as error:
        return Verdict("unjudged", str(error), "tests")
    return Verdict("right", "passes all tests", "tests") if passed else Verdict("wrong", "fails a test", "tests")


def last_code_block(text: str) -> str | None:
    """Return the last complete ``` block of a response, or None."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


def passes(program: str, tests: Sequence[Any], seconds: float = 6.0) -> bool:
    """Return whether a program passes every test, within `seconds` each.

    A test is {"input": stdin, "output": expected stdout}, compared line by line as text or exact numbers, or Python
    code with asserts that runs after the program. JudgeError for a test of another shape, and when no process can be
    started.
    """
    asserts = [test for test in tests if isinstance(test, str)]
    streams = [test for test in tests if isinstance(test, dict) and {"input", "output"} <= test.keys()]
    if len(asserts) + len(streams) != len(tests) or not tests:
        raise JudgeError("a test is {input, output} or Python code with asserts")
    if asserts and _run("\n".join([program, *asserts]), "", seconds) is None:
        return False
    printed = ((_run(program, str(test["input"]), seconds), str(test["output"])) for test in streams)
    return all(text is not None and same_output(text, expected) for text, expected in printed)


def same_output(printed: str, expected: str) -> bool:
    """Compare line by line: equal once stripped, or the same numbers exactly (1.50 is 1.5)."""
    left, right = ([line.split() for line in text.strip().splitlines()] for text in (printed, expected))
    if list(map(len, left)) != list(map(len, right)):
        return False
    return all(_same_word(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def _same_word(left: str, right: str) -> bool:
    try:
        return left == right or Decimal(left) == Decimal(right)
    except InvalidOperation:
        return False


def _run(program: str, stdin: str, seconds: float) -> str | None:
    """Return what the program prints, or None when it fails, runs too long or prints too much."""
    limits = [str(int(seconds) + 1), str(MEMORY_BYTES), str(OUTPUT_BYTES)]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as sink:
            for name, text in (("main.py", program), ("stdin", stdin)):
                Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
            with Path(folder, "stdin").open("rb") as source:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _LAUNCH, *limits],
                    stdin=source,
                    stdout=sink,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env=_ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
                    start_new_session=True,
                )
            try:
                code = process.wait(timeout=seconds + 0.5)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                # Also what the program left running: the whole session goes, whatever the outcome.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            sink.seek(0)
            return sink.read(OUTPUT_BYTES).decode("utf-8", errors="replace") if code == 0 else None
    except OSError as error:
        raise JudgeError(str(error)) from None
