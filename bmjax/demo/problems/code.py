"""What does a small Python program print? The reasoning follows the variables, one assignment or step a line."""

import ast
import random
from collections.abc import Sequence
from typing import Any

from bmjax.demo.problems.common import OPERATIONS, SIGNS, Calculator, Problem, Solution

QUESTION = "What does this print?\n"
LARGEST_RESULT = {1: 20, 2: 30, 3: 50}
MAX_LOOPS = 20

_VARIABLES = "abcnxyz"
_WORDS = ("cat", "dog", "book", "tree", "apple", "house", "up", "planet")


def generate(level: int, rng: random.Random) -> Problem | None:
    """Return a program of this level with what it prints, or None when the draw left the number range."""
    draw = _Draw(rng, LARGEST_RESULT[level])
    program, printed = {1: _straight, 2: _branch_or_item, 3: _loop}[level](draw)
    return None if draw.left_range else Problem("code", QUESTION + program, str(printed), level)


class _Draw:
    """Random pieces of a program; remembers whether any value left 0..largest."""

    def __init__(self, rng: random.Random, largest: int) -> None:
        self.rng, self.largest, self.left_range = rng, largest, False

    def number(self, low: int = 1, high: int = 9) -> int:
        return self.rng.randint(low, high)

    def step(self, value: int, signs: str = "++-*") -> tuple[str, int, int]:
        """Return a sign, a number and the value after them; both factors of a product are at most 9."""
        sign = self.rng.choice(signs)
        number = self.number(2 if sign == "*" else 1)
        return sign, number, self.result(value, sign, number)

    def result(self, value: int, sign: str, number: int) -> int:
        result = OPERATIONS[sign](value, number)
        if not 0 <= result <= self.largest or (sign == "*" and max(value, number) > 9):
            self.left_range = True
        return result


def _straight(draw: _Draw) -> tuple[str, int]:
    """Return a program of two steps on one or two variables."""
    form = draw.rng.choice(("new variable", "update", "two variables"))
    name, other = [*draw.rng.sample(_VARIABLES, 1 if form == "update" else 2), ""][:2]
    start = draw.number()
    if form == "two variables":
        second = draw.number()
        sign, n, changed = draw.step(second)
        last = draw.rng.choice("+-*")
        program = f"{name} = {start}\n{other} = {second} {sign} {n}\nprint({name} {last} {other})"
        return program, draw.result(start, last, changed)
    sign, n, middle = draw.step(start)
    last, m, end = draw.step(middle)
    if form == "update":
        return f"{name} = {start}\n{name} {sign}= {n}\n{name} {last}= {m}\nprint({name})", end
    return f"{name} = {start}\n{other} = {name} {sign} {n}\nprint({other} {last} {m})", end


def _branch_or_item(draw: _Draw) -> tuple[str, int]:
    """Return a program with if and else, or with an item or the length of a list or word."""
    form = draw.rng.choice(("branch", "item", "length"))
    if form == "branch":
        (name,) = draw.rng.sample(_VARIABLES, 1)
        start, limit = draw.number(), draw.number(2)
        sign, n, value = draw.step(start, "+-*")
        comparison = draw.rng.choice("><")
        yes_sign, yes_n, yes_value = draw.step(value, "+-")
        no_sign, no_n, no_value = draw.step(value, "+-")
        program = (
            f"{name} = {start} {sign} {n}\nif {name} {comparison} {limit}:\n  {name} {yes_sign}= {yes_n}\n"
            f"else:\n  {name} {no_sign}= {no_n}\nprint({name})"
        )
        return program, yes_value if OPERATIONS[comparison](value, limit) else no_value
    name, other = draw.rng.sample(_VARIABLES, 2)
    if form == "item":
        items, index = [draw.number() for _ in range(3)], draw.rng.randrange(3)
        literal, operand, value = str(items), f"{name}[{index}]", items[index]
    elif draw.rng.random() < 0.5:
        word = draw.rng.choice(_WORDS)
        literal, operand, value = f"'{word}'", f"len({name})", len(word)
    else:
        items = [draw.number() for _ in range(draw.number(2, 4))]
        literal, operand, value = str(items), f"len({name})", len(items)
    sign, n, middle = draw.step(value)
    last, m, end = draw.step(middle, "+-")
    return f"{name} = {literal}\n{other} = {operand} {sign} {n}\nprint({other} {last} {m})", end


def _loop(draw: _Draw) -> tuple[str, int]:
    """Return a program with a loop that changes one variable, perhaps with a last step or an if after it."""
    form = draw.rng.choice(("same number", "index", "list", "if after it"))
    (name,) = draw.rng.sample(_VARIABLES, 1)
    value = start = draw.number()
    # What is looped over, the numbers that the rounds take, and how the program calls them.
    if form == "same number":
        rounds, sign = draw.number(2, 4), draw.rng.choice("+++-*")
        numbers = [2 if sign == "*" else draw.number()] * rounds
        source, operand = f"range({rounds})", str(numbers[0])
    elif form == "index":
        rounds, sign = draw.number(2, 3), draw.rng.choice("+-")
        source, numbers, operand = f"range({rounds})", list(range(rounds)), "i"
        last, m = draw.rng.choice("+-"), draw.number()
    elif form == "list":
        numbers = [draw.number() for _ in range(draw.number(2, 3))]
        source, sign, operand = str(numbers), draw.rng.choice("++-"), "i"
    else:
        numbers, limit = [draw.number()] * 2, draw.number(5, 25)
        source, sign, operand = "range(2)", "+", str(numbers[0])
    for number in numbers:
        value = draw.result(value, sign, number)
    program = f"{name} = {start}\nfor i in {source}:\n  {name} {sign}= {operand}\n"
    if form == "index":
        return f"{program}print({name} {last} {m})", draw.result(value, last, m)
    if form == "if after it":
        last, m, changed = draw.step(value, "+-")
        program += f"if {name} > {limit}:\n  {name} {last}= {m}\n"
        value = changed if value > limit else value
    return f"{program}print({name})", value


def solve(prompt: str, calculator: Calculator) -> Solution:
    """Work out step by step, without running it, what the program prints; ValueError for another prompt."""
    if not prompt.startswith(QUESTION):
        raise ValueError("not a code prompt")
    try:
        tree = ast.parse(prompt.removeprefix(QUESTION))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not a Python program") from None
    tracer = _Tracer(calculator)
    tracer.run(tree.body)
    if tracer.printed is None:
        raise ValueError("the program prints nothing")
    return Solution("\n".join(tracer.lines), tracer.printed)


class _Tracer:
    """Walks the syntax tree of a small program; anything outside the subset above is a ValueError."""

    def __init__(self, calculator: Calculator) -> None:
        self.calculator = calculator
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self.printed: str | None = None

    def run(self, statements: Sequence[ast.stmt]) -> None:
        for node in statements:
            if self.printed is not None:
                raise ValueError("print must come last")
            self._statement(node)
            if len(self.lines) > 100:
                raise ValueError("the program runs too long")

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                self.values[name] = text
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.List() as literal):
                self.values[name] = _numbers(literal)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assign(name, value)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                self._assign(name, ast.BinOp(target, op, value))
            case ast.For(target=ast.Name(id=name), iter=source, body=body, orelse=[]):
                used = any(isinstance(n, ast.Name) and n.id == name for stmt in body for n in ast.walk(stmt))
                for item in _items(source):
                    self.values[name] = item
                    if used:
                        self.lines.append(f"{name}={item}")
                    self.run(body)
            case ast.If(test=ast.Compare(left=left, ops=[ast.Gt() | ast.Lt() | ast.Eq() as op], comparators=[right])):
                a, sign, b = self._expression(left)[0], SIGNS[type(op)], self._expression(right)[0]
                holds = OPERATIONS[sign](a, b)
                self.lines.append(f"{a}{sign}{b} {holds}")
                self.run(node.body if holds else node.orelse)
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[value], keywords=[])):
                self.printed = str(self._operand(value))
            case _:
                raise ValueError(f"{type(node).__name__} is outside the language of these programs")

    def _assign(self, name: str, node: ast.expr) -> None:
        self.values[name], line = self._expression(node)
        self.lines.append(f"{name}={line}")

    def _expression(self, node: ast.expr) -> tuple[int, str]:
        """Return a value and its text: `7` for a plain one, `3+4=7` for an operation; inner steps get lines."""
        match node:
            case ast.Constant(value=value):
                pass
            case ast.Name(id=name):
                value = self.values.get(name)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                items = self.values.get(name)
                if not isinstance(items, list) or not -len(items) <= index < len(items):
                    raise ValueError(f"{name}[{index}] is not an item of a list of numbers")
                value = items[index]
                self.lines.append(f"{name}[{index}]={value}")
            case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=name)], keywords=[]):
                if not isinstance(self.values.get(name), (list, str)):
                    raise ValueError(f"{name} has no length")
                value = len(self.values[name])
                self.lines.append(f"len({name})={value}")
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as op, right=right):
                return self.calculator.apply(self._operand(left), SIGNS[type(op)], self._operand(right))
            case _:
                raise ValueError(f"{type(node).__name__} is outside the language of these programs")
        if type(value) is not int:
            raise ValueError(f"{ast.unparse(node)} is not a number here")
        return value, str(value)

    def _operand(self, node: ast.expr) -> int:
        """Return an expression's value; an operation gets a line."""
        value, line = self._expression(node)
        if "=" in line:
            self.lines.append(line)
        return value


def _items(node: ast.expr) -> list[int]:
    """Return what a loop goes over."""
    match node:
        case ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=int(count))], keywords=[]):
            items = list(range(min(count, MAX_LOOPS + 1)))
        case ast.List():
            items = _numbers(node)
        case _:
            raise ValueError("a loop goes over range(number) or a list of numbers")
    if len(items) > MAX_LOOPS:
        raise ValueError("the loop is too long")
    return items


def _numbers(node: ast.List) -> list[int]:
    if not all(isinstance(item, ast.Constant) and type(item.value) is int for item in node.elts):
        raise ValueError("only whole numbers are known here")
    return ast.literal_eval(node)
