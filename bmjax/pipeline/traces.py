"""A domain's training rows from traces: asked of the teacher or read from files, judged, selected.

DIR/teach/DOMAIN/answers-*/   all that a teacher answered, by model and sampling: paid for, never deleted
DIR/teach/DOMAIN/asked.jsonl  the traces that the run's settings ask for
DIR/teach/DOMAIN/selected/    those worth training on
DIR/teach/DOMAIN/counts.json  how many were asked, judged, kept, and dropped for which reason, with examples
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.io.jsonl import write_jsonl
from bmjax.io.rows import read_rows
from bmjax.log import silent
from bmjax.pipeline.rows import HELD_OUT, DomainRows, prompt_of, read_source
from bmjax.teach.collect import collect, sampling_parameters, wanted_samples
from bmjax.teach.estimate import describe as collect_plan
from bmjax.teach.estimate import requests
from bmjax.teach.judges.judge import choose, judge, signatures
from bmjax.teach.record import TRACES, Record, normalise_prompt, read_records, trace_files
from bmjax.teach.select import EXAMPLES, select
from bmjax.teach.settings import CollectSettings, SelectSettings, TeacherSettings
from bmjax.teach.traces import read_traces, trace_rows


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
    records, counts = (_read(rows), {}) if domain.problems is None else _ask(rows, folder)
    asked, held_out = folder / "asked.jsonl", folder / "held_out.jsonl"
    verdicts = Counter[str]()

    def noted() -> Iterator[dict[str, Any]]:
        for record in records:
            verdicts[record.verdict] += 1
            yield record.to_json()

    write_jsonl(asked, noted())

    # No prompt of a held-out row is trained on, whatever its form.
    splits = [s for s in HELD_OUT if domain.problems is not None or getattr(domain, s) is not None]
    files = [rows.file(split) for split in splits]
    write_jsonl(held_out, ({"prompt": prompt_of(row, at)} for at, row in (read_rows(files) if files else ())))
    choice = {"traces": str(asked), "output": str(folder / "selected"), "held_out": str(held_out) if files else []}
    kept = select(SelectSettings.model_validate(rows.run.select.model_dump() | choice), rows.log)[rows.name]

    selected = read_rows(folder / "selected" / f"{rows.name}.jsonl")
    rows.split(((at, " ".join(prompt_of(row, at).split()), row) for at, row in selected), "train", set())
    dropped = {reason: count for reason, count in kept.items() if reason != "kept" and count}
    counts |= {"verdicts": dict(verdicts), "collected": sum(kept.values()), "kept": kept["kept"], "dropped": dropped}
    entries = json.loads((folder / "selected" / EXAMPLES).read_text(encoding="utf-8"))[rows.name]
    counts["examples"] = {reason: entry["examples"] for reason, entry in entries.items()}
    counts["causes"] = {reason: entry["causes"] for reason, entry in entries.items() if any(entry["causes"])}
    write_atomic(folder / "counts.json", json.dumps(counts))


def describe(rows: DomainRows, folder: Path) -> list[str]:
    """Return what `teach` would ask, in lines; nothing for a domain whose traces exist."""
    source, teacher = rows.domain.problems, rows.run.teacher
    if source is None:
        return []
    if rows.file("problems").exists():
        return [line for line in collect_plan(_collect_settings(rows, folder)) if "nothing was" not in line]
    # Before the rows are written: all of them, of which some will be held out.
    prompts = [str(row.get("prompt", "")) for _, _, row in read_source(source, f"domains.{rows.name}.problems", silent)]
    asked = requests(teacher, teacher.samples * len(prompts), teacher.samples * sum(map(len, prompts)))
    return [f"{len(prompts):,} problems, fewer once some are held out", *asked]


def _answers(rows: DomainRows, folder: Path) -> Path:
    """Return the directory of all that a teacher answered in one way of asking."""
    way = hashlib.sha256(json.dumps(asking(rows.run.teacher), sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"answers-{way}"


def _collect_settings(rows: DomainRows, folder: Path) -> CollectSettings:
    run = rows.run
    return CollectSettings(
        problems=str(rows.folder / "problems.jsonl"), output=str(_answers(rows, folder)), domain=rows.name,
        adapter="bmjax", judge=rows.domain.judge, run_programs=run.run_programs,
        program_seconds=run.program_seconds, teacher=run.teacher,
    )  # fmt: skip


def _ask(rows: DomainRows, folder: Path) -> tuple[Iterator[Record], dict[str, Any]]:
    """Collect what is not there yet.

    Returns the records that the settings ask for, and how many traces were asked for, and how many requests failed.
    """
    run = rows.run
    answers, settings = _answers(rows, folder), _collect_settings(rows, folder)
    counts = collect(settings, rows.log)
    if counts["failed"] > run.failed_share * counts["wanted"]:
        raise UserError(
            f"teach/{rows.name}: {counts['failed']} requests failed, see {answers / 'failures.jsonl'}; what was "
            "answered is kept, the same command asks for the rest; failed_share lets a run go on without them"
        )
    # An answer outlives a change of its problem's reference or judge; its verdict does not.
    problems: dict[str, dict[str, Any]] = {}
    for _, row in read_rows(rows.file("problems")):
        problems.setdefault(normalise_prompt(row["prompt"]), row)
    wanted = wanted_samples(settings)

    def records() -> Iterator[Record]:
        for record in read_records(answers / TRACES):
            if record.id in wanted:
                problem = problems[normalise_prompt(record.prompt)]
                reference = problem["reference"]
                name = rows.domain.judge or problem.get("judge") or choose(reference)
                same_judge = record.verdict_by in signatures(name)
                yield record if same_judge and record.reference == reference else _judged(rows, record, reference, name)

    return records(), {"asked": counts["wanted"], "failed": counts["failed"]}


def _judged(rows: DomainRows, record: Record, reference: Any, name: str) -> Record:
    run = rows.run
    verdict = judge(reference, record.response, name, run.run_programs, record.finish_reason, run.program_seconds)
    return replace(record, reference=reference, verdict=verdict.verdict, verdict_by=verdict.judge)


def _read(rows: DomainRows) -> Iterator[Record]:
    """Yield the records of the domain's traces, those that nobody judged judged now.

    Traces of several domains give those of this domain's name; of a single other name, all.
    """
    domain, key = rows.domain, f"domains.{rows.name}.traces"
    assert domain.traces is not None  # the settings hold traces where they hold no problems
    sources = trace_files(domain.traces)
    labels = {record.domain for record in read_traces(sources, key, rows.name, domain.only, silent)}
    if not labels:
        raise UserError(f"{key}: {', '.join(sources)} holds no trace")
    if rows.name not in labels and len(labels) > 1:
        raise UserError(f"{key}: no trace is of domain '{rows.name}'; there are {', '.join(sorted(labels)[:8])}")
    if rows.name in labels and len(labels) > 1:
        rows.log(f"teach {rows.name}: traces of {', '.join(sorted(labels - {rows.name})[:8])} left out")
    for location, _, record in trace_rows(sources, key, rows.name, domain.only, rows.log):
        if len(labels) > 1 and record.domain != rows.name:
            continue
        record = replace(record, domain=rows.name)
        if record.verdict == "unjudged" and record.reference is not None:
            rows.check_reference(record.reference, location)
            name = rows.domain.judge or choose(record.reference)
            record = _judged(rows, record, record.reference, name)
        yield record
