"""Judges existing traces anew: references from the problems, verdicts from the judges, nothing asked of a teacher.

`bmjax judge` and `bmjax.rejudge` come here. Traces keep their order and every field but reference and verdict.
"""

import contextlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.atomic import held, replacing_file
from bmjax.io.hub import is_dataset_id
from bmjax.io.jsonl import JsonLines, json_line
from bmjax.io.rows import files_of
from bmjax.log import Log, progress_bar, silent
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.problems import read_problems
from bmjax.teach.record import TRACES, Record, is_in_shard, normalise_prompt, trace_files
from bmjax.teach.settings import JudgeSettings
from bmjax.teach.traces import is_record, trace_rows
from bmjax.urls import url_of

VERDICTS = ("right", "wrong", "unjudged")

# How many traces wait for their turn to be written, for each thread that judges.
_WAITING = 8

Counts = dict[str, Any]
Problem = tuple[Any, str | None]  # a reference and the name of its judge


@dataclass(frozen=True)
class _Judged:
    """A trace after judging.

    why_kept: why its verdict is the old one, None where it was judged. disputed: whether a second judge says otherwise.
    """

    row: Mapping[str, Any]
    old: Record
    new: Record
    why_kept: str | None
    disputed: bool = False


def rejudge(settings: JudgeSettings, log: Log = silent) -> Counts:
    """Judge traces anew and write them with their new verdicts, whole or not at all.

    A verdict is kept where nothing can be judged anew: without a reference, and for programs while they may not run.

    Returns:
        traces; before and after, the number of each verdict; changed, the number of each change as "wrong -> right";
        disputed, of how many verdicts a second judge says otherwise; references, how many are new; kept, how many
        verdicts were kept, by reason; no_problem, how many traces have a prompt that is none of the problems'.

    Raises:
        UserError: for bad traces or problems, a reference that no judge can read, and traces that cannot be replaced.
    """
    sources = trace_files(settings.traces)
    output = _output(settings, sources)
    problems = _read_problems(settings, log)
    in_place = bucket.mirror(output).resolve() in [bucket.mirror(source).resolve() for source in sources]
    if in_place and (settings.shard is not None or settings.only or len(sources) != 1):
        raise UserError(f"output: {output} is one of the traces, of which it would lose some; choose another file")
    if in_place:
        _refuse_other_forms(bucket.mirror(output))
    before, after, changed, kept = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    references = no_problem = disputed = 0
    with ExitStack() as stack:
        if in_place:
            stack.enter_context(_unshared(output))  # no collector may append meanwhile
        file = stack.enter_context(replacing_file(output))
        bar = stack.enter_context(progress_bar("judge", "traces", shown=log is not silent))
        for judged in _judged(settings, sources, problems, in_place, log):
            old, new = judged.old, judged.new
            before[old.verdict] += 1
            after[new.verdict] += 1
            if old.verdict != new.verdict:
                changed[f"{old.verdict} -> {new.verdict}"] += 1
            if judged.why_kept:
                kept[judged.why_kept] += 1
            disputed += judged.disputed
            references += old.reference != new.reference
            no_problem += problems is not None and _key(old.prompt) not in problems
            fields = judged.row if is_record(judged.row) else vars(new)
            new_fields = {"reference": new.reference, "verdict": new.verdict, "verdict_by": new.verdict_by}
            file.write(json_line({**fields, **new_fields}))
            bar.update(1)
        if not before:
            raise UserError(
                f"traces: {', '.join(sources)} holds no trace" + (" of this shard" if settings.shard else "")
            )
    counts = {
        "traces": before.total(), "before": _by_verdict(before), "after": _by_verdict(after),
        "changed": dict(changed.most_common()), "references": references, "kept": dict(kept), "no_problem": no_problem,
        "disputed": disputed, "output": str(output),
    }  # fmt: skip
    return counts


def summary(counts: Counts) -> str:
    """Render the counts as text: verdicts before and after, every change, and what was not judged."""
    verdicts = [f"{name} {counts['before'][name]:,} -> {counts['after'][name]:,}" for name in counts["after"]]
    total = sum(counts["changed"].values())
    lines = [f"{counts['output']}: {counts['traces']:,} traces: {', '.join(verdicts)}; {total:,} verdicts changed"]
    lines += [f"  {change}: {number:,}" for change, number in counts["changed"].items()]
    if counts["disputed"]:
        lines.append(f"  a second judge says otherwise: {counts['disputed']:,}")
    if counts["references"]:
        lines.append(f"  new references: {counts['references']:,}")
    lines += [f"  verdict kept, {reason}: {number:,}" for reason, number in counts["kept"].items()]
    if counts["no_problem"]:
        lines.append(
            f"  prompts that are none of the problems', judged by their old references: {counts['no_problem']:,}"
        )
    return "\n".join(lines)


def _by_verdict(counts: Counter[str]) -> dict[str, int]:
    names = [*VERDICTS, *sorted(counts.keys() - {*VERDICTS})]
    return {name: counts[name] for name in names}


def _output(settings: JudgeSettings, sources: list[str]) -> str | Path:
    """Return the file to write: the output, a directory standing for its traces file, else the traces themselves."""
    if settings.output is not None:
        output = Path(settings.output)
        return output if output.suffix in (".jsonl", ".ndjson") else output / TRACES
    for source in sources:
        if not is_dataset_id(source):
            files_of(source, silent)  # says what is wrong with a name that is none of a file
    if len(sources) != 1 or not Path(sources[0]).is_file() or settings.shard is not None or settings.only:
        raise UserError(
            "output: traces are replaced in place only where they are one whole file; give output: FILE.jsonl"
        )
    path = Path(sources[0])
    return bucket.name_of(path) if bucket.name_of(path) != str(path) else path.resolve()


def _refuse_other_forms(path: Path) -> None:
    """Raise UserError for a file that is not traces of collect, of which replacing it would lose something."""
    # Opening a file to append cuts off what is no line of JSON: not before it is known to hold nothing else.
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        first = None
    if not (isinstance(first, dict) and is_record(first)):
        raise UserError(
            f"{path}: not traces of `bmjax collect`, which alone are replaced in place; give output: FILE.jsonl"
        )


@contextlib.contextmanager
def _unshared(path: str | Path) -> Iterator[None]:
    """Hold the lock of a traces file, and that of its folder in a bucket."""
    with ExitStack() as stack:
        if url := url_of(path):
            folder = url.rpartition("/")[0]
            stack.enter_context(held(bucket.join(folder, ".lock"), "another process collects into it"))
        stack.enter_context(JsonLines(bucket.mirror(path)))
        yield


def _key(prompt: str) -> str:
    return " ".join(normalise_prompt(prompt).split())


def _read_problems(settings: JudgeSettings, log: Log) -> dict[str, Problem] | None:
    """Return reference and judge of every problem by its prompt; None without problems.

    The prompt of an adapter counts with and without its instruction, which traces of data sets lack.
    """
    if settings.problems is None:
        return None
    problems: dict[str, Problem] = {}
    of_all = settings.model_copy(update={"only": {}})  # which keeps traces
    for problem in read_problems(settings.problems, "problems", of_all, log):
        for prompt in (problem.prompt, problem.question):
            if prompt:
                problems.setdefault(_key(prompt), (problem.reference, problem.judge))
    return problems


def _judged(
    settings: JudgeSettings, sources: Iterable[str], problems: Mapping[str, Problem] | None, in_place: bool, log: Log
) -> Iterator[_Judged]:
    """Judge the traces in threads, for the slow judges wait for processes, and yield them in their order."""
    workers = (os.cpu_count() or 1) + 4
    waiting: deque[Future[_Judged]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for location, row, record in trace_rows(sources, "traces", settings.domain, settings.only, log):
                if in_place and not is_record(row):
                    raise UserError(
                        f"{location}: not a trace of `bmjax collect`, so it is not replaced; give output: FILE.jsonl"
                    )
                if settings.shard is not None and not is_in_shard(record.id, settings.shard):
                    continue
                waiting.append(pool.submit(_judge, settings, location, row, record, problems))
                if len(waiting) >= _WAITING * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _judge(
    settings: JudgeSettings,
    location: str,
    row: Mapping[str, Any],
    record: Record,
    problems: Mapping[str, Problem] | None,
) -> _Judged:
    reference, name = (problems or {}).get(_key(record.prompt), (record.reference, None))
    changed = replace(record, reference=reference)
    if reference is None:
        return _Judged(row, record, changed, "no reference")
    try:
        name = settings.judge or name or choose(reference)
        if name == "tests" and not settings.run_programs:
            return _Judged(row, record, changed, "programs run only with run_programs: true")
        verdict = judge(
            reference, record.response, name, settings.run_programs, record.finish_reason, settings.program_seconds
        )
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    new = replace(changed, verdict=verdict.verdict, verdict_by=verdict.judge)
    return _Judged(row, record, new, None, bool(verdict.disagreement))
