"""What an adapter of a data set is: how its rows are recognised, and how one becomes a problem.

The adapters themselves are in mathematics.py, choice.py and programs.py; table.py lists them by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# What the reading of a row raises where its columns hold something else than those of the data set.
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)

_IMAGE = re.compile(
    r"!\[[^\]]*\]\(|<img\b|<image>|\\includegraphics|https?://\S+?\.(?:png|jpe?g|gif|svg)\b", re.IGNORECASE
)


class LeftOut(Exception):
    """A row that makes no problem. The text is the reason, in words that fit every row of the kind."""


@dataclass(frozen=True)
class Adapter:
    """How rows of one data set become problems.

    Attributes:
        name: what the setting `adapter` calls it.
        hub: data sets of this form, as the hub calls them.
        columns: alternatives; a row is of this form when it has all columns of one of them, and `fits` agrees.
        domain: of its problems.
        prompt: returns the question of a row, without an instruction. Raises LeftOut.
        reference: returns the reference of a row. Raises LeftOut.
        instruction: returns what follows the question.
        judge: returns the name of the judge, None where the reference's shape decides.
        source: the columns that name where a row comes from, the first that is there.
        fits: what else tells its rows from those of another data set with the same columns.
    """

    name: str
    hub: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    domain: str
    prompt: Callable[[Row], str]
    reference: Callable[[Row], Any]
    instruction: Callable[[Row], str]
    judge: Callable[[Row], str | None] = lambda row: None
    source: tuple[str, ...] = ("source",)
    fits: Callable[[Row], bool] = lambda row: True

    def has_columns(self, row: Row) -> bool:
        """Return whether a row has the columns of this form."""
        return any(all(column in row for column in columns) for columns in self.columns)

    def reads(self, row: Row) -> bool:
        """Return whether a row is of this form: its columns, and what stands in them."""
        return self.has_columns(row) and self.fits(row)

    def source_of(self, row: Row) -> str:
        """Return where a row comes from, as the row says; empty where it does not."""
        return next((str(row[column]) for column in self.source if row.get(column) not in (None, "")), "")


def text_of(row: Row, *columns: str) -> str:
    """Return the stripped text of the first column that holds any; empty where none does."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def question_of(row: Row, *columns: str) -> str:
    """Return the question of a row as text. LeftOut for none, and for one that needs an image."""
    question = text_of(row, *columns)
    if not question:
        raise LeftOut("no question")
    if any(row.get(column) for column in ("image", "images")) or _IMAGE.search(question):
        raise LeftOut("an image")
    return question
