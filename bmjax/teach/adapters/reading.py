"""Reads rows of known data sets as problems: recognises their form, maps them, and counts what makes no problem.

Collecting, evaluation and the pipeline read problems through here where the setting `adapter` is given.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from bmjax.config import UserError, first_line, nearest
from bmjax.io.rows import Row, fill
from bmjax.log import Log, write_line
from bmjax.teach.adapters.adapter import UNREADABLE, Adapter, LeftOut
from bmjax.teach.adapters.table import ADAPTERS, AUTO

Problem = dict[str, Any]  # prompt, question (without the instruction), reference, judge, source, domain


def adapted(
    rows: Iterable[Row],
    name: str,
    key: str,
    prompt: str | None = None,
    reference: str | None = None,
    instruction: str | None = None,
    log: Log = write_line,
) -> Iterator[tuple[str, Mapping[str, Any], Problem]]:
    """Yield (location, row, problem) of every row that makes a problem.

    Arguments:
        rows: (location, row) each.
        name: of the adapter, or `auto`: the first that reads a row, said in one line.
        key: the setting that names the rows, for errors and lines of the log.
        prompt, reference: templates that win over the adapter; an empty `reference` asks without one.
        instruction: what follows the question in place of the adapter's; empty for nothing.
        log: takes one line for a form that was recognised, and one for the rows that were left out, by reason.

    Raises:
        UserError: for a row that the adapter, or none, can read, and when no row makes a problem.
    """
    adapter = None if name == AUTO else ADAPTERS[name]
    columns: frozenset[str] = frozenset()
    left_out: Counter[str] = Counter()
    count = 0
    try:
        for location, row in rows:
            if name == AUTO and (frozenset(row) != columns or adapter is None or not adapter.reads(row)):
                columns = frozenset(row)
                recognised = _recognised(row, location, adapter)
                if recognised is not adapter:
                    log(f"{location}: adapter: {recognised.name}, recognised by its columns")
                adapter = recognised
            assert adapter is not None
            if not adapter.has_columns(row):
                raise UserError(f"{location}: {_difference(adapter, row)}")
            count += 1
            try:
                problem = _problem(adapter, row, location, prompt, reference, instruction)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            except UNREADABLE as error:
                raise UserError(f"{location}: not a row for adapter '{adapter.name}': {first_line(error)}") from None
            yield location, row, problem
    finally:
        if left_out:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in left_out.most_common())
            log(f"{key}: {left_out.total():,} of {count:,} rows make no problem: {reasons}")
    if count and left_out.total() == count:
        raise UserError(f"{key}: none of {count:,} rows makes a problem ({', '.join(left_out)}); check key 'adapter'")


def matching(rows: Iterable[Row], only: Mapping[str, Any], key: str, log: Log = write_line) -> Iterator[Row]:
    """Yield the rows whose fields have one of the values that the setting `only` names, and say how many others.

    Raises:
        UserError: for a row without such a field, and when no row matches.
    """
    wanted = {name: [str(v) for v in (value if isinstance(value, list) else [value])] for name, value in only.items()}

    def matches(location: str, row: Mapping[str, Any]) -> bool:
        for name in wanted:
            if name not in row:
                raise UserError(f"{location}: only: the row has no field '{name}'{nearest(name, list(row))}")
        return all(str(row[name]) in values for name, values in wanted.items())

    return _filtered(rows, matches, "only", f"matches only: {dict(only)}", key, log)


def within(
    rows: Iterable[Row], between: Mapping[str, tuple[Any, Any]], key: str, log: Log = write_line
) -> Iterator[Row]:
    """Yield the rows whose fields lie in the ranges that the setting `between` names, and say how many others.

    Arguments:
        rows: (location, row) each.
        between: [from, to] by field, both included; numbers, or texts such as dates, of which `to` includes all that
            begins with it: [2024-08-01, 2025-02-01].

    Raises:
        UserError: for a row without such a field, or with another kind of value, and when no row lies there.
    """
    ranges = ", ".join(f"{name} [{low}, {high}]" for name, (low, high) in between.items())

    def lies_within(location: str, row: Mapping[str, Any]) -> bool:
        return all(lies_in(row, name, low, high, location) for name, (low, high) in between.items())

    return _filtered(rows, lies_within, "between", f"lies in between: {ranges}", key, log)


def _filtered(
    rows: Iterable[Row], keeps: Callable[[str, Mapping[str, Any]], bool], setting: str, kept: str, key: str, log: Log
) -> Iterator[Row]:
    """Yield the rows that `keeps` wants by (location, row), and say how many others the setting leaves out.

    kept: what such a row does, in words. UserError when no row does.
    """
    count = matched = 0
    try:
        for location, row in rows:
            count += 1
            if keeps(location, row):
                matched += 1
                yield location, row
    finally:
        if count > matched > 0:
            log(f"{key}: {count - matched:,} of {count:,} rows left out by '{setting}'")
    if count and not matched:
        raise UserError(f"{key}: none of {count:,} rows {kept}")


def lies_in(row: Mapping[str, Any], name: str, low: Any, high: Any, location: str) -> bool:
    """Return whether a field of a row lies in [low, high], see `within`. UserError for a field of another kind."""
    value = row.get(name)
    value = value.isoformat() if isinstance(value, date) else value  # as Parquet holds dates
    if isinstance(low, str) and isinstance(high, str):
        if not isinstance(value, str):
            raise UserError(f"{location}: between: field '{name}' is missing or no text")
        return low <= value and (value <= high or value.startswith(high))
    try:
        return float(low) <= float(value) <= float(high)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{location}: between: field '{name}' is missing or no number") from None


def _problem(
    adapter: Adapter,
    row: Mapping[str, Any],
    location: str,
    prompt: str | None,
    reference: str | None,
    instruction: str | None,
) -> Problem:
    """Return the problem that an adapter, or the templates in its stead, make of a row."""
    if prompt is None:
        question: Any = adapter.prompt(row)
        text = question
        ending = adapter.instruction(row) if instruction is None else instruction
        if ending and ending not in text and not ("\\boxed{}" in text and "\\boxed{}" in ending):
            text = f"{text}\n\n{ending}"
    else:
        text = question = fill(prompt, row, location, "prompt")
    problem: Problem = {"prompt": text, "question": question}
    if reference is None:
        problem |= {"reference": adapter.reference(row), "judge": adapter.judge(row)}
    else:
        problem |= {"reference": fill(reference, row, location, "reference") if reference else None, "judge": None}
    return problem | {"source": adapter.source_of(row), "domain": adapter.domain}


def _recognised(row: Mapping[str, Any], location: str, last: Adapter | None) -> Adapter:
    """Return the first adapter that reads a row; the last one where none does and the row has its columns."""
    adapter = next((adapter for adapter in ADAPTERS.values() if adapter.reads(row)), None)
    if adapter is None and last is not None and last.has_columns(row):
        return last
    if adapter is None:
        raise UserError(
            f"{location}: no adapter knows a row with columns {_names(list(row))}; give `prompt` and `reference` "
            f"templates, or one of adapter: {', '.join(ADAPTERS)}"
        )
    return adapter


def _difference(adapter: Adapter, row: Mapping[str, Any]) -> str:
    """Say which columns an adapter expects, which a row has, and which adapter would read it."""
    other = next((other.name for other in ADAPTERS.values() if other.reads(row)), None)
    hint = f"adapter '{other}' reads it" if other else "give `prompt` and `reference` templates"
    expected = " or ".join(_names(columns) for columns in adapter.columns)
    return f"adapter '{adapter.name}' expects the columns {expected}, found {_names(list(row))}; {hint}"


def _names(columns: Sequence[str]) -> str:
    return ", ".join(map(str, columns[:8])) + (", ..." if len(columns) > 8 else "")
