"""Rows of data: the only reader of files and hub data sets, for every key that takes rows.

Files are told apart by their content, whatever they are called, and read row by row, so that none need fit in memory.
A row keeps the name of its file and its number, which every error about it begins with.
"""

import codecs
import csv
import functools
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from bmjax.config import UserError, first_line, nearest, read_text
from bmjax.io import bucket, hub
from bmjax.io.jsonl import parse_lines
from bmjax.log import Log, write_line
from bmjax.urls import url_of

Row = tuple[str, dict[str, Any]]  # ("FILE, row N", the row)

FORMS = "JSON Lines, a JSON array, CSV with a header, Parquet or Arrow; each may be packed by gzip or zstd"
_BRACES = re.compile(r"\{\{|\}\}|\{\}|\{([^{}]+)\}|[{}]")
_SPACE = re.compile(r"\s*")
_COLUMN = re.compile(r"[\w.()/-]+(?: [\w.()/-]+){0,2}")  # a heading, not a sentence
_CHUNK = 2**20  # how much of a JSON array or of a Parquet column is read at a time
_HEAD = 2**16  # bytes that tell the form of a file
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_NOT_ROWS = re.compile(
    r"(?:dataset_infos?|dataset_dict|state)\.json|cache-[0-9a-f]+.*\.arrow"
)  # beside saved data sets
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|dev|eval)(?=[/_.-])")


def read_rows(data: str | Path | Sequence[str | Path], key: str = "data", log: Log = write_line) -> Iterator[Row]:
    """Yield (location, row) of every row, file after file.

    Arguments:
        data: one or several of: a file of JSON Lines, a JSON array, CSV with a header, Parquet or Arrow, each also
            packed by gzip or zstd; a folder or a pattern (`*`, `?`, `**`) of such files, read in the order of their
            names; a hub data set `org/name`, `org/name:subset` or `org/name:subset:split` (without a split, `train`).
        key: the setting that named the data, for errors.
        log: takes a line for what was replaced or left out.

    Raises:
        UserError: for a missing file, a row that is no JSON object, and data without a single row.
    """
    names = [data] if isinstance(data, (str, Path)) else list(data)
    empty = True
    for name in names:
        for row in read_source(str(name), key, log):
            empty = False
            yield row
    if empty:
        raise UserError(f"{key}: {', '.join(map(str, names)) or 'an empty list'}: no rows; expected at least one")


def read_source(name: str, key: str = "data", log: Log = write_line, growing: bool = False) -> Iterator[Row]:
    """Yield (location, row) of what one name means, maybe none; arguments as of `read_rows`.

    growing: whether JSON Lines may end in a torn line, which a killed writer left; it is skipped.
    """
    sources: list[tuple[str, Iterator[tuple[int, Any]]]]
    if hub.is_dataset_id(name):
        sources = [(name, enumerate(hub.dataset_rows(name, key), 1))]
    else:
        # Errors name a file as the user did, and the files of a folder by their paths.
        label = None if _is_many(name) else name
        files = files_of(name, log)
        sources = [(label or bucket.name_of(file), _read_file(file, log, growing)) for file in files]
    for source, rows in sources:
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{source}, row {number}: expected a JSON object, found {type(row).__name__}")
            yield f"{source}, row {number}", row


def _is_many(name: str) -> bool:
    if url_of(name):
        return bucket.is_folder(name) or any(character in name for character in "*?[")
    path = Path(name).expanduser()
    return path.is_dir() or (not path.exists() and any(character in name for character in "*?["))


def is_here(name: str) -> bool:
    """Return whether a name means files of this machine or of a bucket that exist, not a hub data set."""
    path = Path(name).expanduser()
    return bucket.exists(name) if url_of(name) else path.exists() or bool(glob.glob(str(path), recursive=True))


def files_of(name: str, log: Log = write_line) -> list[Path]:
    """Return the files that a name means: itself, those of a folder, or those that match a pattern.

    Arguments:
        name: a file, a folder, or a pattern; `~` is the home directory. Those of a bucket's URL are copied here.
        log: takes a line for files of a folder that hold no rows.

    Raises:
        UserError: when there is no such file.
    """
    path = Path(name).expanduser()
    if url := url_of(name):
        if not bucket.is_folder(name):
            return sorted(bucket.fetch(name), key=_natural)
        inside = [bucket.mirror(bucket.join(url, inner)) for inner in bucket.names_in(url)]
        files = _files_of_rows(bucket.mirror(url), sorted(inside, key=_natural), name, log)
        chosen = {str(file.relative_to(bucket.mirror(url))) for file in files}
        if chosen:
            bucket.fetch(url, lambda inner: inner in chosen)
    elif not _is_many(name):
        if not path.is_file():
            read_text(path)  # says what is wrong, and names what is near
        return [path]
    elif path.is_dir():
        inside = [file for file in sorted(path.rglob("*"), key=_natural) if file.is_file()]
        files = _files_of_rows(path, inside, name, log)
    else:
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        files.sort(key=_natural)
    if not files:
        raise UserError(f"{name}: no file of rows {'in it' if path.is_dir() else 'matches'}; expected {FORMS}")
    return files


def _files_of_rows(folder: Path, inside: Iterable[Path], name: str, log: Log) -> list[Path]:
    """Return those of the files in a folder that hold rows to train on; a line says which do not."""
    visible = [file for file in inside if not any(p.startswith((".", "_")) for p in file.relative_to(folder).parts)]
    files = [file for file in visible if hub.is_data_file(file) and not _NOT_ROWS.fullmatch(file.name)]
    # Of a folder with splits, as data sets are saved and published, the rows to train on.
    splits = {file: _SPLIT.search(str(file.relative_to(folder))) for file in files}
    of_splits = {split[1] for split in splits.values() if split}
    if len(of_splits) > 1 and "train" in of_splits:
        files = [file for file, split in splits.items() if split and split[1] == "train"]
    if left_out := [str(file.relative_to(folder)) for file in visible if file not in files]:
        log(f"{name}: left out, not rows to train on: {', '.join(left_out[:5])}{' ...' if left_out[5:] else ''}")
    return files


def _natural(path: Path) -> list[Any]:
    """Return a key that sorts shard-10 behind shard-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _read_file(path: Path, log: Log, growing: bool) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row); the number of a row of JSON Lines is its line's."""
    name = bucket.name_of(path)
    try:
        with ExitStack() as stack:
            file = _unpacked(path, stack)
            head = file.peek(_HEAD)
            if head.startswith(b"PAR1"):
                yield from _read_parquet(name, file)
            elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
                yield from _read_arrow(name, file, head.startswith(b"ARROW1"))
            elif head.startswith(b"version https://git-lfs"):
                raise UserError(f"{name}: a pointer of Git LFS, not the file; fetch it: git lfs pull")
            elif head.startswith((b"PK\x03\x04", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
                raise UserError(f"{name}: an archive; unpack it: expected {FORMS}")
            else:
                encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
                start = head.decode(encoding, "ignore")
                first = start.lstrip()[:1]
                if start.lstrip().partition("\n")[0].strip() == "{":
                    raise UserError(f"{name}: a JSON object over several lines; expected {FORMS}")
                text = io.TextIOWrapper(file, encoding=encoding, newline="\n" if first in ("{", "[", "") else "")
                if first == "[":
                    yield from _without_surrogates(name, _json_array(name, text, text.read(_CHUNK)), log)
                elif first in ("{", ""):
                    # Lines of bytes: a writer may have been killed within a character of the last one.
                    lines = text if encoding == "utf-16" else _bytes_after_mark(text.detach())
                    yield from _without_surrogates(name, parse_lines(lines, name, growing), log)
                else:
                    yield from _read_csv(name, text, start)
    except UnicodeError:
        raise UserError(f"{name}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be unpacked: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or first_line(error)}") from None


def _bytes_after_mark(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file, the first without a byte-order mark."""
    for number, line in enumerate(file):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _unpacked(path: Path, stack: ExitStack) -> io.BufferedReader:
    """Open a file for reading, unpacked where its first bytes are gzip's or zstd's."""
    file = stack.enter_context(path.open("rb"))
    head = file.peek(4)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=file)), _HEAD)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        stream = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
        return io.BufferedReader(stream, _HEAD)
    return file


def _json_array(name: str, file: IO[str], text: str) -> Iterator[tuple[int, Any]]:
    """Decode a JSON array row by row. `text` begins with the opening bracket; the file holds the rest."""
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
            raise UserError(f"{name}: not valid JSON: text follows the closing bracket")
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
            raise UserError(f"{name}, row {number}: not valid JSON: {error}") from None
        yield number, row
        number, after_row = number + 1, True


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _without_surrogates(name: str, rows: Iterator[tuple[int, Any]], log: Log) -> Iterator[tuple[int, Any]]:
    """Replace halves of surrogate pairs, which JSON can escape and no tokenizer can encode, and count the rows."""
    replaced = 0
    for number, row in rows:
        if not _is_valid(row):
            replaced += 1
            row = _valid_text(row)
        yield number, row
    if replaced:
        log(f"{name}: {replaced} rows hold halves of surrogate pairs, replaced by U+FFFD")


def _is_valid(value: Any) -> bool:
    if isinstance(value, str):
        if value.isascii():
            return True
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, dict):
        return all(map(_is_valid, value)) and all(map(_is_valid, value.values()))
    return all(map(_is_valid, value)) if isinstance(value, list) else True


def _valid_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {_valid_text(key): _valid_text(inner) for key, inner in value.items()}
    return [_valid_text(inner) for inner in value] if isinstance(value, list) else value


def _read_csv(name: str, file: IO[str], start: str) -> Iterator[tuple[int, Any]]:
    """Read a table by its header. An empty cell is null. Raises UserError for a text that is no table."""
    is_named = {".csv", ".tsv"} & {*Path(name).suffixes}
    header = start.lstrip("\ufeff").lstrip("\r\n").splitlines()[0]
    delimiter = max(",\t;", key=header.count)
    columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter), [])]
    names = [column for column in columns if column]  # pandas leaves the name of its index empty
    is_table = len({*names}) == len(names) >= 1 if is_named else len({*names}) == len(columns) >= 2
    if not is_table or not (is_named or all(map(_COLUMN.fullmatch, columns))):
        raise UserError(f"{name}: not a form of rows that is known; expected {FORMS}")
    csv.field_size_limit(sys.maxsize)
    # Quotes within a cell are text where tabs part the cells.
    rows = filter(None, csv.reader(file, delimiter=delimiter, strict=delimiter != "\t"))
    next(rows)
    try:
        for number, cells in enumerate(rows, 1):
            if len(cells) != len(columns):
                raise UserError(f"{name}, row {number}: {len(cells)} cells, the header has {len(columns)}")
            yield number, {name: cell or None for name, cell in zip(columns, cells, strict=True) if name}
    except csv.Error as error:
        raise UserError(f"{name}: not valid CSV: {error}") from None


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK) as table:
            rows = (without_nulls(row) for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file: {first_line(error)}") from None


def _read_arrow(name: str, file: IO[bytes], is_file: bool) -> Iterator[tuple[int, Any]]:
    """Read Arrow's file form, or its stream form, which data sets are saved in."""
    from pyarrow import ArrowException, ipc

    try:
        if is_file:
            reader = ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(file))
        rows = (
            without_nulls(row)
            for batch in batches
            for start in range(0, len(batch), 256)
            for row in batch[start : start + 256].to_pylist()
        )
        yield from enumerate(rows, 1)
    except ArrowException as error:
        raise UserError(f"{name}: not a readable Arrow file: {first_line(error)}") from None


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table without keys of nested structures whose value is null.

    A table has one schema, so a structure that lacks a key holds null there: an argument that only other calls of a
    tool have. Rows of JSON hold what their author wrote, and keep their nulls.
    """

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tidy(inner) for key, inner in value.items() if inner is not None}
        return [tidy(inner) for inner in value] if isinstance(value, list) else value

    return {key: tidy(value) for key, value in row.items()}


def mapped(rows: Iterable[Row], templates: Mapping[str, str], kept: Collection[str] = ()) -> Iterator[Row]:
    """Yield rows with fields that templates make of those of `rows`, see `fill`; without templates, as they are.

    kept: fields of `rows` that stay in a row beside those, unless a template takes them up.
    """
    kept = [key for key in kept if not any(f"{{{key}}}" in text for text in templates.values())]
    for location, row in rows:
        if templates:
            fields = {key: fill(text, row, location, key) for key, text in templates.items()}
            row = {key: row[key] for key in kept if key in row} | fields
        yield location, row


def fill(template: str, row: Mapping[str, Any], location: str, key: str) -> Any:
    """Put a row's fields into a template. The values of fields are text, never templates themselves.

    `{question}` stands for a field, `{extra.question}` for one inside it, `{choices.0}` for an item of a list; spaces
    around the name do not count. `{{` and `}}` stand for braces, and `{}` for itself.

    Arguments:
        template: the text; one that is a single field gives that field's value as it is.
        row, location: the row and where it stands.
        key: the setting that holds the template, for errors.

    Raises:
        UserError: when the row has no such field, and for a brace that is none of the above.
    """
    parts = _parse_template(template)
    if len(parts) == 1 and parts[0][0] == "field":
        return _field(row, parts[0][1], location, key)
    texts = []
    for kind, text in parts:
        if kind in ("{", "}"):
            raise UserError(f"{location}: {key} has a single '{kind}' in {text!r}; write {kind * 2} for a brace")
        value = _field(row, text, location, key) if kind == "field" else text
        if value is None:
            raise UserError(f"{location}: {key} asks for field '{text}', which is null in this row")
        texts.append(str(value))
    return "".join(texts)


def refuse_shown_reference(prompt: str, reference: str, value: Any, location: str, key: str) -> None:
    """Raise UserError when the template of a prompt shows a field that the reference's template is made of.

    value: the row's reference. Tests, a list or a mapping, may be shown: they are no answer. key: of the prompt.
    """
    shared = [] if isinstance(value, (list, dict)) else shared_fields(prompt, reference)
    if shared:
        raise UserError(
            f"{location}: {key} shows field '{shared[0]}', which the reference is made of: it tells the answer; "
            "write {{ and }} for braces that are meant"
        )


@functools.lru_cache(maxsize=64)
def shared_fields(first: str, second: str) -> list[str]:
    """Return the fields of one template that another one asks for too, whole or in part."""
    paths = [
        [_path(text) for kind, text in _parse_template(template) if kind == "field"] for template in (first, second)
    ]
    shorter = [(a, min(len(a), len(b)), b) for a in paths[0] for b in paths[1]]
    return [".".join(a) for a, length, b in shorter if a[:length] == b[:length]]


@functools.lru_cache(maxsize=1024)
def _parse_template(template: str) -> tuple[tuple[str, str], ...]:
    """Return the parts of a template: ("text", literal), ("field", name), and a lone brace with its context."""
    parts, end = [], 0
    for match in _BRACES.finditer(template):
        parts.append(("text", template[end : match.start()]))
        end = match.end()
        if match[1] is not None:
            parts.append(("field", match[1]))
        else:
            literal = {"{{": "{", "}}": "}", "{}": "{}"}.get(match[0])
            context = template[max(end - 20, 0) : end + 20]
            parts.append((match[0], context) if literal is None else ("text", literal))
    parts.append(("text", template[end:]))
    return tuple(part for part in parts if part[1])


def _path(name: str) -> list[str]:
    return re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")


def _field(row: Mapping[str, Any], name: str, location: str, key: str) -> Any:
    """Return a column of any name, or what a dotted path leads to; None behind a null."""
    for column in (name, name.strip()):
        if column in row:
            return row[column]
    value: Any = row
    for step in _path(name):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, (list, tuple)) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif value is None:
            return None
        else:
            hint = nearest(name.strip(), [*dict.fromkeys(_names(row))][:200])
            raise UserError(
                f"{location}: {key} asks for field '{name[:80]}', which the row lacks{hint}; write {{{{ and }}}} for "
                "braces that are meant"
            )
    return value


def _names(value: Any, prefix: str = "", depth: int = 3) -> Iterator[str]:
    """Yield the dotted names of the fields of a row."""
    for name, inner in value.items() if isinstance(value, Mapping) and depth else ():
        yield f"{prefix}{name}"
        yield from _names(inner, f"{prefix}{name}.", depth - 1)
