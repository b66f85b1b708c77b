"""LiveCodeBench's own verdict on a program, with its known faults, to compare with numbers that its code has made.

It reads the code between the last two lines that hold a fence, and nothing where there are fewer (so a reply that shows
how to call its program after it is judged by that). It compares what is printed line by line, stripped, then as exact
decimals; and what a function returns by Python's ==. bmjax's own judge, whose verdict is the score, does neither. What
LiveCodeBench patches inside its process (stdin, `open`) is not imitated: the program runs as a program.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from bmjax.teach.judges.sandbox.client import Job, run
from bmjax.teach.judges.verdict import JudgeError

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
# What LiveCodeBench puts before every program.
PRELUDE = "\n".join(
    [f"from {module} import *" for module in (*_MODULES, "builtins", "typing")]
    + [f"import {module}" for module in _MODULES]
    + ["sys.setrecursionlimit(50000)", ""]
)


def program_of(reply: str) -> str:
    """Return the lines between the last two that hold a fence; nothing where fewer hold one."""
    lines = reply.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else ""


def same_output(printed: str, expected: str) -> bool:
    """Compare outputs line by line, stripped; lines that differ are equal as sequences of exact decimals."""
    left, right = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(left) == len(right) and all(a == b or _same_decimals(a, b) for a, b in zip(left, right, strict=True))


def _same_decimals(line: str, other: str) -> bool:
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in other.split()]
    except (InvalidOperation, ValueError):
        return False


def has_its_tests(reference: Any) -> bool:
    """Return whether a reference holds tests of LiveCodeBench's kinds, see `judge_as_livecodebench`."""
    tests = reference.get("tests") if isinstance(reference, Mapping) else None
    if isinstance(tests, Mapping):
        return {"inputs", "outputs", "fn_name"} <= tests.keys()
    return isinstance(tests, list) and all(isinstance(t, Mapping) and {"input", "output"} <= t.keys() for t in tests)


def is_iso_date(value: Any) -> bool:
    """Return whether a row's date is one that LiveCodeBench's `compute_scores` reads."""
    try:
        datetime.fromisoformat(str(value))
    except ValueError:
        return False
    return True


def judge_as_livecodebench(reference: Any, reply: str, seconds: float) -> bool | None:
    """Return whether a reply's program passes all tests as LiveCodeBench judges it; None where nobody can tell.

    Arguments:
        reference: tests as `unpacked` gives them: {input, output} pairs, or inputs, outputs and fn_name.
        reply: the whole text, its thought too.
        seconds: of CPU for each test.
    """
    program = program_of(reply)
    if not program.strip():
        return False
    tests = reference["tests"]
    source = f"{PRELUDE}\n{program}"
    try:
        if isinstance(tests, Mapping):
            return _passes_calls(source, tests, seconds)
        return all(_passes(source, test, seconds) for test in tests)
    except JudgeError:
        return None


def _passes(source: str, test: Mapping[str, str], seconds: float) -> bool:
    outcome = run(Job(source, stdin=test["input"], seconds=seconds))
    if outcome.ended_by == "wall":
        raise JudgeError("this machine is too busy")
    # SystemExit with any code is no error there; an exception is, and leaves its name on stderr.
    is_error = outcome.exit_code is None or outcome.exit_code < 0 or (outcome.exit_code > 0 and bool(outcome.error))
    return outcome.ended_by == "exit" and not is_error and same_output(outcome.stdout, test["output"])


def _passes_calls(source: str, tests: Mapping[str, Any], seconds: float) -> bool:
    inputs: Sequence[str] = tests["inputs"]
    try:
        cases = [[json.loads(line) for line in text.split("\n")] for text in inputs]
        expected = [json.loads(output) for output in tests["outputs"]]
    except ValueError as error:
        raise JudgeError(f"the tests are no JSON: {error}") from None
    outcome = run(Job(source, kind="calls", name=tests["fn_name"], cases=cases, seconds=seconds))
    if outcome.ended_by == "wall":
        raise JudgeError("this machine is too busy")
    lines = outcome.lines
    return len(lines) >= len(expected) and all(
        "value" in line and line["value"] == value for line, value in zip(lines, expected, strict=False)
    )
