"""Traces on disk: content-addressed records, one JSON line each, in a file that is only ever appended to.

The id of a record is what was asked (domain, normalised prompt, teacher, sampling parameters, sample index), so an
input may be reordered or extended and nothing already paid for is asked again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bmjax.config import UserError
from bmjax.io.rows import read_source

TRACES = "traces.jsonl"  # the name of a traces file in a directory of collect


@dataclass(frozen=True)
class Record:
    """A sampled answer of a teacher.

    reference: text, a number or {"tests": [...]}, None when unknown. reasoning: what stood between <think> and
    </think>. response: what followed; a reply of another form is kept whole here. teacher: the model and its sampling
    parameters. usage: its token counts.
    """

    id: str
    domain: str
    prompt: str
    response: str
    reasoning: str = ""
    reference: Any = None
    source: str = ""
    finish_reason: str = "stop"
    teacher: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    verdict: str = "unjudged"
    verdict_by: str = "none"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make a record of a row. ValueError says which field is missing or of the wrong type.

        A field that is null, as Parquet writes one that a row lacks, has its default.
        """
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None}
        for name in ("id", "domain", "prompt", "response"):
            if name not in known:
                raise ValueError(f"field '{name}' is missing")
        for name, value in known.items():
            expected = dict if name in ("teacher", "usage") else object if name == "reference" else str
            if not isinstance(value, expected):
                raise ValueError(f"field '{name}': expected {expected.__name__}, found {type(value).__name__}")
        return cls(**known)


def normalise_prompt(prompt: str) -> str:
    """Return a prompt without what does not change the question: line ends, trailing and outer spaces."""
    return "\n".join(line.rstrip() for line in prompt.strip().splitlines())


def record_id(domain: str, prompt: str, teacher: str, sampling: Mapping[str, Any], sample: int) -> str:
    """Return the sha256 (hex) of the canonical JSON of what was asked."""
    asked = {
        "domain": domain, "prompt": normalise_prompt(prompt), "teacher": teacher, "sampling": dict(sampling),
        "sample": sample,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def trace_files(traces: str | Sequence[str]) -> list[str]:
    """Return the sources that the setting `traces` names; a directory stands for the traces that `collect` wrote."""
    names = [traces] if isinstance(traces, str) else traces
    if not names:
        raise UserError("traces: found an empty list, expected at least one file")
    return [str(Path(name) / TRACES) if Path(name).is_dir() else name for name in names]


def read_records(*sources: str | Path, key: str = "data") -> Iterator[Record]:
    """Yield the records of files or hub data sets. A torn last line, which a killed collector left, is skipped.

    key: the setting that named the sources, for errors. UserError names the row of a bad one.
    """
    for source in sources:
        for location, row in read_source(str(source), key, growing=True):
            try:
                yield Record.from_json(row)
            except ValueError as error:
                raise UserError(f"{location}: not a record: {error}") from None


def ids_present(path: str | Path) -> set[str]:
    """Return the ids already in a traces file, none when it does not exist."""
    return {record.id for record in read_records(path)} if Path(path).exists() else set()
