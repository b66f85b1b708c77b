"""The verdict that every judge gives.

A judge is a function `judge(reference, answer) -> Verdict`. It never raises for any answer: what it cannot tell is
unjudged, for an error of the judge must not count against a model.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why.

    Attributes:
        verdict: right, wrong or unjudged.
        reason: one line for people.
        judge: what decided: number, values, math-verify, choice, text, exact, tests or none.
        disagreement: the second opinion that said otherwise, empty where there is none.
    """

    verdict: Literal["right", "wrong", "unjudged"]
    reason: str
    judge: str
    disagreement: str = ""


class JudgeError(Exception):
    """A comparison that could not be made (time, memory, an unreadable reference). It says nothing of the answer."""


def compare(right: bool, expected: object, actual: object, judge: str) -> Verdict:
    """Return right or wrong, with both sides in the reason, shortened."""
    reason = f"expected {str(expected)[:80]!r}, found {str(actual)[:80]!r}"
    return Verdict("right", "equals the reference", judge) if right else Verdict("wrong", reason, judge)
