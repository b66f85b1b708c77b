"""Sorts collected traces into one training set per domain and counts, by reason, what was dropped.

The kept rows are ordered by their ids, so the result does not depend on the order in which a collector happened to
receive them. Rows wait on disk for their order: only ids, hashes and file offsets are held in memory.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from bmjax.chat.reasoning import has_tags
from bmjax.config import UserError
from bmjax.io.atomic import writable, write_atomic
from bmjax.io.jsonl import json_line, write_jsonl
from bmjax.log import Log, silent
from bmjax.teach.decontaminate import HeldOut, digest
from bmjax.teach.record import Record, normalise_prompt, read_records, trace_files
from bmjax.teach.settings import SelectSettings

REASONS = ("duplicate", "truncated", "malformed", "wrong", "right", "unjudged", "too long", "held out", "enough")
SELECTION = "selection.json"

Table = dict[str, dict[str, int]]


class Trace(NamedTuple):
    """What decides about a record. reason: why it is dropped whatever else there is. offset: of its row on disk."""

    id: str
    domain: str
    reason: str | None
    prompt: bytes
    text: bytes
    offset: int


def select(settings: SelectSettings, log: Log = silent) -> Table:
    """Write OUTPUT/DOMAIN.jsonl for every domain of the traces, and the table of counts, OUTPUT/selection.json.

    A dataset row has prompt, reasoning, response, reference and id.

    Returns:
        {domain: {"kept": n, reason: n, ...}} with the reasons of REASONS.

    Raises:
        UserError: for missing or unreadable traces, and for a domain of which nothing is left. Then nothing is written.
    """
    output, sources = Path(settings.output), trace_files(settings.traces)
    folder = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    with writable(output), tempfile.TemporaryFile(dir=folder) as rows:
        traces = sorted(_read_traces(sources, settings, rows), key=lambda trace: trace.id)
        if not traces:
            raise UserError(f"traces: {', '.join(sources)} holds no record; run `bmjax collect` first")
        table: Table = {}
        chosen: dict[str, list[Trace]] = {}
        for domain in sorted({trace.domain for trace in traces}):
            if not re.fullmatch(r"[\w][\w .+-]*", domain):
                raise UserError(f"domain '{domain}': cannot name a file; use letters, digits, - and _")
            of_domain = [trace for trace in traces if trace.domain == domain]
            chosen[domain], table[domain] = _sift(of_domain, settings.per_prompt)
            if not chosen[domain]:
                dropped = ", ".join(f"{reason} {n}" for reason, n in table[domain].items() if n and reason != "kept")
                raise UserError(f"domain '{domain}': none of {len(of_domain)} traces is left to train on ({dropped})")
        for domain, kept in chosen.items():
            write_jsonl(output / f"{domain}.jsonl", _rows_at(rows, kept))
            log(f"select {domain}: {len(kept)} of {sum(table[domain].values())} traces kept")
    write_atomic(output / SELECTION, json.dumps(table, indent=1) + "\n")
    return table


def _read_traces(sources: Iterable[str], settings: SelectSettings, rows: IO[bytes]) -> Iterator[Trace]:
    """Yield what decides about every record, and write the dataset rows of those that may be kept."""
    held_out = HeldOut(settings.held_out, settings.held_out_prompt, settings.ngram)
    for record in read_records(*sources, key="traces"):
        reason = _drop_reason(record, settings)
        if reason is None and held_out.overlaps(record.prompt):
            reason = "held out"
        prompt = digest(normalise_prompt(record.prompt))
        text = digest(prompt.hex() + record.reasoning + "\0" + record.response)
        yield Trace(record.id, record.domain, reason, prompt, text, rows.tell())
        if reason is None:
            names = ("prompt", "reasoning", "response", "reference", "id")
            rows.write(json_line({name: getattr(record, name) for name in names}))


def _drop_reason(record: Record, settings: SelectSettings) -> str | None:
    """Return why a record is not worth training on (truncated, malformed, its verdict, too long), or None."""
    if record.finish_reason == "length":
        return "truncated"
    # Well-formed is exactly one <think>...</think> followed by an answer that is not empty.
    reasoned = bool(record.reasoning.strip()) or not settings.require_reasoning
    if has_tags(record.reasoning, record.response) or not record.response.strip() or not reasoned:
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


def _sift(traces: Iterable[Trace], per_prompt: int | None) -> tuple[list[Trace], dict[str, int]]:
    """Return the traces to keep of a domain, and its counts. Of several reasons the first is counted."""
    kept: list[Trace] = []
    counts = dict.fromkeys(("kept", *REASONS), 0)
    seen: set[str | bytes] = set()
    of_prompt: dict[bytes, int] = {}
    for trace in traces:
        reason = "duplicate" if {trace.id, trace.text} & seen else trace.reason
        seen |= {trace.id, trace.text}
        if reason is None and per_prompt is not None and of_prompt.get(trace.prompt, 0) >= per_prompt:
            reason = "enough"
        if reason is None:
            of_prompt[trace.prompt] = of_prompt.get(trace.prompt, 0) + 1
            kept.append(trace)
        counts[reason or "kept"] += 1
    return kept, counts


def _rows_at(rows: IO[bytes], traces: Iterable[Trace]) -> Iterator[dict[str, Any]]:
    for trace in traces:
        rows.seek(trace.offset)
        yield json.loads(rows.readline())


def render_table(table: Table) -> str:
    """Render the table as text: a row for each domain, a column for each reason that occurs."""
    reasons = [reason for reason in REASONS if any(row.get(reason) for row in table.values())]
    rows = [["domain", "traces", "kept", *reasons]]
    for domain, counts in table.items():
        total = sum(counts.values())
        kept = f"{counts['kept']} ({100 * counts['kept'] / total:.0f}%)" if total else "0"
        rows.append([domain, str(total), kept, *(str(counts.get(reason, 0)) for reason in reasons)])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows)
