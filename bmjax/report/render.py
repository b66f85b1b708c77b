"""The jinja2 environment of the report. HTML templates escape every value; a name that is not there is an error."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from bmjax.report.text import EMPTY, count, decimal, duration, number, one_line


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
ENVIRONMENT.filters.update(count=count, decimal=decimal, duration=duration, markdown=markdown, number=number)
ENVIRONMENT.globals.update(EMPTY=EMPTY)


def render(template: str, **context: Any) -> str:
    """Return the text of a template of templates/ with these names."""
    return ENVIRONMENT.get_template(template).render(context)
