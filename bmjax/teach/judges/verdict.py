"""The verdict that every judge gives, and the reading of \\boxed{...} that several need.

A judge is a function `judge(reference, answer) -> Verdict`. `answer` is the text after the reasoning. It never raises
for any answer: what it cannot tell is unjudged, for an error of the judge must not count against a model.
"""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, why, and what decided: number, math-verify, choice, exact, tests or none."""

    verdict: Literal["right", "wrong", "unjudged"]
    reason: str
    judge: str


class JudgeError(Exception):
    """A comparison that could not be made (time, memory, an unreadable reference). It says nothing of the answer."""


def compare(right: bool, expected: object, actual: object, judge: str) -> Verdict:
    """Return right or wrong, with both sides in the reason, shortened."""
    reason = f"expected {str(expected)[:80]!r}, found {str(actual)[:80]!r}"
    return Verdict("right", "equals the reference", judge) if right else Verdict("wrong", reason, judge)


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete \\boxed{...}, or None, in one pass over the text."""
    open_braces: list[int] = []
    start, end = -1, -1
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            opening = open_braces.pop()
            if opening > start and text.endswith("\\boxed", 0, opening):
                start, end = opening, brace.start()
    return text[start + 1 : end] if start >= 0 else None
