"""Templates over the fields of a JSON row: `{question}` stands for a field, `{{` and `}}` for braces."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bmjax.config import UserError, nearest, read_text
from bmjax.teach.record import lines_with_offsets

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def fill(template: str, row: Mapping[str, Any], where: str, key: str) -> Any:
    """The template with the row's fields put in; a template that is one lone field gives its value as it is.

    UserError naming `where` and the setting `key` when the row has no such field.
    """
    if (lone := _FIELD.fullmatch(template)) and lone[1]:
        return _value(row, lone[1], where, key)

    def put(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else str(_value(row, match[1], where, key))

    return _FIELD.sub(put, template)


def _value(row: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: {key} asks for field '{name}', which the row lacks{nearest(name, list(row))}")
    return row[name]


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE:LINE`, row) of each line of a JSONL file. UserError for a missing file or a line that is no object."""
    if not Path(path).is_file():
        read_text(path)
    for _, number, row in lines_with_offsets(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        yield f"{path}:{number}", row
