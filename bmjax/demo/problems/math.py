"""Multi-step arithmetic: expressions with parentheses, and short word problems, one operation a line."""

import ast
import random
import re
from typing import NamedTuple

from bmjax.demo.problems.common import OPERATIONS, SIGNS, Calculator, Problem, Solution


class _Level(NamedTuple):
    expression_steps: tuple[int, ...]
    word_steps: tuple[int, ...]
    signs: str
    largest_result: int
    largest_factor: int


LEVELS = {
    1: _Level((2,), (2,), "++--*", largest_result=20, largest_factor=5),
    2: _Level((2, 3), (3,), "++--**", largest_result=30, largest_factor=9),
    3: _Level((3, 4), (4,), "++--**/", largest_result=50, largest_factor=9),
}

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
THINGS = ("pens", "cups", "eggs", "nuts", "cards", "coins")
_TIMES = {"doubles them": 2, "triples them": 3}
_CLAUSES = {
    "+": ("buys {}", "finds {}", "gets {}"),
    "-": ("loses {}", "sells {}", "gives away {}"),
    "*": tuple(_TIMES),
    "/": ("keeps 1 of {} parts",),
}
_SIGN_OF_CLAUSE = {clause: sign for sign, clauses in _CLAUSES.items() for clause in clauses}

_EXPRESSION = re.compile(r"Compute ([0-9+\-*/() ]{1,200})\.")
_WORD = re.compile(r"([A-Z][a-z]+) has (\d{1,6}) ([a-z]+), (.+)\. How many now\?")


def generate(level: int, rng: random.Random) -> Problem | None:
    """Return a problem of this level, or None when the draw ran out of its number range."""
    rules = LEVELS[level]
    if rng.random() < 0.6:
        tree = _grow(rng.choice(rules.expression_steps), rules, rng)
        return None if tree is None else Problem("math", f"Compute {tree[0]}.", str(tree[1]), level)
    steps, value = rng.choice(rules.word_steps), rng.randint(2, 9)
    text = f"{rng.choice(NAMES)} has {value} {rng.choice(THINGS)}"
    for _ in range(steps):
        sign = rng.choice(rules.signs)
        if sign == "*":
            clause = rng.choice(_CLAUSES["*"])
            number = _TIMES[clause]
        elif sign == "/":
            if not (divisors := _divisors(value)):
                return None
            number, clause = rng.choice(divisors), _CLAUSES["/"][0]
        else:
            number, clause = rng.randint(1, 9), rng.choice(_CLAUSES[sign])
        text += f", {clause.format(number)}"
        value = OPERATIONS[sign](value, number)
        if not 0 <= value <= rules.largest_result:
            return None
    return Problem("math", f"{text}. How many now?", str(value), level)


def _divisors(value: int) -> list[int]:
    return [d for d in range(2, 10) if value % d == 0 and value > 0]


def _grow(steps: int, rules: _Level, rng: random.Random) -> tuple[str, int, int] | None:
    """Return the text, value and precedence of a random expression with this many operations."""
    if steps == 0:
        return _leaf(rng.randint(1, 9))
    both = steps >= 3 and rng.random() < 0.4
    left = _grow(steps - 2 if both else steps - 1, rules, rng)
    right = _grow(1 if both else 0, rules, rng)
    if left is None or right is None:
        return None
    sign = rng.choice(rules.signs)
    if sign in "+*" and rng.random() < 0.4:
        left, right = right, left
    if sign == "*" and right[2] == 3:
        right = _leaf(rng.randint(2, 9))
    if sign == "/":
        if not (divisors := _divisors(left[1])):
            return None
        right = _leaf(rng.choice(divisors))
    # Of a product, one factor is a single digit.
    low, high = sorted((left[1], right[1]))
    value = OPERATIONS[sign](left[1], right[1])
    if not 0 <= value <= rules.largest_result or (sign == "*" and (high > rules.largest_factor or low > 9)):
        return None
    rank = 1 if sign in "+-" else 2
    left_text = f"({left[0]})" if left[2] < rank else left[0]
    right_text = f"({right[0]})" if right[2] <= rank else right[0]
    return f"{left_text}{sign}{right_text}", value, rank


def _leaf(number: int) -> tuple[str, int, int]:
    return str(number), number, 3


def solve(prompt: str, calculator: Calculator) -> Solution:
    """Return the worked answer to an arithmetic prompt; ValueError for a prompt of another form."""
    lines: list[str] = []
    if match := _EXPRESSION.fullmatch(prompt):
        try:
            tree = ast.parse(match[1], mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError("not an arithmetic expression") from None
        value = _evaluate(tree.body, calculator, lines)
    elif match := _WORD.fullmatch(prompt):
        value = int(match[2])
        for clause in match[4].split(", "):
            sign = _SIGN_OF_CLAUSE.get(re.sub(r"\d+(?! of)", "{}", clause))
            if sign is None:
                raise ValueError(f"unknown clause {clause[:40]!r}")
            number = _TIMES.get(clause) or int(re.findall(r"\d+", clause)[-1])
            value, line = calculator.apply(value, sign, number)
            lines.append(line)
    else:
        raise ValueError("not a math prompt")
    if not lines:
        raise ValueError("nothing to compute")
    return Solution("\n".join(lines), str(value))


def _evaluate(node: ast.expr, calculator: Calculator, lines: list[str]) -> int:
    match node:
        case ast.Constant(value=int(value)) if type(value) is int:
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SIGNS:
            operands = [_evaluate(operand, calculator, lines) for operand in (left, right)]
            value, line = calculator.apply(operands[0], SIGNS[type(op)], operands[1])
            lines.append(line)
            return value
        case _:
            raise ValueError("not whole-number arithmetic")
