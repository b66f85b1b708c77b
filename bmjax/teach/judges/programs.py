"""Judges programs by running them against their tests, in a sandbox, within limits.

A reference is read by `program_tests`, the program is found by `code_block`, and `sandbox` runs it. Tests in Python
count only when a random token was seen that stands after the last of them. What is printed or returned is compared
here, outside: the program never has the expected values.
"""

import functools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bmjax.config import UserError
from bmjax.teach.judges.code_block import find_program, goes_on
from bmjax.teach.judges.outputs import same_output, same_value
from bmjax.teach.judges.program_tests import Stream, Suite, has_tests, read_tests
from bmjax.teach.judges.sandbox.client import MEMORY_MIB, OUTPUT_BYTES, SECONDS, Job, Outcome, run, run_program
from bmjax.teach.judges.verdict import JudgeError, Verdict

__all__ = ["Outcome", "check", "has_tests", "judge", "run_program"]

_CHECKER_SECONDS = 30.0
_ACCEPTED = ("true", "ok", "ac", "accepted", "correct", "right", "yes")
_LIMITS = {
    "cpu": "ran longer than {seconds:g} s of CPU time",
    "idle": "waited for {seconds:g} s without computing",
    "memory": "used more than {memory:g} MiB of memory",
}


def check(reference: Any) -> None:
    """Raise UserError where the tests of a reference have no shape that can be run."""
    read_tests(reference)


def judge(reference: Any, answer: str, seconds: float = SECONDS, memory_mib: float = MEMORY_MIB) -> Verdict:
    """Run the program of an answer against the reference's tests. It is a model's output: ask the user first.

    Arguments:
        reference: tests in a shape of `program_tests`.
        answer: a model's text after the reasoning.
        seconds, memory_mib: limits of CPU time for each test, and of memory, where the reference has none.

    Returns:
        right when it passes all tests; wrong when it fails one, is past a limit of CPU time or memory, or is no
        program; unjudged when the reference has no readable tests or this machine could not tell.
    """
    try:
        suite = read_tests(reference)
    except UserError as error:
        return Verdict("unjudged", str(error), "tests")
    if not suite.count:
        return Verdict("unjudged", "the reference has no tests", "none")
    program = _program(suite, answer)
    if program is None:
        return Verdict("wrong", "the answer has no program", "tests")
    try:
        job = Job(program, seconds=suite.seconds or seconds, memory_mib=suite.memory_mib or memory_mib)
        problem = next(_problems(suite, job), None)
    except JudgeError as error:
        return Verdict("unjudged", str(error), "tests")
    if problem is not None:
        return Verdict("wrong", problem, "tests")
    return Verdict("right", f"passes all tests ({suite.count})", "tests")


def _program(suite: Suite, answer: str) -> str | None:
    """Return the answer's program; where it only goes on with the prompt's function, prompt and answer."""
    program = find_program(answer, suite.names, any(stream.stdin.strip() for stream in suite.streams))
    if suite.prompt and (program is None or goes_on(program)):
        rest = program if program is not None else answer
        head = suite.prompt.rstrip() + "\n"
        # The reply's first indentation, or all of it, may have been left out.
        for text in (suite.prompt + rest, head + rest, head + "    " + rest, head + textwrap.indent(rest, "    ")):
            if rest.strip() and not goes_on(text):
                return text
    return program


def _problems(suite: Suite, job: Job) -> Iterator[str]:
    """Give what fails, lazily: the first failure decides. Raises JudgeError where nothing can be told."""
    if suite.asserts:
        yield from _failed_asserts(suite, job)
    if suite.calls:
        yield from _failed_calls(suite, job)
    for number, stream in enumerate(suite.streams, 1):
        size = max(OUTPUT_BYTES, 4 * len(stream.expected))
        outcome = run(replace(job, stdin=stream.stdin, output_bytes=size))
        problem = _limit_passed(outcome, job) or _failed_stream(suite, stream, outcome)
        if problem:
            yield f"test {number} of {len(suite.streams)}: {problem}"


def _limit_passed(outcome: Outcome, job: Job) -> str | None:
    """Say which limit ended a program. Raises JudgeError for the clock on the wall, which is no fault of it."""
    if outcome.ended_by == "wall":
        raise JudgeError(f"this machine is too busy: {outcome.cpu:.1f} s of CPU in {outcome.wall:.0f} s")
    if outcome.ended_by == "exit":
        return None
    return _LIMITS[outcome.ended_by].format(seconds=job.seconds, memory=job.memory_mib)


def _failed_asserts(suite: Suite, job: Job) -> Iterator[str]:
    tests = [*suite.setup, *suite.asserts]
    outcome = run(replace(job, kind="asserts", tests=tests, preamble=suite.preamble, entry_point=suite.entry_point))
    if missing := next((line["missing"] for line in outcome.lines if "missing" in line), None):
        raise JudgeError(f"the tests need the module '{missing}', which is not installed")
    passed = sum("passed" in line for line in outcome.lines)
    number = max(1, min(passed + 1, len(tests)) - len(suite.setup))
    label = f"test {number} of {len(suite.asserts)}"
    if problem := _limit_passed(outcome, job):
        yield f"{label}: {problem}"
    elif not outcome.finished:
        failed = next((str(line.get("error")) for line in outcome.lines if "failed" in line), None)
        yield f"{label}: {failed or _ending(outcome)}"


def _failed_calls(suite: Suite, job: Job) -> Iterator[str]:
    cases = [call.arguments for call in suite.calls]
    try:
        json.dumps(cases)
    except TypeError as error:
        raise JudgeError(f"the arguments of a test are no JSON: {error}") from None
    outcome = run(replace(job, kind="calls", name=suite.name, cases=cases))
    for number, call in enumerate(suite.calls, 1):
        label = f"test {number} of {len(suite.calls)}"
        line = outcome.lines[number - 1] if number <= len(outcome.lines) else None
        if line is not None and "value" in line:
            if not any(same_value(line["value"], expected, suite.tolerance) for expected in call.expected):
                yield f"{label}: expected {_short(call.expected[-1])}, found {_short(line['value'])}"
        elif line is not None:
            yield f"{label}: {line.get('error')}"
        else:
            yield f"{label}: {_limit_passed(outcome, job) or _ending(outcome)}"


def _failed_stream(suite: Suite, stream: Stream, outcome: Outcome) -> str | None:
    if outcome.exit_code != 0:
        return _ending(outcome)
    if suite.checker is not None:
        return None if _accepts(suite.checker, stream, outcome.stdout) else "the checker refuses its output"
    if same_output(outcome.stdout, stream.expected, suite.tolerance, suite.ignore_case):
        return None
    return f"expected {_short(stream.expected.strip())}, found {_short(outcome.stdout.strip())}"


def _accepts(checker: str, stream: Stream, printed: str) -> bool:
    """Ask a checker about what a program printed. Raises JudgeError where it refuses what is expected too."""
    accepted = _ask(checker, stream, printed)
    if accepted is None and not _ask(checker, stream, stream.expected):
        raise JudgeError("the checker fails on the expected output too")
    return bool(accepted)


@functools.lru_cache(maxsize=64)
def _ask(checker: str, stream: Stream, printed: str) -> bool | None:
    """Run a checker: it prints 1 (or true, ok) or 0, or says it by its exit code alone. None where it breaks down."""
    files = {"input.txt": stream.stdin, "correct_output.txt": stream.expected, "solution_output.txt": printed}
    outcome = run(Job(checker, arguments=list(files), files=files, seconds=_CHECKER_SECONDS))
    words = outcome.stdout.split()
    if outcome.ended_by != "exit" or (outcome.exit_code and not words):
        return None
    if not words:
        return True
    try:
        return outcome.exit_code == 0 and float(words[0]) > 0
    except ValueError:
        return outcome.exit_code == 0 and words[0].lower() in _ACCEPTED


def _ending(outcome: Outcome) -> str:
    if outcome.exit_code and outcome.exit_code < 0:
        return f"killed by signal {-outcome.exit_code}"
    return outcome.error or f"ended with status {outcome.exit_code} before the tests did"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 80 else text[:77] + "...")
