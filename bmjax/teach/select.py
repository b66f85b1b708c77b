"""Sorts collected traces into one training set per domain and counts, by reason, what was dropped.

First every trace is looked at by itself, and what is known of it is entered in a ledger on disk; this work can be
shared among machines. Then the ledger decides what needs all of them: copies, pass rates, the best of a prompt, quotas.
Neither depends on the order of the traces. Rows wait on disk, so the memory does not grow with the data.
"""

import contextlib
import itertools
import json
import os
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line, nearest
from bmjax.io import bucket
from bmjax.io.atomic import replacing, replacing_file, writable, write_atomic
from bmjax.io.jsonl import compact_line, write_jsonl
from bmjax.io.states import data_states
from bmjax.log import Log, progress_bar, silent
from bmjax.teach.decontaminate import REPORT, Decontamination
from bmjax.teach.judges.answer import last_boxed
from bmjax.teach.record import Record, is_whole, normalise_prompt, trace_files
from bmjax.teach.selection.card import (
    Examples,
    Table,
    causes_of,
    data_card,
    excerpt,
    identity,
    render_examples,
    render_table,
)  # fmt: skip
from bmjax.teach.selection.ledger import Ledger, Trace
from bmjax.teach.selection.questions import digest, near_duplicates, question_digest
from bmjax.teach.selection.rules import REASONS, Drop, Rules
from bmjax.teach.settings import SelectSettings, domain_problem
from bmjax.teach.traces import read_traces

__all__ = ["REASONS", "render_examples", "render_table", "select"]
SELECTION, EXAMPLES, CARD, PARTS = "selection.json", "examples.json", "README.md", "parts"
_ROWS, _LEDGER, _PART = "rows.jsonl", "ledger.sqlite", "part.json"  # of a part
_FIELDS = ("prompt", "reasoning", "response", "reference", "id")  # of a dataset row
_BATCH = 2**18  # characters of traces that are looked at together
_EXAMPLES = 3  # of every rule, for the report

Census = Counter[tuple[str, str, str]]


def select(settings: SelectSettings, log: Log = silent) -> Table:
    """Write OUTPUT/DOMAIN.jsonl for every domain of the traces, and what became of the others.

    OUTPUT/selection.json is the table of counts, examples.json has examples of every rule, README.md is the data card,
    contamination.jsonl tells every question of a test that was met. A dataset row has prompt, reasoning, response,
    reference and id. With `shard`, only OUTPUT/parts/I-of-N is written; `join` makes the data sets of all parts.

    Returns:
        {domain: {"kept": n, reason: n, ...}} with the reasons of REASONS. For a part, what each trace tells by itself.

    Raises:
        UserError: for missing or unreadable traces, for parts that do not belong together, and for a domain of which
            nothing is left. Then nothing is written.
    """
    try:
        return _select(settings, log)
    except sqlite3.OperationalError as error:  # a full disk has no name of its own there
        hint = "free some space, or write to another place"
        raise UserError(f"{settings.output}: cannot be written: {first_line(error)}; {hint}") from None


def _select(settings: SelectSettings, log: Log) -> Table:
    output = Path(settings.output)
    sources, decontamination = trace_files(settings.traces), Decontamination(settings)
    if settings.shard is not None:
        number, parts = settings.shard
        with replacing(output / PARTS / f"{number}-of-{parts}") as folder:
            table = _read(settings, decontamination, sources, folder, log)
        log(
            f"select: part {number} of {parts} is read; when all are, the same command with join=true in place of "
            "shard makes the data sets"
        )
        return table
    if settings.join:
        return _write(settings, decontamination, sources, _parts(settings, sources), log)
    beside = bucket.mirror(output).absolute()
    near = next(folder for folder in (beside, *beside.parents) if folder.is_dir())
    with writable(output), tempfile.TemporaryDirectory(dir=near, prefix=".select-") as name:
        _read(settings, decontamination, sources, Path(name), log)
        return _write(settings, decontamination, sources, [Path(name)], log)


def _read(
    settings: SelectSettings, decontamination: Decontamination, sources: Sequence[str], folder: Path, log: Log
) -> Table:
    """Enter all traces of the sources, or those of a shard, in the ledger of a folder."""
    rules, census = Rules(settings), Census()
    records: Iterator[Record] = read_traces(sources, "traces", settings.domain, settings.only, log)
    if settings.shard is not None:
        records = itertools.islice(records, settings.shard[0], None, settings.shard[1])
    reading = progress_bar("select", "traces", shown=log is not silent)
    with Ledger(folder / _LEDGER) as ledger, open(folder / _ROWS, "wb") as rows, reading as bar:
        for batch in _batches(records):
            drops = [rules.drop(record) for record in batch]
            whole = [number for number, drop in enumerate(drops) if drop is None]
            leaks = []
            texts = [f"{batch[number].reasoning}\n{batch[number].response}" for number in whole]
            for position, leak in decontamination.in_traces(texts).items():
                number = whole[position]
                drops[number] = Drop(leak.reason, leak.benchmark, f"'{leak.span}' is of {leak.benchmark}")
                record = batch[number]
                leaks.append((leak.reason, "trace", record.id, record.domain, *leak[1:]))
            traces, prompts = [], []
            for record, drop in zip(batch, drops, strict=True):
                line = compact_line({name: getattr(record, name) for name in _FIELDS}) if drop is None else b""
                trace = _trace(record, drop, rules, rows.tell(), len(line))
                rows.write(line)
                traces.append(trace)
                if drop is None:
                    prompts.append((trace.prompt, record.prompt))
                census[record.domain, "teacher", str(record.teacher.get("model") or "not said")] += 1
                census[record.domain, "judge", record.verdict_by] += 1
            ledger.add(traces, prompts, leaks)
            bar.update(len(batch))
        counts = ledger.counts()
    if settings.min_tokens is not None or settings.max_tokens is not None:
        by_tokenizer = (
            f"{rules.by_tokenizer:,} by {settings.tokenizer}" if settings.tokenizer else "none by a tokenizer"
        )
        log(f"select: tokens counted by the teacher in {rules.by_teacher:,} traces, {by_tokenizer}")
        if rules.unmeasured:
            log(
                f"select: {rules.unmeasured:,} traces have no count of tokens and were not measured; name a `tokenizer`"
            )
    stated = {
        "identity": _identity(settings, sources),
        "census": [[*key, count] for key, count in sorted(census.items())],
    }
    (folder / _PART).write_text(json.dumps(stated))
    table: Table = {}
    for domain, reason, _, number in counts:
        row = table.setdefault(domain, dict.fromkeys(("kept", *REASONS), 0))
        row[reason] += number
    return table


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.reasoning) + len(record.response)
        if size >= _BATCH or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _trace(record: Record, drop: Drop | None, rules: Rules, offset: int, length: int) -> Trace:
    prompt = digest(normalise_prompt(record.prompt))
    text = digest(f"{prompt.hex()}{record.reasoning}\0{record.response}")
    if drop is not None and drop.reason == "refused":
        passed = None
    elif not is_whole(record.finish_reason):
        passed = False
    else:
        passed = {"right": True, "wrong": False}.get(record.verdict)
    tokens = record.usage.get("completion_tokens")
    short = "" if drop is None else json.dumps(excerpt({name: getattr(record, name) for name in _FIELDS}, drop.detail))
    return Trace(
        id=record.id,
        domain=record.domain,
        reason=drop.reason if drop else None,
        cause=drop.cause if drop else None,
        question=question_digest(record.prompt),
        prompt=prompt,
        text=text,
        source=re.sub(r", row \d+$", "", record.source),
        answer=digest(stated_answer(record.response)),
        passed=passed,
        tokens=tokens if isinstance(tokens, int) and abs(tokens) < 2**62 else None,
        characters=len(record.prompt) + len(record.reasoning) + len(record.response),
        part=0,
        offset=offset,
        length=length,
        excerpt=short,
    )


def stated_answer(response: str) -> str:
    """Return what a response states, for the count of samples that agree: its last box, else its last line."""
    tail = response[-4000:]
    line = (last_boxed(tail) or tail).strip().rpartition("\n")[2]
    return re.sub(r"[\s$*.,]+|\\[,;! ]", "", line).lower()


def _identity(settings: SelectSettings, sources: Sequence[str]) -> str:
    return digest(identity(settings, [state[1:] for state in data_states(sources)])).hex()


def _parts(settings: SelectSettings, sources: Sequence[str]) -> list[Path]:
    """Return the folders of all parts. UserError when one is missing or was made of something else."""
    location = bucket.join(settings.output, PARTS)
    parts = bucket.local(location) if bucket.exists(location) else bucket.mirror(location)
    matches = [re.fullmatch(r"\d+-of-(\d+)", folder.name) for folder in parts.glob("*-of-*")]
    numbers = {int(match[1]) for match in matches if match}
    if len(numbers) != 1:
        problem = (
            f"parts of {' and of '.join(map(str, sorted(numbers)))}; remove those that are of no use"
            if numbers
            else "none"
        )
        raise UserError(f"{location}: expected the parts that shard=[i, n] makes, found {problem}")
    wanted = [parts / f"{number}-of-{max(numbers)}" for number in range(max(numbers))]
    for folder in wanted:
        again = f"make it again: shard=[{folder.name.replace('-of-', ', ')}]"
        if not all((folder / name).is_file() for name in (_PART, _LEDGER, _ROWS)):
            raise UserError(f"{location}/{folder.name}: this part is missing; {again.replace(' again', '')}")
        try:
            part = json.loads((folder / _PART).read_text())["identity"]
            Ledger.check(folder / _LEDGER)
        except (ValueError, KeyError, TypeError, OSError, sqlite3.DatabaseError) as error:
            raise UserError(f"{location}/{folder.name}: damaged: {first_line(error)}; {again}") from None
        if part != _identity(settings, sources):
            raise UserError(f"{location}/{folder.name}: made with other settings or of other traces; {again}")
    return wanted


def _write(
    settings: SelectSettings, decontamination: Decontamination, sources: Sequence[str], parts: Sequence[Path], log: Log
) -> Table:
    """Decide by the ledgers of all parts what is kept, and write it."""
    output = Path(settings.output)
    census = Census()
    for folder in parts:
        for domain, kind, name, number in json.loads((folder / _PART).read_text())["census"]:
            census[domain, kind, name] += number
    with contextlib.ExitStack() as stack:
        if not settings.join:
            ledger = stack.enter_context(Ledger(parts[0] / _LEDGER))
        else:
            working = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parts[0].parent, prefix=".select-")))
            ledger = stack.enter_context(Ledger(working / _LEDGER))
            for number, folder in enumerate(parts):
                ledger.join(folder / _LEDGER, number)
        rows = [stack.enter_context(open(folder / _ROWS, "rb")) for folder in parts]
        domains = ledger.domains()
        if not domains:
            raise UserError(
                f"traces: {', '.join(trace_files(settings.traces))} holds no record; run `bmjax collect` first"
            )
        for domain in domains:
            if problem := domain_problem(domain):
                raise UserError(problem)
            target = bucket.mirror(output / f"{domain}.jsonl").resolve()
            if any(target == bucket.mirror(source).resolve() for source in sources):
                raise UserError(
                    f"output: {bucket.name_of(target)} is a file of `traces`, which the data set of domain "
                    f"'{domain}' would replace; choose another output"
                )
        _decide(settings, decontamination, ledger, domains, log)
        entries = causes_of(ledger.counts())
        table = {
            domain: {"kept": 0, **dict.fromkeys(REASONS, 0), **{r: e["count"] for r, e in entries[domain].items()}}
            for domain in domains
        }
        for domain, counts in table.items():
            if not counts["kept"]:
                total = sum(counts.values())
                dropped = ", ".join(f"{reason} {n}" for reason, n in counts.items() if n and reason != "kept")
                raise UserError(f"domain '{domain}': none of {total} traces is left to train on ({dropped})")
        descriptors = [file.fileno() for file in rows]
        _add_examples(ledger, entries, descriptors, max(settings.show, _EXAMPLES))
        for domain in domains:
            with replacing_file(output / f"{domain}.jsonl") as file:
                for part, offset, length in ledger.kept(domain):
                    file.write(os.pread(descriptors[part], length, offset))
            log(f"select {domain}: {table[domain]['kept']} of {sum(table[domain].values())} traces kept")
            for reason in ("truncated", "refused", "contaminated"):
                if causes := entries[domain].get(reason, {}).get("causes"):
                    log(f"select {domain}: {reason}: {', '.join(f'{name} {n}' for name, n in causes.items())}")
        names = ("reason", "in", "key", "domain", "benchmark", "question", "rule", "share", "span")
        if settings.decontaminate or settings.held_out:
            write_jsonl(output / REPORT, (dict(zip(names, leak, strict=True)) for leak in ledger.leaks()))
        by_source = {domain: ledger.sources(domain) for domain in domains}
    if settings.show:
        log(render_examples(entries, settings.show))
    write_atomic(output / EXAMPLES, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    write_atomic(output / CARD, data_card(settings, table, entries, census, by_source))
    write_atomic(output / SELECTION, json.dumps(table, indent=1) + "\n")
    return table


def _decide(
    settings: SelectSettings, decontamination: Decontamination, ledger: Ledger, domains: Sequence[str], log: Log
) -> None:
    """Drop what only a comparison shows; of several reasons the first one counts."""
    ledger.drop_duplicates()
    if settings.pass_rate is not None:
        ledger.drop_by_pass_rate(*settings.pass_rate)
    leaks = list(decontamination.in_prompts(ledger.prompts, log))
    for reason in ("held out", "contaminated"):
        ledger.drop_prompts(reason, ((key, leak.benchmark) for key, leak in leaks if leak.reason == reason))
    ledger.add_leaks((leak.reason, "prompt", key.hex(), "", *leak[1:]) for key, leak in leaks)
    if settings.near_duplicates is not None:
        for domain in domains:
            # The same question in another writing: the prompt with the smallest digest stands for it.
            again = [
                prompt for _, pairs in itertools.groupby(ledger.questions(domain), key=lambda pair: pair[0])
                for _, prompt in itertools.islice(pairs, 1, None)
            ]  # fmt: skip
            ledger.drop_prompts("near duplicate", ((prompt, "") for prompt in again), domain)
            if settings.near_duplicates < 1:
                near = list(near_duplicates(ledger.prompts(domain), settings.near_duplicates))
                ledger.drop_prompts("near duplicate", ((prompt, "") for prompt, _ in near), domain)
    if settings.per_prompt is not None:
        ledger.keep_best(settings)
    if settings.per_source is not None:
        there = ledger.all_sources()
        for name in settings.per_source if isinstance(settings.per_source, dict) else ():
            if name not in there:
                log(f"select: per_source: no trace has the source '{name}'{nearest(name, sorted(there))}")
        ledger.keep_quota(settings.per_source)


def _add_examples(ledger: Ledger, entries: Examples, descriptors: Sequence[int], number: int) -> None:
    for domain, reasons in entries.items():
        for reason, entry in reasons.items():
            for identifier, cause, part, offset, length, short in ledger.examples(domain, reason, number):
                example: dict[str, Any] = json.loads(short) if short else {}
                if length:
                    example = excerpt(json.loads(os.pread(descriptors[part], length, offset)))
                entry["examples"].append({"id": identifier, **({"cause": cause} if cause else {}), **example})
