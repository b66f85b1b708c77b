"""Units and formulas, multiple choice: the formula, the numbers put in, the result with its unit, the choice.

A question is a stem with quantities and a chain of steps. The three wrong choices are what a wrong operation, a
slip by one or a lost factor of ten would give; their order is drawn from the stem, so a stem has one prompt only.
Choices are named by their numbers: finding the letter that stands beside one is beyond the smallest students.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bmjax.demo.problems.common import OPERATIONS, Calculator, Problem, Solution

_MOVERS = "car bike bus train ship horse tram truck robot plane van cat drone snail"
_LOADS = "box cart sled rock boat crate bag desk barrel log bin chair tank trunk"
_DEVICES = "lamp coil fan heater motor pump oven radio bell drill saw mixer bulb phone"
_SOLIDS = "stone ring cube bolt coin ball key bar disc block pin tile nut brick"


class Step(NamedTuple):
    """`result = left sign right`, in `unit`. `rule` is the line before it. A conversion's `right` is a number."""

    rule: str
    result: str
    left: str
    sign: str
    right: str
    unit: str

    def operands(self, values: Mapping[str, int]) -> tuple[int, int]:
        return values[self.left], int(self.right) if self.right.isdecimal() else values[self.right]


class Question(NamedTuple):
    """A stem with {symbols} and {noun}, the numbers each symbol is drawn from, the largest answer, and the steps."""

    level: int
    stem: str
    nouns: str
    numbers: Mapping[str, Sequence[int]]
    largest: int
    steps: Sequence[Step]


def _step(text: str) -> Step:
    """Read a formula with its unit, "v=d/t m/s", or the conversion of a symbol, "d: 1 km=1000 m"."""
    symbol, _, rule = text.rpartition(": ")
    if symbol:
        factor, unit = rule.partition("=")[2].split()
        return Step(rule, symbol, symbol, "*", factor, unit)
    rule, unit = text.split()
    result, _, left, sign, right = tuple(rule)
    return Step(rule, result, left, sign, right, unit)


def _chain(level: int, stem: str, nouns: str, largest: int, *steps: str, **numbers: Sequence[int]) -> Question:
    return Question(level, stem, nouns, numbers, largest, [_step(step) for step in steps])


def _product(stem: str, nouns: str, formula: str) -> list[Question]:
    """Return a formula that multiplies, small at level 1 and with one factor up to 9 at level 2."""
    left, right = formula[2], formula[4]
    small, large = {left: range(2, 7), right: range(2, 7)}, {left: range(4, 10), right: range(2, 7)}
    return [_chain(1, stem, nouns, 36, formula, **small), _chain(2, stem, nouns, 54, formula, **large)]


def _quotient(level: int, stem: str, nouns: str, formula: str) -> Question:
    return _chain(level, stem, nouns, 9, formula, **{formula[2]: range(4, 55), formula[4]: range(2, 10)})


_ROUND = (10, 20, 50, 100, 200)
QUESTIONS: tuple[Question, ...] = (
    *_product("A {noun} goes at {v} m/s for {t} s. Distance in m?", _MOVERS, "d=v*t m"),
    *_product("A {m} kg {noun} gains {a} m/s each s. Force in N?", _LOADS, "F=m*a N"),
    *_product("A {R} ohm {noun} carries {I} A. Voltage in V?", _DEVICES, "U=R*I V"),
    *_product("A {U} V {noun} draws {I} A. Power in W?", _DEVICES, "P=U*I W"),
    *_product("{F} N push a {noun} {d} m. Work in J?", _LOADS, "W=F*d J"),
    *_product("A {noun} of {V} cm3 has {D} g/cm3. Mass in g?", _SOLIDS, "m=D*V g"),
    _quotient(1, "A {noun} goes {d} m in {t} s. Speed in m/s?", _MOVERS, "v=d/t m/s"),
    _quotient(1, "A {noun} of {V} cm3 weighs {m} g. Density in g/cm3?", _SOLIDS, "D=m/V g/cm3"),
    _quotient(2, "A {noun} goes {d} m at {v} m/s. Time in s?", _MOVERS, "t=d/v s"),
    _quotient(2, "{F} N push a {m} kg {noun}. Acceleration in m/s2?", _LOADS, "a=F/m m/s2"),
    _quotient(2, "A {R} ohm {noun} gets {U} V. Current in A?", _DEVICES, "I=U/R A"),
    _quotient(2, "A {noun} at {U} V draws {I} A. Resistance in ohm?", _DEVICES, "R=U/I ohm"),
    _chain(2, "A {noun} goes {d} km. Distance in m?", _MOVERS, 20000, "d: 1 km=1000 m", d=range(2, 21)),
    _chain(2, "A {noun} is {d} m long. Length in cm?", _MOVERS, 2000, "d: 1 m=100 cm", d=range(2, 21)),
    _chain(2, "A {noun} runs {t} h. Time in min?", _DEVICES, 540, "t: 1 h=60 min", t=range(2, 10)),
    _chain(2, "A {noun} runs {t} min. Time in s?", _DEVICES, 540, "t: 1 min=60 s", t=range(2, 10)),
    _chain(2, "A {noun} has {m} kg. Mass in g?", _LOADS, 20000, "m: 1 kg=1000 g", m=range(2, 21)),
    _chain(3, "A {noun} goes {d} km in {t} s. Speed in m/s?", _MOVERS, 900, "d: 1 km=1000 m", "v=d/t m/s",
           d=range(2, 10), t=_ROUND),
    _chain(3, "A {noun} of {V} cm3 weighs {m} kg. Density in g/cm3?", _SOLIDS, 900, "m: 1 kg=1000 g", "D=m/V g/cm3",
           m=range(2, 10), V=_ROUND),
    _chain(3, "A {R} ohm {noun} carries {I} A. Power in W?", _DEVICES, 60, "U=R*I V", "P=U*I W",
           R=range(2, 7), I=range(2, 5)),
    _chain(3, "A {R} ohm {noun} gets {U} V. Power in W?", _DEVICES, 60, "I=U/R A", "P=U*I W",
           R=range(2, 7), U=range(2, 25)),
    _chain(3, "A {m} kg {noun} gains {a} m/s each s for {d} m. Work in J?", _LOADS, 60, "F=m*a N", "W=F*d J",
           m=range(2, 7), a=range(2, 6), d=range(2, 5)),
    _chain(3, "{F} N push a {m} kg {noun} for {t} s from rest. Speed in m/s?", _LOADS, 60, "a=F/m m/s2", "v=a*t m/s",
           F=range(4, 37), m=range(2, 7), t=range(2, 7)),
)  # fmt: skip

_CHOICES = re.compile(r"(.+)\n(\d{1,9}), (\d{1,9}), (\d{1,9}) or (\d{1,9})\?")


def _pattern(stem: str) -> re.Pattern[str]:
    text = re.escape(stem).replace(r"\{noun\}", "[a-z]+")
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d{1,6})", text))


_PATTERNS = [(_pattern(question.stem), question.steps) for question in QUESTIONS]


def generate(level: int, rng: random.Random) -> Problem | None:
    """Return a multiple-choice question, or None when the numbers do not come out whole and in range."""
    question = rng.choice([question for question in QUESTIONS if question.level == level])
    values = {symbol: rng.choice(numbers) for symbol, numbers in question.numbers.items()}
    stem = question.stem.format(noun=rng.choice(question.nouns.split()), **values)
    for step in question.steps:
        left, right = step.operands(values)
        if step.sign == "/" and left % right:
            return None
        values[step.result] = result = OPERATIONS[step.sign](left, right)
    if not 2 <= result <= question.largest:
        return None
    # Wrong choices: another operation on the last step's numbers, a slip, and a factor of ten or any of the others.
    rng = random.Random(hashlib.sha256(stem.encode()).digest())
    wrong_operation = [left + right, abs(left - right), left // right, left * right]
    slips = [result + 1, result - 1, result + 2]
    tens = [result + 10, result * 10, result // 10, result - 10]
    choices = [result]
    for pool in (wrong_operation, slips, [*tens, *wrong_operation, *slips]):
        choices.append(rng.choice([c for c in pool if c > 0 and c not in choices] or [max(choices) + 1]))
    rng.shuffle(choices)
    return Problem("science", "{}\n{}, {}, {} or {}?".format(stem, *choices), str(result), level)


def solve(prompt: str, calculator: Calculator) -> Solution:
    """Return the choice that the formulas give (the nearest one after a slip); ValueError for another prompt."""
    match = _CHOICES.fullmatch(prompt)
    if not match:
        raise ValueError("not a science prompt")
    questions = ((m.groupdict(), steps) for pattern, steps in _PATTERNS if (m := pattern.fullmatch(match[1])))
    quantities, steps = next(questions, ({}, []))
    values = {symbol: int(text) for symbol, text in quantities.items()}
    lines: list[str] = []
    for step in steps:
        left, right = step.operands(values)
        values[step.result], line = calculator.apply(left, step.sign, right)
        lines += [step.rule, f"{line if step.result == step.left else f'{step.result}={line}'} {step.unit}"]
    if not lines:
        raise ValueError("unknown science question")
    result = values[steps[-1].result]
    choices = [int(choice) for choice in match.groups()[1:]]
    if result not in choices and calculator.slip_step < 0:
        raise ValueError(f"{result} is none of the choices")
    return Solution("\n".join(lines), str(min(choices, key=lambda choice: abs(choice - result))))
