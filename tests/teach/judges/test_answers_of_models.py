"""Tables of answers as models write them, by kind, each with the verdict that a person would be sure of.

answers_of_models.jsonl and programs_of_models.jsonl hold one {reference, answer, right} a line. The kinds are those of
public reports about graders: other currencies, numbers in words, ratios, several boxes, intervals, units, dates, lists
of options in several languages, programs without fences.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bmjax.teach.judges.judge import judge

ANSWERS, PROGRAMS = (
    [json.loads(line) for line in (Path(__file__).parent / f"{name}_of_models.jsonl").read_text("utf-8").splitlines()]
    for name in ("answers", "programs")
)
KINDS = list(dict.fromkeys(row["kind"] for row in ANSWERS))


def misjudged(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, str, bool]]:
    """Return the rows that are not judged as they say."""
    rows = list(rows)
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(
            lambda row: judge(row["reference"], row["answer"], run_programs=True, program_seconds=1).verdict, rows
        )
        pairs = zip(rows, verdicts, strict=True)
        expected = {True: "right", False: "wrong"}
        return [
            (row["reference"], row["answer"], row["right"])
            for row, verdict in pairs
            if verdict != expected[row["right"]]
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_kind(kind: str) -> None:
    rows = [row for row in ANSWERS if row["kind"] == kind]
    assert {row["right"] for row in rows} == {True, False}
    assert misjudged(rows) == []


def test_programs() -> None:
    assert misjudged(PROGRAMS) == []


@pytest.mark.parametrize(
    "text",
    [
        "print(1)\n" * 20_000 + "and so on", "x = (\n" * 20_000, "import a b\n" * 20_000, "def f(x):\n" * 9_000,
        '{"a": ' * 20_000 + "}" * 20_000, '"' + "a" * 500_000 + '"', "`" * 100_000 + "</x>", "x = 1\nfoo bar\n" * 5_000,
    ],
)  # fmt: skip
def test_long_replies_without_fences_end(text: str) -> None:
    assert judge({"tests": ["assert f(1) == 2"]}, text, run_programs=True).verdict == "wrong"
