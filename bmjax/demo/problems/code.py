"""What does a small Python program print? The reasoning follows the variables, one assignment or step a line."""

import ast
import random

from bmjax.demo.problems.common import Calculator, Problem, Solution

QUESTION = "What does this print?\n"
LARGEST_RESULT = {1: 20, 2: 30, 3: 50}
MAX_LOOPS = 20

_VARIABLES = "abcnxyz"
_WORDS = ("cat", "dog", "book", "tree", "apple", "house", "up", "planet")
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_COMPARISONS: dict[type[ast.cmpop], str] = {ast.Gt: ">", ast.Lt: "<", ast.Eq: "=="}


def generate(level: int, rng: random.Random) -> Problem | None:
    """A program of this level with what it prints, or None when the draw left the number range."""
    draw = _Draw(rng, LARGEST_RESULT[level])
    forms = {
        1: (_straight, _updates, _two_variables),
        2: (_branch, _list_item, _length),
        3: (_count_loop, _index_loop, _list_loop, _loop_then_branch),
    }
    program, printed = rng.choice(forms[level])(draw)
    return None if draw.left_range else Problem("code", QUESTION + program, str(printed), level)


class _Draw:
    """Random pieces of a program; remembers whether any value left 0..largest."""

    def __init__(self, rng: random.Random, largest: int) -> None:
        self.rng, self.largest, self.left_range = rng, largest, False

    def names(self, count: int) -> list[str]:
        return self.rng.sample(_VARIABLES, count)

    def number(self, low: int = 1, high: int = 9) -> int:
        return self.rng.randint(low, high)

    def step(self, value: int, operators: str = "++-*") -> tuple[str, int, int]:
        """(operator, number, value after it); both factors of a product are at most 9."""
        operator = self.rng.choice(operators)
        number = self.number(2, 9) if operator == "*" else self.number()
        return operator, number, self.result(value, operator, number)

    def result(self, value: int, operator: str, number: int) -> int:
        if operator == "*" and (max(value, number) > 9):
            self.left_range = True
        result = value + number if operator == "+" else value - number if operator == "-" else value * number
        if not 0 <= result <= self.largest:
            self.left_range = True
        return result


def _straight(draw: _Draw) -> tuple[str, int]:
    first, second = draw.names(2)
    start = draw.number()
    op1, n1, middle = draw.step(start)
    op2, n2, end = draw.step(middle)
    return f"{first} = {start}\n{second} = {first} {op1} {n1}\nprint({second} {op2} {n2})", end


def _updates(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start = draw.number()
    op1, n1, middle = draw.step(start)
    op2, n2, end = draw.step(middle)
    return f"{name} = {start}\n{name} {op1}= {n1}\n{name} {op2}= {n2}\nprint({name})", end


def _two_variables(draw: _Draw) -> tuple[str, int]:
    first, second = draw.names(2)
    a, b = draw.number(), draw.number()
    op, n, changed = draw.step(b)
    last = draw.rng.choice("+-*")
    return f"{first} = {a}\n{second} = {b} {op} {n}\nprint({first} {last} {second})", draw.result(a, last, changed)


def _branch(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start, limit = draw.number(), draw.number(2, 9)
    op, n, value = draw.step(start, "+-*")
    comparison = draw.rng.choice("><")
    yes_op, yes_n, yes_value = draw.step(value, "+-")
    no_op, no_n, no_value = draw.step(value, "+-")
    taken = value > limit if comparison == ">" else value < limit
    program = (
        f"{name} = {start} {op} {n}\nif {name} {comparison} {limit}:\n  {name} {yes_op}= {yes_n}\n"
        f"else:\n  {name} {no_op}= {no_n}\nprint({name})"
    )
    return program, yes_value if taken else no_value


def _list_item(draw: _Draw) -> tuple[str, int]:
    name, other = draw.names(2)
    items = [draw.number() for _ in range(3)]
    index = draw.rng.randrange(3)
    op1, n1, middle = draw.step(items[index])
    op2, n2, end = draw.step(middle, "+-")
    return f"{name} = {items}\n{other} = {name}[{index}] {op1} {n1}\nprint({other} {op2} {n2})", end


def _length(draw: _Draw) -> tuple[str, int]:
    name, other = draw.names(2)
    if draw.rng.random() < 0.5:
        word = draw.rng.choice(_WORDS)
        literal, length = f"'{word}'", len(word)
    else:
        items = [draw.number() for _ in range(draw.number(2, 4))]
        literal, length = str(items), len(items)
    op1, n1, middle = draw.step(length)
    op2, n2, end = draw.step(middle, "+-")
    return f"{name} = {literal}\n{other} = len({name}) {op1} {n1}\nprint({other} {op2} {n2})", end


def _count_loop(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start, rounds, op = draw.number(), draw.number(2, 4), draw.rng.choice("+++-*")
    n = 2 if op == "*" else draw.number(1, 9)
    value = start
    for _ in range(rounds):
        value = draw.result(value, op, n)
    return f"{name} = {start}\nfor i in range({rounds}):\n  {name} {op}= {n}\nprint({name})", value


def _index_loop(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start, rounds, op = draw.number(), draw.number(2, 3), draw.rng.choice("+-")
    last_op, last_n = draw.rng.choice("+-"), draw.number()
    value = start
    for i in range(rounds):
        value = draw.result(value, op, i)
    program = f"{name} = {start}\nfor i in range({rounds}):\n  {name} {op}= i\nprint({name} {last_op} {last_n})"
    return program, draw.result(value, last_op, last_n)


def _list_loop(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start, items, op = draw.number(), [draw.number(1, 9) for _ in range(draw.number(2, 3))], draw.rng.choice("++-")
    value = start
    for item in items:
        value = draw.result(value, op, item)
    return f"{name} = {start}\nfor i in {items}:\n  {name} {op}= i\nprint({name})", value


def _loop_then_branch(draw: _Draw) -> tuple[str, int]:
    (name,) = draw.names(1)
    start, n, limit = draw.number(), draw.number(1, 9), draw.number(5, 25)
    value = draw.result(draw.result(start, "+", n), "+", n)
    op, m, changed = draw.step(value, "+-")
    program = (
        f"{name} = {start}\nfor i in range(2):\n  {name} += {n}\n"
        f"if {name} > {limit}:\n  {name} {op}= {m}\nprint({name})"
    )
    return program, changed if value > limit else value


def solve(prompt: str, calculator: Calculator) -> Solution:
    """What the program in the prompt prints, worked out step by step without running it; ValueError otherwise."""
    if not prompt.startswith(QUESTION):
        raise ValueError("not a code prompt")
    try:
        tree = ast.parse(prompt.removeprefix(QUESTION))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not a Python program") from None
    return _Tracer(calculator).run(tree)


class _Tracer:
    """Walks the syntax tree of a small program; anything outside the subset above is a ValueError."""

    def __init__(self, calculator: Calculator) -> None:
        self.calculator = calculator
        self.values: dict[str, int | str | list[int]] = {}
        self.lines: list[str] = []
        self.printed: str | None = None

    def run(self, tree: ast.Module) -> Solution:
        self._block(tree.body)
        if self.printed is None:
            raise ValueError("the program prints nothing")
        return Solution("\n".join(self.lines), self.printed)

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if self.printed is not None:
            raise ValueError("print must come last")
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                self.values[name] = text
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.List(elts=items)):
                self.values[name] = [self._constant(item) for item in items]
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assign(name, *self._expression(value))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                self._assign(name, *self._operation(self._number(name), op, self._expression(value)[0]))
            case ast.For(target=ast.Name(id=name), iter=source, body=body, orelse=[]):
                used = any(isinstance(n, ast.Name) and n.id == name for stmt in body for n in ast.walk(stmt))
                for item in self._items(source):
                    self.values[name] = item
                    if used:
                        self.lines.append(f"{name}={item}")
                    self._block(body)
            case ast.If(test=ast.Compare(left=left, ops=[op], comparators=[right]), body=body, orelse=orelse):
                self._block(body if self._compare(left, op, right) else orelse)
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[value], keywords=[])):
                result, line = self._expression(value)
                if "=" in line:
                    self.lines.append(line)
                self.printed = str(result)
            case _:
                raise ValueError(f"{type(node).__name__} is outside the language of these programs")
        if len(self.lines) > 100:
            raise ValueError("the program runs too long")

    def _assign(self, name: str, value: int, line: str) -> None:
        self.values[name] = value
        self.lines.append(f"{name}={line}")

    def _items(self, node: ast.expr) -> list[int]:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=int(count))], keywords=[]):
                items = list(range(min(count, MAX_LOOPS + 1)))
            case ast.List(elts=elements):
                items = [self._constant(element) for element in elements]
            case _:
                raise ValueError("a loop goes over range(number) or a list of numbers")
        if len(items) > MAX_LOOPS:
            raise ValueError("the loop is too long")
        return items

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool:
        if type(op) not in _COMPARISONS:
            raise ValueError("unknown comparison")
        a, b, sign = self._expression(left)[0], self._expression(right)[0], _COMPARISONS[type(op)]
        holds = a > b if sign == ">" else a < b if sign == "<" else a == b
        self.lines.append(f"{a}{sign}{b} {holds}")
        return holds

    def _expression(self, node: ast.expr) -> tuple[int, str]:
        """(value, how it is written): `7` for a plain value, `3+4=7` for an operation; inner steps get lines."""
        match node:
            case ast.Constant():
                value = self._constant(node)
            case ast.Name(id=name):
                value = self._number(name)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                sequence = self.values.get(name)
                if not isinstance(sequence, list) or not -len(sequence) <= index < len(sequence):
                    raise ValueError(f"{name}[{index}] is not an item of a list of numbers")
                value = sequence[index]
                self.lines.append(f"{name}[{index}]={value}")
            case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=name)], keywords=[]):
                sequence = self.values.get(name)
                if not isinstance(sequence, (list, str)):
                    raise ValueError(f"{name} has no length")
                value = len(sequence)
                self.lines.append(f"len({name})={value}")
            case ast.BinOp(left=left, op=op, right=right):
                first, first_line = self._expression(left)
                if "=" in first_line:
                    self.lines.append(first_line)
                second, second_line = self._expression(right)
                if "=" in second_line:
                    self.lines.append(second_line)
                return self._operation(first, op, second)
            case _:
                raise ValueError(f"{type(node).__name__} is outside the language of these programs")
        return value, str(value)

    def _operation(self, left: int, op: ast.operator, right: int) -> tuple[int, str]:
        if type(op) not in _OPERATORS:
            raise ValueError("unknown operator")
        return self.calculator.apply(left, _OPERATORS[type(op)], right)

    def _number(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int):
            raise ValueError(f"{name} is not a number here")
        return value

    @staticmethod
    def _constant(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError("only whole numbers are known here")
