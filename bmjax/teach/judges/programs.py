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

    Arguments:
        tests: each is {"input": stdin, "output": expected stdout}, compared line by line as text or exact numbers, or
            Python code with asserts that runs after the program.

    Raises:
        JudgeError: for a test of another shape, and when no process can be started.
    """
    asserts = [test for test in tests if isinstance(test, str)]
    streams = [test for test in tests if isinstance(test, dict) and {"input", "output"} <= test.keys()]
    if len(asserts) + len(streams) != len(tests) or not tests:
        raise JudgeError("a test is {input, output} or Python code with asserts")
    if asserts and _run("\n".join([program, *asserts]), "", seconds) is None:
        return False
    for test in streams:
        printed = _run(program, str(test["input"]), seconds)
        if printed is None or not same_output(printed, str(test["output"])):
            return False
    return True


def same_output(printed: str, expected: str) -> bool:
    """Compare line by line: equal once stripped, or the same numbers exactly (1.50 is 1.5)."""
    left = [line.split() for line in printed.strip().splitlines()]
    right = [line.split() for line in expected.strip().splitlines()]
    if [len(line) for line in left] != [len(line) for line in right]:
        return False
    pairs = zip([w for line in left for w in line], [w for line in right for w in line], strict=True)
    return all(a == b or _same_number(a, b) for a, b in pairs)


def _same_number(left: str, right: str) -> bool:
    try:
        return Decimal(left) == Decimal(right)
    except InvalidOperation:
        return False


def _run(program: str, stdin: str, seconds: float) -> str | None:
    """Return what the program prints, or None when it fails, runs too long or prints too much."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return _run_in(Path(folder), program, stdin, seconds)
    except OSError as error:
        raise JudgeError(str(error)) from None


def _run_in(folder: Path, program: str, stdin: str, seconds: float) -> str | None:
    (folder / "main.py").write_text(program, encoding="utf-8", errors="replace")
    (folder / "stdin").write_text(stdin, encoding="utf-8", errors="replace")
    environment = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8",
                   "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    limits = [str(int(seconds) + 1), str(MEMORY_BYTES), str(OUTPUT_BYTES)]
    with (folder / "stdin").open("rb") as source, tempfile.TemporaryFile() as sink:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, *limits],
            stdin=source,
            stdout=sink,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
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
        if code != 0:
            return None
        sink.seek(0)
        return sink.read(OUTPUT_BYTES).decode("utf-8", errors="replace")
