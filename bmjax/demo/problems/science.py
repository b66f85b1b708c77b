"""Units and formulas, multiple choice: the formula, the numbers put in, the result with its unit, the choice.

A question is a stem with quantities and a chain of steps. The three wrong choices are what a wrong operation, a
slip by one or a lost factor of ten would give; their order is drawn from the stem, so a stem has one prompt only.
Choices are named by their numbers: finding the letter that stands beside one is beyond the smallest students.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from bmjax.demo.problems.common import Calculator, Problem, Solution

_MOVERS = (
    "car", "bike", "bus", "train", "ship", "horse", "tram", "truck", "robot", "plane",
    "van", "cat", "drone", "snail",
)  # fmt: skip
_LOADS = (
    "box", "cart", "sled", "rock", "boat", "crate", "bag", "desk", "barrel", "log",
    "bin", "chair", "tank", "trunk",
)  # fmt: skip
_DEVICES = (
    "lamp", "coil", "fan", "heater", "motor", "pump", "oven", "radio", "bell", "drill",
    "saw", "mixer", "bulb", "phone",
)  # fmt: skip
_SOLIDS = (
    "stone", "ring", "cube", "bolt", "coin", "ball", "key", "bar", "disc", "block",
    "pin", "tile", "nut", "brick",
)  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """`result = left operator right`, in `unit`."""

    result: str
    left: str
    operator: str
    right: str
    unit: str


@dataclass(frozen=True)
class Convert:
    """The quantity `symbol`, given in `unit`, is `factor` times as many of `into`."""

    symbol: str
    unit: str
    factor: int
    into: str


@dataclass(frozen=True)
class Question:
    """A stem with {symbols} and {noun}, the numbers each symbol is drawn from, and the steps to the answer."""

    level: int
    stem: str
    nouns: tuple[str, ...]
    numbers: dict[str, tuple[int, ...]]
    steps: tuple[Formula | Convert, ...]
    largest: int


def _to(high: int, low: int = 2) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


def _product(stem: str, nouns: tuple[str, ...], formula: Formula) -> list[Question]:
    """A formula that multiplies, small at level 1 and with one factor up to 9 at level 2."""
    small = {formula.left: _to(6), formula.right: _to(6)}
    large = {formula.left: _to(9, 4), formula.right: _to(6)}
    return [Question(1, stem, nouns, small, (formula,), 36), Question(2, stem, nouns, large, (formula,), 54)]


def _quotient(level: int, stem: str, nouns: tuple[str, ...], formula: Formula) -> Question:
    numbers = {formula.left: _to(54, 4), formula.right: _to(9)}
    return Question(level, stem, nouns, numbers, (formula,), 9)


_VOLTAGE = Formula("U", "R", "*", "I", "V")
_POWER = Formula("P", "U", "*", "I", "W")
_FORCE = Formula("F", "m", "*", "a", "N")
_WORK = Formula("W", "F", "*", "d", "J")
_SPEED = Formula("v", "d", "/", "t", "m/s")
_DISTANCE = Formula("d", "v", "*", "t", "m")
_KM = Convert("d", "km", 1000, "m")
_CM = Convert("d", "m", 100, "cm")

QUESTIONS: tuple[Question, ...] = (
    *_product("A {noun} goes at {v} m/s for {t} s. Distance in m?", _MOVERS, _DISTANCE),
    *_product("A {m} kg {noun} gains {a} m/s each s. Force in N?", _LOADS, _FORCE),
    *_product("A {R} ohm {noun} carries {I} A. Voltage in V?", _DEVICES, _VOLTAGE),
    *_product("A {U} V {noun} draws {I} A. Power in W?", _DEVICES, _POWER),
    *_product("{F} N push a {noun} {d} m. Work in J?", _LOADS, _WORK),
    *_product("A {noun} of {V} cm3 has {D} g/cm3. Mass in g?", _SOLIDS, Formula("m", "D", "*", "V", "g")),
    _quotient(1, "A {noun} goes {d} m in {t} s. Speed in m/s?", _MOVERS, _SPEED),
    _quotient(1, "A {noun} of {V} cm3 weighs {m} g. Density in g/cm3?", _SOLIDS, Formula("D", "m", "/", "V", "g/cm3")),
    _quotient(2, "A {noun} goes {d} m at {v} m/s. Time in s?", _MOVERS, Formula("t", "d", "/", "v", "s")),
    _quotient(2, "{F} N push a {m} kg {noun}. Acceleration in m/s2?", _LOADS, Formula("a", "F", "/", "m", "m/s2")),
    _quotient(2, "A {R} ohm {noun} gets {U} V. Current in A?", _DEVICES, Formula("I", "U", "/", "R", "A")),
    _quotient(2, "A {noun} at {U} V draws {I} A. Resistance in ohm?", _DEVICES, Formula("R", "U", "/", "I", "ohm")),
    Question(2, "A {noun} goes {d} km. Distance in m?", _MOVERS, {"d": _to(20)}, (_KM,), 20000),
    Question(2, "A {noun} is {d} m long. Length in cm?", _MOVERS, {"d": _to(20)}, (_CM,), 2000),
    Question(2, "A {noun} runs {t} h. Time in min?", _DEVICES, {"t": _to(9)}, (Convert("t", "h", 60, "min"),), 540),
    Question(2, "A {noun} runs {t} min. Time in s?", _DEVICES, {"t": _to(9)}, (Convert("t", "min", 60, "s"),), 540),
    Question(2, "A {noun} has {m} kg. Mass in g?", _LOADS, {"m": _to(20)}, (Convert("m", "kg", 1000, "g"),), 20000),
    Question(
        3, "A {noun} goes {d} km in {t} s. Speed in m/s?", _MOVERS, {"d": _to(9), "t": (10, 20, 50, 100, 200)},
        (_KM, _SPEED), 900,
    ),
    Question(
        3, "A {noun} of {V} cm3 weighs {m} kg. Density in g/cm3?", _SOLIDS,
        {"m": _to(9), "V": (10, 20, 50, 100, 200)},
        (Convert("m", "kg", 1000, "g"), Formula("D", "m", "/", "V", "g/cm3")), 900,
    ),
    Question(
        3, "A {R} ohm {noun} carries {I} A. Power in W?", _DEVICES, {"R": _to(6), "I": _to(4)}, (_VOLTAGE, _POWER), 60,
    ),
    Question(
        3, "A {R} ohm {noun} gets {U} V. Power in W?", _DEVICES, {"R": _to(6), "U": _to(24)},
        (Formula("I", "U", "/", "R", "A"), _POWER), 60,
    ),
    Question(
        3, "A {m} kg {noun} gains {a} m/s each s for {d} m. Work in J?", _LOADS,
        {"m": _to(6), "a": _to(5), "d": _to(4)}, (_FORCE, _WORK), 60,
    ),
    Question(
        3, "{F} N push a {m} kg {noun} for {t} s from rest. Speed in m/s?", _LOADS,
        {"F": _to(36, 4), "m": _to(6), "t": _to(6)},
        (Formula("a", "F", "/", "m", "m/s2"), Formula("v", "a", "*", "t", "m/s")), 60,
    ),
)  # fmt: skip

_SYMBOL = re.compile(r"\\\{(\w+)\\\}")
_CHOICES = re.compile(r"(.+)\n(\d{1,9}), (\d{1,9}), (\d{1,9}) or (\d{1,9})\?")


def _pattern(stem: str) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        return f"(?P<{match[1]}>[a-z]+)" if match[1] == "noun" else rf"(?P<{match[1]}>\d{{1,6}})"

    return re.compile(_SYMBOL.sub(group, re.escape(stem)))


_OF_LEVEL = {level: [q for q in QUESTIONS if q.level == level] for level in (1, 2, 3)}
_PATTERNS = [(_pattern(question.stem), question.steps) for question in QUESTIONS]


def generate(level: int, rng: random.Random) -> Problem | None:
    """A multiple-choice question of this level, or None when the numbers do not come out whole and in range."""
    question = rng.choice(_OF_LEVEL[level])
    values = {symbol: rng.choice(numbers) for symbol, numbers in question.numbers.items()}
    stem = question.stem.format(noun=rng.choice(question.nouns), **values)
    known = dict(values)
    for step in question.steps:
        if isinstance(step, Convert):
            left, right = known[step.symbol], step.factor
            known[step.symbol] = result = left * right
        else:
            left, right = known[step.left], known[step.right]
            if step.operator == "/" and left % right:
                return None
            known[step.result] = result = left * right if step.operator == "*" else left // right
    if not 2 <= result <= question.largest:
        return None
    return Problem("science", _with_choices(stem, left, right, result), str(result), level)


def _with_choices(stem: str, left: int, right: int, result: int) -> str:
    """The full prompt; left and right are the numbers of the last step."""
    rng = random.Random(hashlib.sha256(stem.encode()).digest())
    wrong_operation = [left + right, abs(left - right), left // right, left * right]
    slips = [result + 1, result - 1, result + 2]
    tens = [result + 10, result * 10, result // 10, result - 10]
    choices = [result]
    for pool in (wrong_operation, slips, [*tens, *wrong_operation, *slips]):
        choices.append(rng.choice([c for c in pool if c > 0 and c not in choices] or [max(choices) + 1]))
    rng.shuffle(choices)
    return "{}\n{}, {}, {} or {}?".format(stem, *choices)


def solve(prompt: str, calculator: Calculator) -> Solution:
    """The choice that the formulas give (the nearest one after a slip); ValueError for another prompt."""
    match = _CHOICES.fullmatch(prompt)
    if not match:
        raise ValueError("not a science prompt")
    matches = ((pattern.fullmatch(match[1]), steps) for pattern, steps in _PATTERNS)
    question, steps = next((pair for pair in matches if pair[0]), (None, ()))
    if question is None:
        raise ValueError("unknown science question")
    values = {symbol: int(text) for symbol, text in question.groupdict().items() if symbol != "noun"}
    lines: list[str] = []
    for step in steps:
        if isinstance(step, Convert):
            result, line = calculator.apply(values[step.symbol], "*", step.factor)
            values[step.symbol] = result
            lines += [f"1 {step.unit}={step.factor} {step.into}", f"{line} {step.into}"]
        else:
            result, line = calculator.apply(values[step.left], step.operator, values[step.right])
            values[step.result] = result
            lines += [
                f"{step.result}={step.left}{step.operator}{step.right}",
                f"{step.result}={line} {step.unit}",
            ]
    choices = [int(choice) for choice in match.groups()[1:]]
    if result not in choices and calculator.slip_step < 0:
        raise ValueError(f"{result} is none of the choices")
    return Solution("\n".join(lines), str(min(choices, key=lambda choice: abs(choice - result))))
