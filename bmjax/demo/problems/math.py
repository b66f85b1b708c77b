"""Multi-step arithmetic: expressions with parentheses, and short word problems, one operation a line."""

import ast
import random
import re
from dataclasses import dataclass

from bmjax.demo.problems.common import Calculator, Problem, Solution


@dataclass(frozen=True)
class _Level:
    expression_steps: tuple[int, ...]
    word_steps: tuple[int, ...]
    operators: str
    largest_number: int
    largest_result: int
    largest_factor: int


LEVELS = {
    1: _Level((2,), (2,), "++--*", largest_number=9, largest_result=20, largest_factor=5),
    2: _Level((2, 3), (3,), "++--**", largest_number=9, largest_result=30, largest_factor=9),
    3: _Level((3, 4), (4,), "++--**/", largest_number=9, largest_result=50, largest_factor=9),
}

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
THINGS = ("pens", "cups", "eggs", "nuts", "cards", "coins")
_CLAUSES = {
    "+": ("buys {}", "finds {}", "gets {}"),
    "-": ("loses {}", "sells {}", "gives away {}"),
    "/": ("keeps 1 of {} parts",),
}
_TIMES = {2: "doubles them", 3: "triples them"}

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_EXPRESSION = re.compile(r"Compute ([0-9+\-*/() ]{1,200})\.")
_WORD = re.compile(r"([A-Z][a-z]+) has (\d{1,6}) ([a-z]+), (.+)\. How many now\?")
_CLAUSE_PATTERNS = [
    (re.compile(re.escape(clause).replace(r"\{\}", r"(\d{1,6})")), operator)
    for operator, clauses in _CLAUSES.items()
    for clause in clauses
]


def generate(level: int, rng: random.Random) -> Problem | None:
    """A problem of this level, or None when the draw ran out of its number range."""
    rules = LEVELS[level]
    if rng.random() < 0.6:
        tree = _grow(rng.choice(rules.expression_steps), rules, rng)
        if tree is None:
            return None
        prompt, value = f"Compute {tree[0]}.", tree[1]
    else:
        story = _story(rng.choice(rules.word_steps), rules, rng)
        if story is None:
            return None
        prompt, value = story
    return Problem("math", prompt, str(value), level)


def _grow(steps: int, rules: _Level, rng: random.Random) -> tuple[str, int, int] | None:
    """(text, value, precedence) of a random expression with this many operations."""
    if steps == 0:
        number = rng.randint(1, rules.largest_number)
        return str(number), number, 3
    both = steps >= 3 and rng.random() < 0.4
    left = _grow(steps - 2 if both else steps - 1, rules, rng)
    right = _grow(1 if both else 0, rules, rng)
    if left is None or right is None:
        return None
    operator = rng.choice(rules.operators)
    if operator in "+*" and rng.random() < 0.4:
        left, right = right, left
    if operator == "*" and right[2] == 3:
        right = _leaf(rng.randint(2, 9))
    if operator == "/":
        divisors = [d for d in range(2, 10) if left[1] % d == 0 and left[1] > 0]
        if not divisors:
            return None
        right = _leaf(rng.choice(divisors))
    value = _allowed(left[1], operator, right[1], rules)
    if value is None:
        return None
    rank = _PRECEDENCE[operator]
    left_text = f"({left[0]})" if left[2] < rank else left[0]
    right_text = f"({right[0]})" if right[2] <= rank else right[0]
    return f"{left_text}{operator}{right_text}", value, rank


def _leaf(number: int) -> tuple[str, int, int]:
    return str(number), number, 3


def _allowed(left: int, operator: str, right: int, rules: _Level) -> int | None:
    if operator == "*" and (max(left, right) > rules.largest_factor or min(left, right) > 9):
        return None
    value = {"+": left + right, "-": left - right, "*": left * right}.get(operator)
    if value is None:
        value = left // right
    return value if 0 <= value <= rules.largest_result else None


def _story(steps: int, rules: _Level, rng: random.Random) -> tuple[str, int] | None:
    value = rng.randint(2, rules.largest_number)
    text = f"{rng.choice(NAMES)} has {value} {rng.choice(THINGS)}"
    for _ in range(steps):
        operator = rng.choice(rules.operators)
        if operator == "*":
            number = rng.choice(tuple(_TIMES))
            text += f", {_TIMES[number]}"
        elif operator == "/":
            divisors = [d for d in range(2, 10) if value % d == 0 and value > 0]
            if not divisors:
                return None
            number = rng.choice(divisors)
            text += f", {_CLAUSES['/'][0].format(number)}"
        else:
            number = rng.randint(1, rules.largest_number)
            text += f", {rng.choice(_CLAUSES[operator]).format(number)}"
        result = {"+": value + number, "-": value - number, "*": value * number}.get(operator)
        value = value // number if result is None else result
        if not 0 <= value <= rules.largest_result:
            return None
    return f"{text}. How many now?", value


def solve(prompt: str, calculator: Calculator) -> Solution:
    """The worked answer to an arithmetic prompt; ValueError for a prompt of another form."""
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
            operator, number = _read_clause(clause)
            value, line = calculator.apply(value, operator, number)
            lines.append(line)
    else:
        raise ValueError("not a math prompt")
    if not lines:
        raise ValueError("nothing to compute")
    return Solution("\n".join(lines), str(value))


def _evaluate(node: ast.expr, calculator: Calculator, lines: list[str]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _evaluate(node.left, calculator, lines)
        right = _evaluate(node.right, calculator, lines)
        value, line = calculator.apply(left, _OPERATORS[type(node.op)], right)
        lines.append(line)
        return value
    raise ValueError("not whole-number arithmetic")


def _read_clause(clause: str) -> tuple[str, int]:
    for number, text in _TIMES.items():
        if clause == text:
            return "*", number
    for pattern, operator in _CLAUSE_PATTERNS:
        if match := pattern.fullmatch(clause):
            return operator, int(match[1])
    raise ValueError(f"unknown clause {clause[:40]!r}")
