"""A domain's rows as files under DIR/data/DOMAIN: read from their sources, and split by their prompts.

problems.jsonl   prompt, reference             what the teacher is asked
train.jsonl      prompt, reasoning, response   the branch's rows, in any form that a training reads
backbone.jsonl   the same                      the rows of a new backbone, where they are others than the branch's
validation.jsonl, test.jsonl                   prompt with reference (accuracy), with response (loss), or both

Rows stream through; only hashes of prompts stay in memory. The stages of bmjax.pipeline.phases call this module.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmjax.chat.forms import read_conversation
from bmjax.config import UserError
from bmjax.io.atomic import replacing_file
from bmjax.io.hub import is_dataset_id
from bmjax.io.jsonl import json_line, write_jsonl
from bmjax.io.rows import fill, read_rows, refuse_shown_reference
from bmjax.log import Log, silent, write_line
from bmjax.pipeline.settings import DomainSettings, RunSettings, SourceSettings, as_list
from bmjax.teach.adapters.reading import adapted, lies_in, matching
from bmjax.teach.decontaminate import digest
from bmjax.teach.judges.judge import choose
from bmjax.teach.record import trace_files
from bmjax.urls import url_of

HELD_OUT = ("test", "validation")  # the order in which shares are taken

SourceRow = tuple[str, str, dict[str, Any]]  # location, identity, row


@dataclass(frozen=True)
class DomainRows:
    """The row files of one domain of a run, in `folder`."""

    name: str
    run: RunSettings
    folder: Path
    log: Log
    _measured: dict[str, tuple[bool, bool]] = field(default_factory=dict, init=False)  # by split, from its first row

    @property
    def domain(self) -> DomainSettings:
        """The domain's settings."""
        return self.run.domains[self.name]

    def check_sources(self) -> None:
        """Raise UserError where a file of rows on this machine is missing, or its first row cannot be read."""
        domain = self.domain
        for key in ("problems", "train", "test", "validation", "backbone"):
            source: SourceSettings | None = getattr(domain, key)
            for name in as_list(source.data) if source is not None else ():
                if not is_dataset_id(name) and url_of(name) is None:
                    next(read_rows(name, f"domains.{self.name}.{key}.data", silent))
        for name in trace_files(domain.traces) if domain.traces is not None else ():
            if not is_dataset_id(name) and url_of(name) is None:
                next(read_rows(name, f"domains.{self.name}.traces", silent), None)

    def file(self, split: str) -> Path:
        """Return the file for train, backbone, validation or test; a backbone without its own rows shares train's."""
        shared = split == "backbone" and self.domain.backbone is None and self.domain.backbone_rows is None
        return self.folder / f"{'train' if shared else split}.jsonl"

    def stage(self, split: str) -> str:
        """Return the name of the stage that writes `file(split)`."""
        domain, split = self.domain, self.file(split).stem
        from_source = domain.train is not None or getattr(domain, split) is not None
        from_source |= split in HELD_OUT and domain.traces is None
        return f"{'data' if from_source else 'teach'}/{self.name}"

    def outputs(self, stage: str) -> tuple[str, ...]:
        """Return the files that a stage writes, relative to the run's directory."""
        splits = ["train", *HELD_OUT, *(["backbone"] if self.run.student is None else [])]
        files = {self.file(split).name for split in splits if self.stage(split) == stage}
        if stage == f"data/{self.name}" and self.domain.problems is not None:
            files.add("problems.jsonl")
        return tuple(f"data/{self.name}/{file}" for file in sorted(files))

    def write_sources(self) -> None:
        """Write what the sources hold: held-out rows, then problems or training rows, then the backbone's rows."""
        domain, held_out = self.domain, set[bytes]()
        for split in HELD_OUT:
            if source := getattr(domain, split):
                write_jsonl(self.file(split), self._held_out_rows(source, split, held_out))
        if domain.problems is not None:
            self.split(self._problems(domain.problems), "problems", held_out)
        elif domain.train is not None:
            self.split(read_source(domain.train, f"domains.{self.name}.train", self.log), "train", held_out)
        if domain.backbone is not None:
            rows = list(read_source(domain.backbone, f"domains.{self.name}.backbone", self.log))
            kept = [row for _, identity, row in rows if digest(identity) not in held_out]
            if not kept:
                raise UserError(f"domains.{self.name}.backbone: every row is in validation or test; give other rows")
            if len(kept) < len(rows):
                self.log(f"data {self.name}: {len(rows) - len(kept)} backbone rows are in validation or test: left out")
            write_jsonl(self.file("backbone"), kept)

    def split(self, rows: Iterable[SourceRow], rest: str, held_out: set[bytes]) -> None:
        """Write rows to validation.jsonl and test.jsonl by the domain's shares, and the others to `rest`.jsonl.

        The split of a row depends on its identity alone, not on the order or the number of rows. Rows whose identity
        is in `held_out` are left out. Where the rest is trained on and `backbone_rows` is set, so many of its rows
        are written to backbone.jsonl, too.
        """
        domain = self.domain
        shares = {split: getattr(domain, f"{split}_share") for split in HELD_OUT if getattr(domain, split) is None}
        if rest == "train" and domain.problems is not None:
            shares = {}  # they were taken of the problems
        counts = dict.fromkeys((rest, *shares), 0)
        left_out = {"in validation or test": 0, "asked twice": 0}
        asked: set[bytes] = set()
        positions = array("d")  # of the rest's rows, for the backbone's share
        with ExitStack() as stack:
            files = {split: stack.enter_context(replacing_file(self.file(split))) for split in counts}
            for location, identity, row in rows:
                if (key := digest(identity)) in held_out:
                    left_out["in validation or test"] += 1
                    continue
                split = next((split for split, share in shares.items() if _position(identity, split) < share), rest)
                if split == rest:
                    positions.append(_position(identity, "backbone"))
                else:
                    questions, _ = self._measures(row, location, split)
                    if questions and key in asked:
                        left_out["asked twice"] += 1
                        continue
                    asked.add(key)
                files[split].write(json_line(row))
                counts[split] += 1
            if empty := next((split for split, count in counts.items() if not count), None):
                raise UserError(
                    f"domains.{self.name}: no {empty} rows are left; check data, between, limit and the shares"
                )
        if rest == "train" and domain.backbone_rows is not None:
            last = sorted(positions)[min(domain.backbone_rows, len(positions)) - 1]
            written = zip(read_rows(self.file("train")), positions, strict=True)
            write_jsonl(self.file("backbone"), (row for (_, row), position in written if position <= last))
        reasons = [f"{count} {reason}" for reason, count in left_out.items() if count]
        line = ", ".join(f"{count} {split} rows" for split, count in counts.items())
        self.log(f"data {self.name}: {line}" + (f"; left out: {', '.join(reasons)}" if reasons else ""))

    def _held_out_rows(self, source: SourceSettings, split: str, held_out: set[bytes]) -> Iterator[dict[str, Any]]:
        for location, identity, row in read_source(source, f"domains.{self.name}.{split}", self.log):
            self._measures(row, location, split)
            held_out.add(digest(identity))
            yield row

    def _problems(self, source: SourceSettings) -> Iterator[SourceRow]:
        """Yield prompt and reference of every problem, checked before anything is asked."""
        key = f"domains.{self.name}.problems"
        for location, identity, row in read_source(source, key, self.log):
            prompt, reference = row.get("prompt"), row.get("reference")
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{location}: the prompt is empty or not text; check {key}.prompt")
            if reference is None and "unjudged" not in self.run.select.keep:
                raise UserError(
                    f"{location}: no reference, so no answer can be judged right; give {key}.reference, "
                    "or select.keep: [right, unjudged]"
                )
            self.check_reference(reference, location, row.get("judge"))
            judge: dict[str, Any] = {"judge": row["judge"]} if source.adapter is not None and row.get("judge") else {}
            yield location, identity, {"prompt": prompt, "reference": reference} | judge

    def _measures(self, row: Mapping[str, Any], location: str, split: str) -> tuple[bool, bool]:
        """Return what a held-out row can measure; UserError where the rows of a split differ in that."""
        kinds = measures(row, location)
        if not any(kinds):
            raise UserError(f"{location}: a {split} row needs a prompt and a reference (accuracy) or a response (loss)")
        if kinds != self._measured.setdefault(split, kinds):
            raise UserError(f"{location}: the other {split} rows have what this one lacks, or lack what it has: "
                            "a reference (accuracy) or a response (loss)")  # fmt: skip
        if kinds[0]:
            self.check_reference(row["reference"], location, row.get("judge"))
        return kinds

    def check_reference(self, reference: Any, location: str, judge: str | None = None) -> None:
        """Raise UserError for a reference that no judge can read, or that needs programs to be run.

        judge: the one that the row's adapter names.
        """
        try:
            judge_name = self.domain.judge or judge or choose(reference)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
        if judge_name == "tests" and not self.run.run_programs:
            raise UserError(
                f"{location}: the reference is a program's tests; answers are judged by running them on this machine: "
                "set run_programs: true, best inside a container"
            )


def measures(row: Mapping[str, Any], location: str) -> tuple[bool, bool]:
    """Return (whether a row is a question with a reference, whether it holds a response)."""
    question = isinstance(row.get("prompt"), str) and row.get("reference") is not None
    if not {"response", "messages", "conversations"} & row.keys() or row.get("response", "") is None:
        return question, False
    return question, any(read_conversation(row, location).targets)


def read_source(source: SourceSettings, key: str, log: Log = write_line) -> Iterator[SourceRow]:
    """Yield (location, identity, row) of a source's rows.

    key: the setting that holds the source, for errors. log: takes what an adapter recognised and left out.
    """
    count = 0
    for location, fields, row in _filled(source, key, log):
        identity = source.identity
        text = prompt_of(row, location) if identity is None else fill(identity, fields, location, f"{key}.identity")
        yield location, " ".join(str(text).split()), row
        count += 1
        if count == source.limit:
            return
    if not count:
        raise UserError(f"{key}: no row of {source.data} passes 'between' {source.between}")


def _filled(source: SourceSettings, key: str, log: Log) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """Yield (location, fields, row): the fields of a source's row, and the row that adapter and templates make."""
    rows = read_rows(source.data, f"{key}.data")
    if source.only:
        rows = matching(rows, source.only, key, log)
    rows = (
        (location, fields)
        for location, fields in rows
        if all(lies_in(fields, name, low, high, location) for name, (low, high) in source.between.items())
    )
    if source.adapter is None:
        for location, fields in rows:
            yield location, fields, dict(fields) if source.as_they_are else _by_templates(source, fields, location, key)
        return
    # Templates win over the adapter: what they give is not asked of it.
    given = ("" if source.prompt is not None else None, "" if source.reference is not None else None)
    for location, columns, problem in adapted(rows, source.adapter, key, *given, source.instruction, log):
        row = {name: problem[name] for name in ("prompt", "reference", "judge") if problem[name] is not None}
        yield location, columns, row | _by_templates(source, columns, location, key)


def _by_templates(source: SourceSettings, fields: Mapping[str, Any], location: str, key: str) -> dict[str, Any]:
    """Return what the templates make of a row's fields."""
    lines = {name: "\n".join(map(str, v)) if isinstance(v, list) else v for name, v in fields.items()}
    row: dict[str, Any] = {}
    if source.prompt is not None or source.adapter is None:
        row["prompt"] = str(fill(source.prompt or "{prompt}", lines, location, f"{key}.prompt"))
    if isinstance(source.reference, dict):
        templates = source.reference.items()
        row["reference"] = {k: fill(text, fields, location, f"{key}.reference.{k}") for k, text in templates}
    elif source.reference is not None:
        reference = fill(source.reference, fields, location, f"{key}.reference")
        refuse_shown_reference(source.prompt or "{prompt}", source.reference, reference, location, f"{key}.prompt")
        row["reference"] = {"tests": reference} if isinstance(reference, list) else reference
    if source.response is not None:
        row["response"] = str(fill(source.response, lines, location, f"{key}.response"))
    return row


def prompt_of(row: Mapping[str, Any], location: str) -> str:
    """Return what a row asks: its prompt, or all turns before the last of the assistant."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    turns = read_conversation(row, location).messages
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return "\n".join(turn["content"] for turn in turns[:last])


def _position(identity: str, purpose: str) -> float:
    """Return the row's position in [0, 1) for a purpose: always the same, whatever the other rows."""
    return int.from_bytes(digest(f"{purpose}\0{identity}")[:8], "big") / 2**64
