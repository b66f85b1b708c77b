"""How the report writes numbers and names. Used by its tables, figures and templates."""

import math
from collections.abc import Sequence
from typing import Any

EMPTY = "–"


def number(value: Any) -> float | None:
    """Return a finite number as float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def decimal(value: Any, form: str, factor: int = 1) -> str:
    """Format `factor * value` by the format specification `form`; EMPTY where there is no number."""
    finite = number(value)
    return EMPTY if finite is None else format(factor * finite, form)


def count(value: Any) -> str:
    """Format a number of tokens in a few letters: 940, 12.3k, 1.23M, 4.56B."""
    size = number(value)
    if size is None:
        return EMPTY
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(size) >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:.0f}"


def duration(seconds: float) -> str:
    """Format a time: 9.5 s, 2 min 05 s, 3 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def one_line(text: Any) -> str:
    """Return text without line breaks and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def shortened(name: str, limit: int = 26) -> str:
    """Return a name on one line, cut to `limit` characters."""
    text = one_line(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(parts: Sequence[str]) -> str:
    """Join parts as in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
