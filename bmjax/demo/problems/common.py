"""Shared by the three domains: a problem, its solution, and the arithmetic of every reasoning line.

A step is always written `7+5=12`: decimal whole numbers, no spaces, exact division. A domain
with another convention would pull the branches apart where the merge needs them to agree.
"""

import ast
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass

MAX_VALUE = 10**9
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
    ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
SIGNS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Gt: ">", ast.Lt: "<", ast.Eq: "==",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A question as the student sees it, its reference answer, and how hard it is (1, 2 or 3)."""

    domain: str
    prompt: str
    reference: str
    level: int


@dataclass(frozen=True)
class Solution:
    """A worked answer: the reasoning, one step a line, and the final answer."""

    reasoning: str
    answer: str


@dataclass
class Calculator:
    """Whole-number arithmetic that writes each step down.

    `slip_step` is the index of the one step whose result comes out `slip_by` too high (the demo teacher's
    mistakes); -1 means none. `steps` counts the steps taken so far.
    """

    slip_step: int = -1
    slip_by: int = 0
    steps: int = 0

    def apply(self, left: int, sign: str, right: int) -> tuple[int, str]:
        """Return the result and the line `left sign right=result`; ValueError if it is not a whole number in range."""
        if sign == "/" and (right == 0 or (left % right and self.slip_step < 0)):
            raise ValueError(f"{left} / {right} is not a whole number")
        result = OPERATIONS[sign](left, right)
        if self.steps == self.slip_step:
            result += self.slip_by
        self.steps += 1
        if abs(result) > MAX_VALUE:
            raise ValueError(f"{left} {sign} {right} is out of range")
        return result, f"{left}{sign}{right}={result}"


def split_of(prompt: str) -> str:
    """Return a prompt's split, whatever the seed: its sha256 modulo 10 is 0 for test, 1 for val, else train."""
    digit = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "val"}.get(digit, "train")
