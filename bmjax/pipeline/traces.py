"""A domain's training rows from traces: asked of the teacher or read from files, judged, selected.

DIR/teach/DOMAIN/answers-*/   all that a teacher answered, by model and sampling: paid for, never deleted
DIR/teach/DOMAIN/asked.jsonl  the traces that the run's settings ask for
DIR/teach/DOMAIN/selected/    those worth training on
DIR/teach/DOMAIN/counts.json  how many there were, were kept, and were dropped for which reason
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.io.jsonl import write_jsonl
from bmjax.io.rows import read_rows
from bmjax.pipeline.rows import HELD_OUT, DomainRows, prompt_of
from bmjax.pipeline.settings import as_list
from bmjax.teach.collect import collect, sampling_parameters, wanted_samples
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.record import TRACES, Record, normalise_prompt, read_records
from bmjax.teach.select import select
from bmjax.teach.settings import CollectSettings, SelectSettings, TeacherSettings


def asking(teacher: TeacherSettings) -> dict[str, Any]:
    """Return what identifies a teacher's answers: the model and its sampling, not the address that serves it."""
    return {"model": teacher.model, **sampling_parameters(teacher)}


def teach(rows: DomainRows, folder: Path) -> None:
    """Ask for, or read, a domain's traces and write the selected ones as its training rows.

    Arguments:
        rows: the domain; its held-out rows are written already, except shares of traces, which are taken here.
        folder: DIR/teach/DOMAIN.

    Raises:
        UserError: when too many requests fail, and when nothing is left to train on.
    """
    domain = rows.domain
    records, failed = (_read(rows), 0) if domain.problems is None else _ask(rows, folder)
    asked, held_out = folder / "asked.jsonl", folder / "held_out.jsonl"
    write_jsonl(asked, map(vars, records))

    # No prompt of a held-out row is trained on, whatever its form.
    splits = [s for s in HELD_OUT if domain.problems is not None or getattr(domain, s) is not None]
    files = [rows.file(split) for split in splits]
    write_jsonl(held_out, ({"prompt": prompt_of(row, at)} for at, row in (read_rows(files) if files else ())))
    choice = {"traces": str(asked), "output": str(folder / "selected"), "held_out": str(held_out) if files else []}
    kept = select(SelectSettings.model_validate(rows.run.select.model_dump() | choice), rows.log)[rows.name]

    selected = read_rows(folder / "selected" / f"{rows.name}.jsonl")
    rows.split(((at, " ".join(prompt_of(row, at).split()), row) for at, row in selected), "train", set())
    dropped = {reason: count for reason, count in kept.items() if reason != "kept" and count}
    counts = {"collected": sum(kept.values()), "kept": kept["kept"], "dropped": dropped}
    write_atomic(folder / "counts.json", json.dumps(counts | ({"failed": failed} if failed else {})))


def _ask(rows: DomainRows, folder: Path) -> tuple[Iterator[Record], int]:
    """Collect what is not there yet; returns the records that the settings ask for, and how many requests failed."""
    run = rows.run
    way = hashlib.sha256(json.dumps(asking(run.teacher), sort_keys=True).encode()).hexdigest()[:8]
    answers = folder / f"answers-{way}"
    settings = CollectSettings(
        problems=str(rows.folder / "problems.jsonl"), output=str(answers), domain=rows.name, prompt="{prompt}",
        reference="{reference}", judge=rows.domain.judge, run_programs=run.run_programs, teacher=run.teacher,
    )  # fmt: skip
    counts = collect(settings, rows.log)
    if counts["failed"] > run.failed_share * counts["wanted"]:
        raise UserError(
            f"teach/{rows.name}: {counts['failed']} requests failed, see {answers / 'failures.jsonl'}; what was "
            "answered is kept, the same command asks for the rest; failed_share lets a run go on without them"
        )
    # An answer outlives a change of its problem's reference or judge; its verdict does not.
    references: dict[str, Any] = {}
    for _, problem in read_rows(rows.file("problems")):
        references.setdefault(normalise_prompt(problem["prompt"]), problem["reference"])
    wanted = wanted_samples(settings)

    def records() -> Iterator[Record]:
        for record in read_records(answers / TRACES):
            if record.id in wanted:
                reference = references[normalise_prompt(record.prompt)]
                name = rows.domain.judge or choose(reference, rows.name)
                same_judge = record.verdict_by in (("number", "math-verify") if name == "math" else (name,))
                yield record if same_judge and record.reference == reference else _judged(rows, record, reference)

    return records(), counts["failed"]


def _judged(rows: DomainRows, record: Record, reference: Any) -> Record:
    name = rows.domain.judge or choose(reference, rows.name)
    verdict = judge(reference, record.response, name, rows.run.run_programs, record.finish_reason)
    return replace(record, reference=reference, verdict=verdict.verdict, verdict_by=verdict.judge)


def _read(rows: DomainRows) -> Iterator[Record]:
    """Yield the records of the domain's trace files, those that nobody judged judged now.

    Files with traces of several domains give those of this domain's name; of a single other name, all.
    """
    domain, key = rows.domain, f"domains.{rows.name}.traces"
    assert domain.traces is not None  # the settings hold traces where they hold no problems
    data = [f"{name}/{TRACES}" if Path(name).expanduser().is_dir() else name for name in as_list(domain.traces)]
    labels = {str(row.get("domain")) for _, row in read_rows(data, key)}
    if rows.name not in labels and len(labels) > 1:
        raise UserError(f"{key}: no trace is of domain '{rows.name}'; there are {', '.join(sorted(labels)[:8])}")
    if rows.name in labels and len(labels) > 1:
        rows.log(f"teach {rows.name}: traces of {', '.join(sorted(labels - {rows.name})[:8])} left out")
    for location, row in read_rows(data, key):
        if len(labels) > 1 and row.get("domain") != rows.name:
            continue
        try:
            record = replace(Record.from_json(row), domain=rows.name)
        except ValueError as error:
            raise UserError(f"{location}: not a trace: {error}; rows without an id are 'train' rows") from None
        if record.verdict == "unjudged" and record.reference is not None:
            rows.check_reference(record.reference, location)
            record = _judged(rows, record, record.reference)
        yield record
