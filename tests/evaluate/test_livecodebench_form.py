"""LiveCodeBench's own verdicts, faults included."""

import pytest

from bmjax.evaluate.livecodebench_form import judge_as_livecodebench, program_of, same_output
from bmjax.teach.adapters.livecodebench import unpacked
from bmjax.teach.judges.judge import judge
from tests.evaluate.rows import DOUBLE

STREAM = {"tests": [{"input": "4", "output": "8\n"}]}
CALLS = {"tests": {"inputs": ["4", "5"], "outputs": ["8", "10"], "fn_name": "double"}}


@pytest.mark.parametrize("reply, program", [
    ("```python\na\n```", "a"),
    ("```python\na\n```\nthen\n```\nb\n```", "b"),  # the last two fences, whatever stands there
    ("```python\na\nb", ""),  # a truncated block
    ("no code", ""),
    ("```\na\n```\n```", ""),  # the last pair is the end of one block and the beginning of the next
    ("one line ```a``` and\nx = 1\nanother ```b```", "x = 1"),
])  # fmt: skip
def test_the_program_stands_between_the_last_two_lines_with_a_fence(reply, program):
    assert program_of(reply) == program


@pytest.mark.parametrize("printed, expected, same", [
    ("1 2\n3\n", "1 2\n3", True),
    ("  1 2 \n 3", "1 2\n3", True),
    ("1.50", "1.5", True),
    ("1  2", "1 2", True),  # as decimals
    ("a  b", "a b", False),
    ("0.1000000001", "0.1", False),  # no tolerance
    ("1\n\n2", "1\n2", False),  # blank lines count
    ("Yes", "YES", False),
    ("1e3", "1000", True),
    ("nan", "nan", True),
])  # fmt: skip
def test_outputs_are_compared_line_by_line_then_as_decimals(printed, expected, same):
    assert same_output(printed, expected) == same


@pytest.mark.parametrize("reference, reply, theirs, ours", [
    (STREAM, f"```python\n{DOUBLE}\n```", True, "right"),
    (STREAM, f"```python\n{DOUBLE}\n```\nIt prints\n```\n8\n```", False, "right"),
    (STREAM, f"```python\n{DOUBLE}", False, "right"),
    (STREAM, "```python\nprint(floor(int(input()) * 2))\n```", True, "wrong"),  # their prelude imports math's names
    (STREAM, "```python\nprint(int(input()) * 3)\n```", False, "wrong"),
    (STREAM, "```python\nprint(int(input()) * 2)\nraise SystemExit(3)\n```", True, "wrong"),
    (STREAM, "```python\nprint(int(input()) * 2)\nraise ValueError\n```", False, "wrong"),
    (CALLS, "```python\nclass Solution:\n    def double(self, n):\n        return 2 * n\n```", True, "right"),
    (CALLS, "```python\nclass Solution:\n    def double(self, n):\n        return 2 * n + 1e-9\n```", False, "right"),
    (CALLS, "```python\nclass Solution:\n    def double(self, n):\n        return n\n```", False, "wrong"),
])  # fmt: skip
def test_their_verdict_stands_beside_ours(reference, reply, theirs, ours):
    assert judge_as_livecodebench(reference, reply, 6.0) is theirs
    assert judge(unpacked(reference), reply, "tests", run_programs=True).verdict == ours
