"""Compares two values: which forms mean the same, which orders count, how near two numbers must be."""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from bmjax.teach.judges import expressions
from bmjax.teach.judges.expressions import Number, TooLarge, Tree, Unreadable, evaluate, names
from bmjax.teach.judges.values import Equation, Interval, Matrix, Quantity, Sequenced, Union, Value, Words

# Variables take these values, and their reciprocals, and their negatives. Equal expressions agree at all of them.
_POINTS = [
    [Fraction(prime, 541 + 7 * step) * scale for step, prime in enumerate((1237, 911, 1103, 823, 1301, 677, 1009, 769))]
    for scale in (Fraction(1), Fraction(11, 5), Fraction(3, 10), Fraction(-1))
]
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?")
_ROUNDED_DIGITS = 6  # a decimal of so many digits may stand for a number that has no end
_FLOAT_DIGITS = 15  # a computer prints so many, of which the last are noise
_NEAR = Fraction(1, 10**12)
# 10 % is 10 and 0.1, 90° is 90 and π/2.
_SECOND_READINGS: dict[tuple[str, int], Tree] = {
    ("percent", 1): ("number", Fraction(1, 100)),
    ("angle", 1): ("/", ("constant", "π"), ("number", Fraction(180))),
}


def equal(expected: Value, actual: Value) -> bool | None:
    """Compare a reference with an answer: True, False, or None where it cannot be told."""
    pair = (expected, actual)
    if isinstance(expected, Equation) or isinstance(actual, Equation):
        return _equations(expected, actual)
    if any(isinstance(value, Interval | Union) for value in pair):
        return _unions(expected, actual)
    if isinstance(expected, Matrix) or isinstance(actual, Matrix):
        return _matrices(expected, actual)
    if isinstance(expected, Sequenced) and not expected.items and isinstance(actual, Words):
        return _NO_SOLUTION.fullmatch(actual.text) is not None
    if isinstance(expected, Sequenced) or isinstance(actual, Sequenced):
        return _sequences(expected, actual)
    if isinstance(expected, Words) and isinstance(actual, Words):
        return expected.text == actual.text
    if isinstance(expected, Quantity) and isinstance(actual, Quantity):
        return _quantities(expected, actual)
    return False


def _equations(expected: Value, actual: Value) -> bool | None:
    if isinstance(expected, Equation) and isinstance(actual, Equation):
        if expected.name and actual.name:
            sides = equal(expected.right, actual.right)
            if sides and expected.name != actual.name:
                # y and f(x) name the same.
                functions = all(re.fullmatch(r"y|[a-zA-Z]\(x\)", name) for name in (expected.name, actual.name))
                return True if functions else None
            if not sides and expected.name != actual.name and (turned := _proportional(expected, actual)):
                return turned
            return sides
        return _proportional(expected, actual)
    equation, other = (expected, actual) if isinstance(expected, Equation) else (actual, expected)
    assert isinstance(equation, Equation)
    if not equation.name:
        return None
    return equal(equation.right, other) if equation is expected else equal(other, equation.right)


def _proportional(expected: Equation, actual: Equation) -> bool | None:
    """Two equations are one if the differences of their sides are in a fixed ratio."""
    differences = []
    for equation in (expected, actual):
        sides: list[Tree] = []
        for side, name in ((equation.left, equation.name), (equation.right, "")):
            if isinstance(side, Quantity):
                sides.append(side.tree)
            elif name and len(name) == 1:
                sides.append(("name", name))
            else:
                return None
        differences.append(("-", *sides))
    ratios = []
    for values in _assignments(names(differences[0]) | names(differences[1])):
        try:
            left, right = (evaluate(difference, values) for difference in differences)
            ratios.append(left / right)
        except (Unreadable, ZeroDivisionError):
            continue
    if len(ratios) < 2:
        return None
    return all(_near(ratios[0], ratio) for ratio in ratios[1:])


def _unions(expected: Value, actual: Value) -> bool | None:
    sides = [_intervals(value) for value in (expected, actual)]
    if sides[0] is None or sides[1] is None:
        return False
    return _matched(sides[0], sides[1], _same_interval)


def _intervals(value: Value) -> list[Interval] | None:
    if isinstance(value, Union):
        return list(value.parts)
    if isinstance(value, Interval):
        return [value]
    if isinstance(value, Sequenced) and value.brackets in ("()", "[]") and len(value.items) == 2:
        closed = value.brackets == "[]"
        return [Interval(value.items[0], value.items[1], (closed, closed))]
    if isinstance(value, Sequenced) and value.items and all(isinstance(item, Interval) for item in value.items):
        return [item for item in value.items if isinstance(item, Interval)]
    return None


def _same_interval(left: Interval, right: Interval) -> bool | None:
    if left.closed != right.closed or (left.name and right.name and left.name != right.name):
        return False
    results = []
    for a, b in ((left.low, right.low), (left.high, right.high)):
        results.append(a is b if a is None or b is None else equal(a, b))
    return _all(results)


def _matrices(expected: Value, actual: Value) -> bool | None:
    sides: list[tuple[tuple[tuple[Value, ...], ...] | None, tuple[Value, ...] | None]] = []
    for value in (expected, actual):
        if isinstance(value, Matrix):
            rows = value.rows
            # A column is a vector, which others write as a tuple.
            vector = min(len(rows), *map(len, rows), 99) == 1
            sides.append((rows, tuple(cell for row in rows for cell in row) if vector else None))
        elif isinstance(value, Sequenced) and value.brackets in ("()", "[]"):
            nested = [item.items for item in value.items if isinstance(item, Sequenced)]
            sides.append((tuple(nested) if len(nested) == len(value.items) else None, value.items))
        else:
            return False
    (left_rows, left_cells), (right_rows, right_cells) = sides
    if left_rows and right_rows and [*map(len, left_rows)] == [*map(len, right_rows)]:
        return _all(
            equal(a, b)
            for row, other in zip(left_rows, right_rows, strict=True)
            for a, b in zip(row, other, strict=True)
        )
    if (left_rows and right_rows) or left_cells is None or right_cells is None or len(left_cells) != len(right_cells):
        return False
    return _all(equal(a, b) for a, b in zip(left_cells, right_cells, strict=True))


def _sequences(expected: Value, actual: Value) -> bool | None:
    left, right = (value if isinstance(value, Sequenced) else Sequenced((value,), "") for value in (expected, actual))
    left, right = _unnamed(left), _unnamed(right)
    # {(1, 2)} is the point that it holds.
    for one, other in ((left, right), (right, left)):
        if one.brackets == "{}" and len(one.items) == 1 and isinstance(one.items[0], Sequenced):
            return (
                _sequences(one.items[0], other)
                if other.brackets == "()"
                else _matched([*left.items], [*right.items], equal)
            )
    ordered = [side for side in (left, right) if side.brackets not in ("", "{}", "±")]
    if not ordered:
        named = [all(isinstance(item, Equation) and item.name for item in side.items) for side in (left, right)]
        if all(named) or not any(isinstance(item, Equation) for side in (left, right) for item in side.items):
            return _matched(_distinct(left.items), _distinct(right.items), equal)
        return (
            _all(equal(a, b) for a, b in zip(left.items, right.items, strict=True))
            if len(left.items) == len(right.items)
            else False
        )
    # Of 1, 3 a pair in brackets is a point, or an interval, unless the two are named: x = 1, y = 3.
    plain_pair = len(left.items) == 2 and not any(isinstance(item, Equation | Sequenced) for item in left.items)
    if plain_pair and not left.brackets and right.brackets in ("()", "[]") and len(right.items) == 2:
        return False
    # (3, 4) against 3, 4 or x = 3, y = 4: the order counts, but a set or an interval is no point.
    if len(ordered) == 2 and left.brackets != right.brackets:
        return False
    if len(ordered) == 1 and (
        any(side.brackets in ("{}", "±") for side in (left, right)) or len(left.items) != len(right.items)
    ):
        return False
    if len(left.items) != len(right.items):
        return False
    return _all(equal(a, b) for a, b in zip(left.items, right.items, strict=True))


def _unnamed(side: Sequenced) -> Sequenced:
    """Drop the name of an unknown from its several values: x = 1, x = 2."""
    equations = [item for item in side.items if isinstance(item, Equation) and item.name]
    if len(equations) < 2 or len(equations) < len(side.items) or len({item.name for item in equations}) > 1:
        return side
    return Sequenced(tuple(item.right for item in equations), side.brackets)


def _distinct(items: tuple[Value, ...]) -> list[Value]:
    distinct: list[Value] = []
    for item in dict.fromkeys(items):
        if not any(equal(other, item) for other in distinct):
            distinct.append(item)
    return distinct


def _matched(left: list[Any], right: list[Any], same: Callable[[Any, Any], bool | None]) -> bool | None:
    """Pair the members of two sets."""
    if len(left) != len(right):
        return False
    rest, unsure = list(right), False
    for item in left:
        results = [same(item, other) for other in rest]
        if True in results:
            rest.pop(results.index(True))
        elif None in results:
            unsure = True
        else:
            return False
    return None if unsure else True


def _all(results: Iterable[bool | None]) -> bool | None:
    results = list(results)
    if False in results:
        return False
    return None if None in results else True


def _quantities(expected: Quantity, actual: Quantity) -> bool | None:
    """Compare numbers with their units: what has none takes the other's; 10 % is 10 and 0.1, 90° is 90 and π/2."""
    left, right = expected.unit, actual.unit
    factor = Fraction(1)
    results = []
    if left and right:
        if left[0] != right[0]:
            return False if not {("percent", 1), ("angle", 1)} & {*left[0], *right[0]} else None
        factor = right[1] / left[1]
    results.append(same(expected.tree, _scaled(actual.tree, factor)))
    if (left is None) != (right is None):
        for dimension, size in _SECOND_READINGS.items():
            if dimension in (left or right)[0]:  # type: ignore[index]
                trees = (("*", expected.tree, size), actual.tree) if left else (expected.tree, ("*", actual.tree, size))
                results.append(same(*trees))
    if True in results:
        return True
    return None if None in results else False


def _scaled(tree: Tree, factor: Fraction) -> Tree:
    return tree if factor == 1 else ("*", ("number", factor), tree)


def same(expected: Tree, actual: Tree) -> bool | None:
    """Compare two expressions: exactly where both are rational, else by 40 digits, at four points."""
    expected_base, actual_base = (_based(tree) for tree in (expected, actual))
    if expected_base and not actual_base and _is_literal(actual):
        return _literal(actual) == expected_base[2]  # the digits, with the base left out
    if expected == actual:
        return True
    variables = names(expected) | names(actual)
    results: list[bool | None] = []
    for values in _assignments(variables):
        sides: list[Number | None] = []
        too_large = 0
        for tree in (expected, actual):
            try:
                sides.append(evaluate(tree, values))
            except TooLarge:
                too_large += 1
                sides.append(None)
            except Unreadable:
                sides.append(None)
        if sides[0] is None or sides[1] is None:
            # No number that can be computed is equal to one that is too large for it.
            results.append(False if too_large == 1 and sides != [None, None] else None)
        else:
            results.append(_near(sides[0], sides[1]) or (not variables and _rounded(expected, actual, *sides)))
    known = [result for result in results if result is not None]
    if len(known) < min(2, len(results)):
        return None
    if all(known):
        return True
    return None if any(known) else False


def _assignments(variables: Iterable[str]) -> list[dict[str, Fraction]]:
    ordered = sorted(variables)
    if not ordered:
        return [{}]
    if len(ordered) > len(_POINTS[0]):
        return []
    return [dict(zip(ordered, point, strict=False)) for point in _POINTS]


def _near(left: Number, right: Number) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = (expressions.real(side) for side in (left, right))
    scale = max(abs(left), abs(right))
    return bool(abs(left - right) <= scale * expressions.real(Fraction(1, 10**30)))


def _rounded(expected: Tree, actual: Tree, left: Number, right: Number) -> bool:
    """Return whether a decimal is the other number rounded: 0.333333 is 1/3, and 0.30000000000000004 is 0.3."""
    digits = _decimals(actual)
    if digits is None or any(map(expressions.is_complex, (left, right))):
        return False
    significant, unit = digits
    excess = abs(expressions.real(right)) - abs(expressions.real(left))
    difference = abs(expressions.real(left) - expressions.real(right))
    if isinstance(left, Fraction) and _is_finite_decimal(left):
        near = difference <= abs(expressions.real(left)) * expressions.real(_NEAR)
        return bool(_FLOAT_DIGITS <= significant <= _FLOAT_DIGITS + 3 and near)
    # Rounded, or cut off.
    allowed = unit if excess < 0 else unit * Fraction(50001, 100000)
    return bool(significant >= _ROUNDED_DIGITS and difference < expressions.real(allowed))


def _decimals(tree: Tree) -> tuple[int, Fraction] | None:
    """Return (significant digits, value of the last digit) of a decimal literal, which may have a sign and a power."""
    scale = Fraction(1)
    while True:
        if tree[0] == "group":
            tree = tree[1]
        elif tree[0] == "-" and tree[1] == ("number", Fraction(0)):
            tree = tree[2]
        elif tree[0] == "*" and tree[1][0] == "decimal" and not names(tree[2]):
            try:
                power = evaluate(tree[2])
            except Unreadable:
                return None
            if not isinstance(power, Fraction):
                return None
            scale, tree = scale * abs(power), tree[1]
        elif tree[0] == "decimal":
            digits = re.sub(r"\D", "", tree[2]).lstrip("0")
            return len(digits), scale / 10 ** len(tree[2].partition(".")[2])
        else:
            return None


def _is_finite_decimal(value: Fraction) -> bool:
    denominator = value.denominator
    for factor in (2, 5):
        while denominator % factor == 0:
            denominator //= factor
    return denominator == 1


def _based(tree: Tree) -> Tree | None:
    while tree[0] == "group":
        tree = tree[1]
    return tree if tree[0] == "based" else None


def _is_literal(tree: Tree) -> bool:
    return tree[0] == "number" or (tree[0] == "group" and _is_literal(tree[1]))


def _literal(tree: Tree) -> Fraction:
    return _literal(tree[1]) if tree[0] == "group" else tree[1]
