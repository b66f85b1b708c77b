"""Compares what a program printed or returned with what a test expects."""

import math
import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,9})?", re.ASCII)
# Contests that compare what functions return accept floats so near.
VALUE_TOLERANCE = 1e-5


def same_output(printed: str, expected: str, tolerance: float | None = None, ignore_case: bool = False) -> bool:
    """Compare two texts line by line and word by word; blank lines and blanks do not count.

    Words are equal as text, or as exact numbers (1.50 is 1.5). With a tolerance numbers may differ by it, absolutely
    or relative to what is expected.
    """
    if ignore_case:
        printed, expected = printed.casefold(), expected.casefold()
    left, right = ([words for line in text.splitlines() if (words := line.split())] for text in (printed, expected))
    if list(map(len, left)) != list(map(len, right)):
        return False
    pairs = (pair for lines in zip(left, right, strict=True) for pair in zip(*lines, strict=True))
    return all(_same_word(word, wanted, tolerance) for word, wanted in pairs)


def _same_word(word: str, wanted: str, tolerance: float | None) -> bool:
    if word == wanted:
        return True
    if not _NUMBER.fullmatch(word) or not _NUMBER.fullmatch(wanted):
        return False
    if Decimal(word) == Decimal(wanted):
        return True
    return tolerance is not None and _close(float(word), float(wanted), tolerance)


def same_value(value: Any, expected: Any, tolerance: float | None = None) -> bool:
    """Compare two values of JSON: floats within a tolerance, all else exactly; tuples are lists."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(expected)
            and all(same_value(a, b, tolerance) for a, b in zip(value, expected, strict=True))
        )
    if isinstance(expected, dict):
        wanted = {str(key): item for key, item in expected.items()}
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(same_value(value[key], wanted[key], tolerance) for key in wanted)
        )
    numbers = all(isinstance(side, int | float) and not isinstance(side, bool) for side in (value, expected))
    if numbers and (isinstance(value, float) or isinstance(expected, float) or tolerance is not None):
        try:
            return _close(float(value), float(expected), VALUE_TOLERANCE if tolerance is None else tolerance)
        except OverflowError:
            return value == expected
    return type(value) in (type(expected), bool, int) and value == expected


def _close(value: float, expected: float, tolerance: float) -> bool:
    if math.isnan(value) and math.isnan(expected):
        return True
    if value == expected or not math.isfinite(expected):
        return value == expected
    return abs(value - expected) <= tolerance * max(1.0, abs(expected))
