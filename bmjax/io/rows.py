"""Rows of data: the only reader of JSON Lines, JSON, Parquet and hub data sets, for every key that takes rows.

Files are told apart by their content and read row by row, so that a file need not fit in memory. A row keeps the name
of its file and its number, which every error about it begins with.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line, nearest, read_text
from bmjax.io import hub
from bmjax.io.jsonl import read_lines

Row = tuple[str, dict[str, Any]]  # ("FILE, row N", the row)

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_SPACE = re.compile(r"\s*")
_CHUNK = 2**20  # how much of a JSON array or of a Parquet column is read at a time


def read_rows(data: str | Path | Sequence[str | Path], key: str = "data") -> Iterator[Row]:
    """Yield (location, row) of every row, file after file.

    data: one or several of: a file of JSON Lines, a JSON array, Parquet; a hub data set `org/name`, `org/name:subset`
    or `org/name:subset:split` (without a split, `train`). key: the setting that named the data, for errors. UserError
    for a missing file, a row that is no JSON object, and data without a single row.
    """
    names = [data] if isinstance(data, (str, Path)) else list(data)
    empty = True
    for name in names:
        for row in read_source(str(name), key):
            empty = False
            yield row
    if empty:
        raise UserError(f"{key}: {', '.join(map(str, names)) or 'an empty list'}: no rows; expected at least one")


def read_source(name: str, key: str = "data", growing: bool = False) -> Iterator[Row]:
    """Yield (location, row) of one file or hub data set, maybe none.

    growing: whether JSON Lines may end in a torn line, which a killed writer left; it is skipped.
    """
    if hub.is_dataset_id(name):
        rows: Iterator[tuple[int, Any]] = enumerate(hub.dataset_rows(name, key), 1)
    else:
        rows = _read_file(Path(name).expanduser(), growing)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{name}, row {number}", row


def _read_file(path: Path, growing: bool) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row); the number of a row of JSON Lines is its line's."""
    if not path.is_file():
        read_text(path)  # says what is wrong, and names what is near
    try:
        with path.open("rb") as file:
            start = file.read(_CHUNK)
        if start.startswith(b"PAR1"):
            yield from _read_parquet(path)
        elif start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _json_array(path)
        else:
            yield from read_lines(path, growing)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        text = file.read(_CHUNK)
        decoder, number, position, after_row = json.JSONDecoder(), 1, text.index("[") + 1, False
        while True:
            position = _skip_space(text, position)
            if after_row and text.startswith(",", position):
                position, after_row = _skip_space(text, position + 1), False
            if text.startswith("]", position) and (after_row or number == 1):
                rest = text[position + 1 :]
                while not rest.strip():
                    if not (rest := file.read(_CHUNK)):
                        return
                raise UserError(f"{path}: not valid JSON: text follows the closing bracket")
            try:
                if after_row:
                    raise ValueError("expected a comma or the closing bracket")
                row, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                # The row may go on behind what was read. Reading as much again keeps the time linear in its length.
                text, position = text[position:], 0
                if more := file.read(max(_CHUNK, len(text))):
                    text += more
                    continue
                raise UserError(f"{path}, row {number}: not valid JSON: {error}") from None
            yield number, row
            number, after_row = number + 1, True


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def fill(template: str, row: Mapping[str, Any], location: str, key: str) -> Any:
    """Put a row's fields into a template: `{question}` stands for a field, `{{` and `}}` for braces.

    A template that is a single lone field gives that field's value as it is. key: the setting that holds the template,
    for errors.
    """
    if (lone := _FIELD.fullmatch(template)) and lone[1]:
        return _field(row, lone[1], location, key)

    def put(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else str(_field(row, match[1], location, key))

    return _FIELD.sub(put, template)


def _field(row: Mapping[str, Any], name: str, location: str, key: str) -> Any:
    if name not in row:
        raise UserError(f"{location}: {key} asks for field '{name}', which the row lacks{nearest(name, list(row))}")
    return row[name]
