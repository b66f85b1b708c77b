"""The few HTML pieces that all sections use. What comes from data goes through `words`, which escapes it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from bmjax.report.tables import EMPTY, number, one_line


def words(value: Any) -> str:
    return escape(one_line(value))


def classes(*names: str) -> str:
    given = " ".join(name for name in names if name)
    return f' class="{given}"' if given else ""


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n"


def missing(text: str) -> str:
    return f'<p class="missing">{words(text)}</p>'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def figure(panels: Sequence[str], caption: str, broad: bool = False) -> str:
    cells = "\n".join(f"<div>{panel}</div>" for panel in panels)
    kind = "panels broad" if broad else "panels"
    return f'<figure>\n<div class="{kind}">\n{cells}\n</div>\n<figcaption>{caption}</figcaption>\n</figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A plain table; the cells are HTML already, the first `text_columns` of them words."""
    kind = ["" if 0 < i >= text_columns else ' class="text"' for i in range(len(header))]
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind[i]}>{value}</td>" for i, value in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def decimal(value: Any, factor: float, digits: int) -> str:
    finite = number(value)
    return EMPTY if finite is None else f"{factor * finite:.{digits}f}"


def bar(share: float) -> str:
    return f'<span class="share"><i style="width:{min(100.0, max(0.0, 100 * share)):.1f}%"></i></span>'
