"""A page as its tags, rows, figures and texts."""

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on a tag that is not closed in order."""

    VOID = ("meta", "br", "hr", "path", "use", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.svg_texts: list[str] = []
        self.figures: list[dict[str, int]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figure":
            self.figures.append({"svg": 0, "figcaption": 0})
        if tag in ("svg", "figcaption") and "figure" in self.stack:
            self.figures[-1][tag] += 1

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.texts.append(data)
        if "svg" in self.stack:
            self.svg_texts.append(data.strip())
        elif "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data
