"""How the report writes: formats of numbers and names, and the jinja2 templates that use them.

HTML templates escape every value. A name that a template lacks is an error.
"""

import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from bmjax.io.card import listed

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


def one_line(text: Any) -> str:
    """Return text without line breaks and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def block(text: Any) -> Markup:
    """Return text of several lines, escaped, without the control characters that a browser or terminal would obey."""
    lines = "\n".join(str(text).splitlines()).replace("\t", "    ")
    return escape("".join(c if c.isprintable() or c == "\n" else " " for c in lines))


def shortened(name: str, limit: int = 26) -> str:
    """Return a name on one line, cut to `limit` characters."""
    text = one_line(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_sentence(text: str) -> str:
    """Return the first sentence of a text whose lines may be broken anywhere."""
    return re.split(r"(?<=[.:]) (?=[A-Z])", one_line(text.split("\n\n")[0]))[0]


def latex(text: str) -> str:
    """Escape what LaTeX would obey."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return re.sub(r"[\\~^±&%$#_{}]", lambda match: special.get(match[0], "\\" + match[0]), one_line(text))


def markdown(text: str) -> str:
    """Escape what Markdown would obey."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
    # Names come from files of the run: control characters are cut out wherever one is written.
    finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(block=block, count=count, decimal=decimal, listed=listed, markdown=markdown, number=number)
ENVIRONMENT.globals.update(EMPTY=EMPTY)


def render(template: str, **context: Any) -> str:
    """Return the text of a template of templates/ with these names."""
    return ENVIRONMENT.get_template(template).render(context)
