"""Values of a recipe's parameters: one for all tensors, along the depth, or chosen by tensor names.

weight: 0.5                          # one value
weight: [0.2, 0.5, 1.0]              # first, middle and last layer; straight lines between
weight:                              # the first entry that fits the tensor's name
  - {filter: mlp, value: [0, 1]}     #   the name contains this text ("*": any name)
  - {regex: 'layers\\.[0-3]\\.', value: 0}
  - {value: 0.5}                     #   every other tensor
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError, nearest

MAX_PATTERN = 200  # characters
_MAX_REPEATS, _MAX_GROUPS = 4, 6


@dataclass(frozen=True)
class Rule:
    """`points` along the depth for the tensors whose name contains `text` (None: all), or matches it as a pattern."""

    points: tuple[Any, ...]
    text: str | None = None
    pattern: re.Pattern[str] | None = None

    def fits(self, tensor: str) -> bool:
        if self.pattern is not None:
            return self.pattern.search(tensor) is not None
        return self.text is None or self.text in tensor

    def at(self, depth: float) -> Any:
        """Return the value at a depth of 0 to 1. Numbers lie on lines between the points; words change in steps."""
        position = depth * (len(self.points) - 1)
        before = int(position)
        if any(isinstance(point, (bool, str)) for point in self.points):
            return self.points[before]
        after, share = min(before + 1, len(self.points) - 1), position - before
        return self.points[before] if share == 0 else (1 - share) * self.points[before] + share * self.points[after]


@dataclass(frozen=True)
class Value:
    """A parameter whose value depends on the tensor: that of the first rule which fits its name."""

    name: str
    rules: tuple[Rule, ...]

    def rule(self, tensor: str) -> Rule | None:
        """Return the first rule that fits the tensor."""
        return next((rule for rule in self.rules if rule.fits(tensor)), None)

    def at(self, tensor: str, depth: float) -> Any:
        """Return the value for a tensor at a depth of 0 (first layer) to 1 (last). UserError when no rule fits."""
        rule = self.rule(tensor)
        if rule is None:
            raise UserError(
                f"parameter '{self.name}' has no value for tensor '{tensor}': no filter fits; "
                "add a last entry `- value: V`"
            )
        return rule.at(depth)


def parse(name: str, value: Any, check: Callable[[Any], Any], *, line: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a parameter's value as a recipe writes it.

    check: returns a single value as its type or raises UserError. line: whether values between two are values too.
    """
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list) or not any(isinstance(entry, Mapping) for entry in entries):
        return (Rule(_points(name, value, check, line)),)
    return tuple(_rule(name, entry, check, line) for entry in entries)


def simplify(name: str, rules: tuple[Rule, ...]) -> Any:
    """Return the plain value if the first rule is the same for all tensors and depths, else a Value of the rules."""
    last = next((i for i, rule in enumerate(rules) if rule.text is None), len(rules))
    if rules and last == 0 and len(rules[0].points) == 1:
        return rules[0].points[0]
    return Value(name, rules[: last + 1])


def _rule(name: str, entry: Any, check: Callable[[Any], Any], line: bool) -> Rule:
    if not isinstance(entry, Mapping):
        raise UserError(f"{name}: {entry!r} stands among filters; expected `- filter: TEXT` with `value: V`")
    for key in entry:
        if key not in ("filter", "regex", "value"):
            raise UserError(f"{name}: unknown key '{key}'{nearest(str(key), ['filter', 'regex', 'value'])}")
    if "value" not in entry:
        raise UserError(f"{name}: `value` is missing beside {dict(entry)}"[:200])
    points = _points(name, entry["value"], check, line)
    text, pattern = entry.get("filter"), entry.get("regex")
    if text is not None and pattern is not None:
        raise UserError(f"{name}: 'filter' and 'regex' stand in one entry; keep one of them")
    for key, part in (("filter", text), ("regex", pattern)):
        if part is not None and (not isinstance(part, str) or not part):
            raise UserError(f"{name}: {key}: expected a part of tensor names, found {part!r}")
    if pattern is None:
        return Rule(points, None if text == "*" else text)
    if len(pattern) > MAX_PATTERN:
        raise UserError(f"{name}: regex: {len(pattern)} characters, at most {MAX_PATTERN} are read")
    # Patterns with many repeats, or with a repeated group, can take years for one name.
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    repeats = len(re.findall(r"(?<![(*+?}])[*+?{]", bare))
    if repeats > _MAX_REPEATS or bare.count("(") > _MAX_GROUPS or re.search(r"\)[*+{]", bare):
        raise UserError(
            f"{name}: regex '{pattern}' could take for ever: at most {_MAX_REPEATS} of * + ? {{}} and {_MAX_GROUPS} "
            "groups are allowed, and no repeated group"
        )
    try:
        return Rule(points, pattern, re.compile(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name}: regex '{pattern}' is not one: {error}") from None


def _points(name: str, value: Any, check: Callable[[Any], Any], line: bool) -> tuple[Any, ...]:
    if not isinstance(value, list):
        return (checked(name, value, check),)
    if not value:
        raise UserError(f"{name}: an empty list; expected one value, or values from the first layer to the last")
    if len(value) > 1 and not line:
        raise UserError(f"{name}: expected one value, found a list of {len(value)}; it cannot change with the depth")
    return tuple(checked(name, point, check) for point in value)


def checked(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """Return `check(value)`; a UserError for a whole number too large to be compared with floats."""
    try:
        return check(value)
    except OverflowError:
        raise UserError(f"{name}: {str(value)[:20]}... is beyond all numbers that a merge computes with") from None
