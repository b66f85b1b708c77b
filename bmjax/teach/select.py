"""Sorts collected traces into one training set per domain and counts, by reason, what was dropped.

The kept rows are ordered by their ids, so the result does not depend on the order in which a collector happened to
receive them. Records stay on disk: only ids, hashes and file offsets are held in memory.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bmjax.chat.reasoning import has_tags
from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.io.jsonl import write_jsonl
from bmjax.log import Log, silent
from bmjax.teach.decontaminate import HeldOut, digest
from bmjax.teach.record import TRACES, Record, indexed_records, normalise_prompt
from bmjax.teach.settings import SelectSettings

REASONS = ("duplicate", "truncated", "malformed", "wrong", "right", "unjudged", "too long", "held out", "enough")
SELECTION = "selection.json"

Table = dict[str, dict[str, int]]


def select(settings: SelectSettings, log: Log = silent) -> Table:
    """Write OUTPUT/DOMAIN.jsonl for every domain of the traces, and the table of counts, OUTPUT/selection.json.

    A dataset row has prompt, reasoning, response, reference and id.

    Returns:
        {domain: {"kept": n, reason: n, ...}} with the reasons of REASONS.

    Raises:
        UserError: for missing or unreadable traces, and for a domain of which nothing is left. Then nothing is written.
    """
    files = _trace_files(settings.traces)
    index = sorted((record.id, number, offset, record.domain) for number, offset, record in _all_records(files))
    if not index:
        raise UserError(f"traces: {', '.join(map(str, files))} holds no record; run `bmjax collect` first")
    held_out = HeldOut(settings.held_out, settings.held_out_prompt, settings.ngram)
    table: Table = {}
    chosen: dict[str, list[tuple[int, int]]] = {}
    for domain in sorted({entry[3] for entry in index}):
        _check_file_name(domain)
        entries = [(number, offset) for _, number, offset, trace_domain in index if trace_domain == domain]
        chosen[domain], table[domain] = _sift(files, entries, settings, held_out)
        if not chosen[domain]:
            dropped = ", ".join(f"{reason} {n}" for reason, n in table[domain].items() if n and reason != "kept")
            raise UserError(f"domain '{domain}': none of {len(entries)} traces is left to train on ({dropped})")
    for domain, kept in chosen.items():
        write_jsonl(Path(settings.output) / f"{domain}.jsonl", map(_dataset_row, _records_at(files, kept)))
        log(f"select {domain}: {len(kept)} of {sum(table[domain].values())} traces kept")
    write_atomic(Path(settings.output) / SELECTION, json.dumps(table, indent=1) + "\n")
    return table


def render_table(table: Table) -> str:
    """Render the table as text: a row for each domain, a column for each reason that occurs."""
    reasons = [reason for reason in REASONS if any(row.get(reason) for row in table.values())]
    header = ["domain", "traces", "kept", *reasons]
    rows = [header]
    for domain, counts in table.items():
        total = sum(counts.values())
        kept = f"{counts['kept']} ({100 * counts['kept'] / total:.0f}%)" if total else "0"
        rows.append([domain, str(total), kept, *(str(counts.get(reason, 0)) for reason in reasons)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for cells in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def drop_reason(record: Record, settings: SelectSettings) -> str | None:
    """Return why a record is not worth training on (truncated, malformed, its verdict, too long), or None."""
    if record.finish_reason == "length":
        return "truncated"
    if not well_formed(record, settings.require_reasoning):
        return "malformed"
    if record.verdict not in settings.keep:
        return record.verdict if record.verdict in REASONS else "unjudged"
    tokens = record.usage.get("completion_tokens")
    if settings.max_tokens is not None and isinstance(tokens, int) and tokens > settings.max_tokens:
        return "too long"
    characters = len(record.prompt) + len(record.reasoning) + len(record.response)
    if settings.max_characters is not None and characters > settings.max_characters:
        return "too long"
    return None


def well_formed(record: Record, require_reasoning: bool = True) -> bool:
    """Return whether a reply was exactly one <think>...</think> followed by a non-empty answer."""
    tagged = has_tags(record.reasoning, record.response)
    return not tagged and bool(record.response.strip()) and (bool(record.reasoning.strip()) or not require_reasoning)


def _dataset_row(record: Record) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("prompt", "reasoning", "response", "reference", "id")}


def _sift(
    files: Sequence[Path], entries: Sequence[tuple[int, int]], settings: SelectSettings, held_out: HeldOut
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Return the entries to keep of a domain, and its counts. Of several reasons the first is counted."""
    kept: list[tuple[int, int]] = []
    counts = dict.fromkeys(("kept", *REASONS), 0)
    seen: set[bytes] = set()
    of_prompt: dict[bytes, int] = {}
    for entry, record in zip(entries, _records_at(files, entries), strict=True):
        prompt = digest(normalise_prompt(record.prompt))
        marks = {b"id" + digest(record.id), b"text" + digest(prompt.hex() + record.reasoning + "\0" + record.response)}
        reason = "duplicate" if marks & seen else drop_reason(record, settings)
        seen |= marks
        if reason is None and held_out.overlaps(record.prompt):
            reason = "held out"
        if reason is None and settings.per_prompt is not None and of_prompt.get(prompt, 0) >= settings.per_prompt:
            reason = "enough"
        if reason is None:
            of_prompt[prompt] = of_prompt.get(prompt, 0) + 1
            kept.append(entry)
        counts[reason or "kept"] += 1
    return kept, counts


def _trace_files(traces: str | list[str]) -> list[Path]:
    names = [traces] if isinstance(traces, str) else traces
    files = [Path(name) / TRACES if Path(name).is_dir() else Path(name) for name in names]
    if not files:
        raise UserError("traces: found an empty list, expected at least one file")
    return files


def _all_records(files: Sequence[Path]) -> Iterator[tuple[int, int, Record]]:
    for number, path in enumerate(files):
        for offset, record in indexed_records(path):
            yield number, offset, record


def _records_at(files: Sequence[Path], entries: Sequence[tuple[int, int]]) -> Iterator[Record]:
    handles = [path.open("rb") for path in files]
    try:
        for number, offset in entries:
            handles[number].seek(offset)
            yield Record.from_json(json.loads(handles[number].readline()))
    finally:
        for handle in handles:
            handle.close()


def _check_file_name(domain: str) -> None:
    if not re.fullmatch(r"[\w][\w .+-]*", domain):
        raise UserError(f"domain '{domain}': cannot name a file; use letters, digits, - and _")
