"""Reads mathematical expressions and computes their values: the second opinion beside math-verify, and the quick one.

`parse` turns the one notation of notation.py into a tree, `evaluate` computes it: exactly, as a fraction, as long as
every step is rational, else with 40 digits. Anything outside this small language is Unreadable, never a guess. No
expression costs more than some milliseconds: sizes are limited, and a power too large to compute is Unreadable.
"""

import contextlib
import math
import re
import threading
from collections.abc import Mapping
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

DIGITS = 40
_LARGEST_EXPONENT = 4_096
_LARGEST_BITS = 200_000
_DEEPEST = 60
_LONGEST = 1_500

Number = Any  # a Fraction, or mpmath's mpf or mpc
Tree = tuple[Any, ...]

_LOCK = threading.Lock()  # mpmath's functions change the precision of their context for a while


@cache
def _mpmath() -> Any:
    """Return mpmath's numbers of 40 digits. Imported late: of the extras `teach` alone brings it."""
    import mpmath

    context = mpmath.MPContext()
    context.dps = DIGITS
    return context


class Unreadable(Exception):
    """A text that is no expression of this language, or one without a value."""


class TooLarge(Unreadable):
    """A number that no problem has for an answer, such as 9^{9^{9^9}}."""


_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\d+\.(?!\d)|\.\d+|\\[a-zA-Z]+|«[^»]*»|[A-Za-zͰ-Ͽϑϕℝ]|\S)")
_NAMES = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|binom|infty|inf)(?![A-Za-z])"
)
_WORD = re.compile(
    r"(?<![A-Za-z\\])(?:[A-Za-z]{3,}|(?:in|is|of|to|at|on|by|as|it|an|or|if|so|no|we|he|me|my|up|us|am|be|do|go)(?![A-Za-z]))"
)
# What mpmath calls the functions.
_FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "ln": "ln", "exp": "exp",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "cis": "expj",
}  # fmt: skip
# A3F_{16}; a capital alone with an index is a variable, as is 3a_{12}.
_BASE_OF_LETTERS = re.compile(
    r"«?(\d+[A-Z][0-9A-Z]*|[A-Z]+\d[0-9A-Z]*|(?:[A-F]{2,}|\d*[a-f]+\d[0-9a-f]*|\d+)(?=»? ?_ ?\{?16))»? ?"
    r"_ ?\{? ?(\d\d) ?\}?"
)
_STARTS_FACTOR = re.compile(r"[\w({\\|⌊⌈∞.]")


@lru_cache(maxsize=4096)
def parse(text: str) -> Tree:
    """Parse one expression in the notation of `normal_form`. Raises Unreadable."""
    if len(text) > _LONGEST:
        raise Unreadable("too long")
    if (digits := _BASE_OF_LETTERS.fullmatch(text)) and 10 < int(digits[2]) <= 36:
        with contextlib.suppress(ValueError):
            return ("based", Fraction(int(digits[1], int(digits[2]))), digits[1].upper(), int(digits[2]))
    text = _NAMES.sub(lambda name: {"pi": "π", "inf": "∞", "infty": "∞"}.get(name[1], f"\\{name[1]} "), text)
    if _WORD.search(text):
        raise Unreadable("words")
    tokens = _TOKEN.findall(text)
    if not tokens:
        raise Unreadable("nothing")
    parser = _Parser(tokens)
    tree = parser.sum()
    if parser.position != len(tokens):
        raise Unreadable(f"'{parser.peek()}'")
    return tree


class _Parser:
    """Recursive descent over tokens: sum, product, signed power, atom."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise Unreadable(f"'{token}' instead of '{expected}'")
        self.position += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("too deep")
        tree = self.product()
        while self.peek() in ("+", "-", "±", "∓"):
            tree = (self.take(), tree, self.product())
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        if self.peek() in ("+", "-", "±", "∓"):
            sign = self.take()
            self.depth += 1
            if self.depth > _DEEPEST:
                raise Unreadable("too deep")
            operand = self.product()
            self.depth -= 1
            return operand if sign == "+" else (sign, ("number", Fraction(0)), operand)
        tree = self.power()
        while True:
            token = self.peek()
            if token in ("*", "/"):
                self.take()
                negative = self.peek() == "-" and bool(self.take())
                right = self.power()
                tree = (token, tree, ("-", ("number", Fraction(0)), right) if negative else right)
            elif token == "|" and self.bars:
                return tree
            elif token and _STARTS_FACTOR.match(token) and token not in ("»",):
                tree = self.adjacent(tree, self.power())
            else:
                return tree

    def adjacent(self, left: Tree, right: Tree) -> Tree:
        """Join neighbours: `2 1/2` and 2\\frac{1}{2} are mixed numbers, two other numbers side by side are nothing."""
        if left[0] == "number" and left[1].denominator == 1:
            if right[0] == "fraction" and right[1][0] == right[2][0] == "number":
                return ("+", left, right)
            if right[0] == "number" and right[1].denominator == 1 and self.peek() == "/":
                self.take()
                denominator = self.power()
                if denominator[0] == "number" and denominator[1] > right[1] > 0:
                    return ("+", left, ("/", right, denominator))
        if right[0] in ("number", "decimal"):
            raise Unreadable("two numbers side by side")
        # 1/2x can be read in two ways.
        if left[0] == "/" and right[0] == "name":
            raise Unreadable("an ambiguous denominator")
        return ("*", left, right)

    def power(self) -> Tree:
        tree = self.atom()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                tree = ("^", tree, self.script())
            elif token == "!":
                self.take()
                tree = ("!", tree)
            elif token == "°":
                self.take()
                tree = ("degree", tree)
            elif token == "%":
                self.take()
                tree = ("percent", tree)
            elif token == "_" and tree[0] == "number":
                self.take()
                tree = self.based(tree)
            else:
                return tree

    def script(self) -> Tree:
        """An exponent: braces, or one signed atom."""
        if self.peek() == "-":
            self.take()
            return ("-", ("number", Fraction(0)), self.script())
        tree = self.atom()
        if self.peek() == "^":
            self.take()
            return ("^", tree, self.script())
        return tree

    def based(self, tree: Tree) -> Tree:
        script = self.script()
        script = script[1] if script[0] == "group" else script
        if script[0] != "number" or not 2 <= script[1] <= 36 or script[1].denominator != 1:
            raise Unreadable("no base")
        try:
            return ("based", Fraction(int(str(tree[1]), int(script[1]))), tree[1], int(script[1]))
        except ValueError:
            raise Unreadable("digits outside of the base") from None

    def group(self) -> Tree:
        """An argument of a command: braces, or one digit or letter (\\frac12)."""
        if self.peek() == "{":
            self.take()
            tree = self.sum()
            self.take("}")
            return tree
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1:
            self.tokens[self.position : self.position + 1] = list(token)
        return self.atom()

    def atom(self) -> Tree:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            if len(token) > 400:
                raise Unreadable("too many digits")
            value = Fraction(token.rstrip("."))
            return ("decimal", value, token) if "." in token.rstrip(".") else ("number", value)
        if token in ("(", "{", "["):
            tree = self.sum()
            self.take({"(": ")", "{": "}", "[": "]"}[token])
            return ("group", tree)
        if token in ("⌊", "⌈"):
            tree = self.sum()
            self.take("⌋" if token == "⌊" else "⌉")
            return (token, tree)
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.take("|")
            return ("|", tree)
        if token == "\\frac":
            return ("fraction", self.group(), self.group())
        if token == "\\binom":
            return ("binomial", self.group(), self.group())
        if token == "\\sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return ("root", self.group(), degree)
        if token[0] == "\\":
            return self.function(token[1:])
        if re.fullmatch(r"[A-Za-zͰ-Ͽ]", token):
            name = token
            if self.peek() == "_":
                self.take()
                start = self.position
                self.script()
                name += "_" + "".join(self.tokens[start : self.position]).strip("{}")
            return ("constant", name) if name in ("π", "e", "i") else ("name", name)
        if token == "∞":
            return ("infinity",)
        raise Unreadable(f"'{token}'")

    def function(self, name: str) -> Tree:
        if name not in _FUNCTIONS and name not in ("log", "lg"):
            raise Unreadable(f"\\{name}")
        base: Tree | None = ("number", Fraction(10)) if name == "lg" else None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.group()
        power = None
        if self.peek() == "^":
            self.take()
            power = self.script()
            inner = power[1] if power[0] == "group" else power
            if inner == ("-", ("number", Fraction(0)), ("number", Fraction(1))):
                if f"arc{name}" not in _FUNCTIONS:
                    raise Unreadable("an inverse function")
                name, power = f"arc{name}", None
        # sin 2x takes what follows up to the next function, sin(x) y only the brackets.
        bracketed = self.peek() in ("(", "{", "[")
        argument = self.power()
        while not bracketed and re.match(r"[^\W_]|\\(?:frac|sqrt)", self.peek()):
            argument = self.adjacent(argument, self.power())
        tree: Tree = ("call", name if base is None else "log", argument, base)
        return tree if power is None else ("^", tree, power)


def names(tree: Tree) -> frozenset[str]:
    """Return the variables of an expression."""
    if tree[0] == "name":
        return frozenset([tree[1]])
    return frozenset().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def has(tree: Tree, *kinds: str) -> bool:
    """Return whether a node of one of the kinds is in a tree."""
    return tree[0] in kinds or any(has(part, *kinds) for part in tree[1:] if isinstance(part, tuple))


def evaluate(tree: Tree, values: Mapping[str, Number] | None = None) -> Number:
    """Compute an expression at the values of its variables: a Fraction where it is rational, else 40 digits."""
    with _LOCK:
        try:
            value = _evaluate(tree, values or {})
        except (ZeroDivisionError, ValueError, OverflowError, TypeError, _mpmath().NoConvergence) as error:
            raise Unreadable(str(error)) from None
    if not isinstance(value, Fraction) and not _mpmath().isfinite(value):
        raise Unreadable("no finite value")
    return value


def is_complex(value: Number) -> bool:
    """Return whether a number that `evaluate` returned has an imaginary part."""
    return not isinstance(value, Fraction) and isinstance(value, _mpmath().mpc)


def real(value: Number) -> Any:
    """Return a number as one of 40 digits."""
    return _mpmath().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _evaluate(tree: Tree, values: Mapping[str, Number]) -> Number:
    kind = tree[0]
    if kind in ("number", "decimal", "based"):
        return tree[1]
    if kind == "name":
        return values[tree[1]]
    if kind == "constant":
        return {"π": +_mpmath().pi, "e": +_mpmath().e, "i": _mpmath().mpc(0, 1)}[tree[1]]
    if kind == "infinity":
        raise Unreadable("infinity")
    if kind == "call":
        argument = real(_evaluate(tree[2], values))
        if abs(argument) > 10**30:
            raise Unreadable("a large argument")
        if tree[1] in ("log", "lg"):
            logarithm = _mpmath().ln(argument)
            return logarithm if tree[3] is None else logarithm / _mpmath().ln(real(_evaluate(tree[3], values)))
        return getattr(_mpmath(), _FUNCTIONS[tree[1]])(argument)
    operands = [_evaluate(part, values) for part in tree[1:]]
    if kind == "group":
        return operands[0]
    if kind == "degree":
        return real(operands[0]) * _mpmath().pi / 180
    if kind == "percent":
        return operands[0] / 100
    if kind == "|":
        return abs(operands[0])
    if kind in ("⌊", "⌈"):
        exact = operands[0] if isinstance(operands[0], Fraction) else Fraction(int(_mpmath().floor(operands[0])))
        return Fraction(exact.__floor__() if kind == "⌊" else exact.__ceil__())
    if kind == "!":
        return _factorial(operands[0])
    left, right = operands
    if kind == "^":
        return _power(left, right)
    if kind == "root":
        return _power(left, 1 / right)
    if kind == "binomial":
        return _factorial(left) / (_factorial(right) * _factorial(left - right))
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = real(left), real(right)
    elif _size(left) + _size(right) > _LARGEST_BITS:
        raise TooLarge("large")
    if kind == "+":
        return left + right
    if kind == "-":
        return left - right
    if kind == "*":
        return left * right
    if kind in ("/", "fraction"):
        return left / right
    raise Unreadable(kind)  # ± and ∓, which stand for two values


def _size(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise Unreadable("a factorial")
    if value > 3000:
        raise TooLarge("large")
    product = 1
    for factor in range(2, int(value) + 1):
        product *= factor
    return Fraction(product)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            if abs(exponent) > _LARGEST_EXPONENT and base not in (0, 1, -1):
                raise TooLarge("large")
            if _size(base) * abs(int(exponent)) <= _LARGEST_BITS:
                return base ** int(exponent)
            raise TooLarge("large")
        if exponent.denominator == 2 and base >= 0 and _size(base) < 2000:
            roots = _exact_root(base.numerator), _exact_root(base.denominator)
            if roots[0] is not None and roots[1] is not None and abs(exponent) < _LARGEST_EXPONENT:
                return _power(Fraction(roots[0], roots[1]), Fraction(exponent.numerator))
        if exponent.denominator % 2 and base < 0 and exponent.numerator in (1, -1):
            return -_power(-base, exponent)  # the real root, as in \sqrt[3]{-8}
    base, exponent = real(base), real(exponent)
    if base == 0:
        return base
    if abs(exponent * _mpmath().ln(abs(base))) > 10**7:
        raise TooLarge("large")
    return base**exponent


def _exact_root(value: int) -> int | None:
    root = math.isqrt(value)
    return root if root * root == value else None
