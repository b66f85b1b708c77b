"""Traces on disk: content-addressed records, one JSON line each, in a file that is only ever appended to.

The id of a record is what was asked (domain, normalised prompt, teacher, sampling parameters, sample index), so an
input may be reordered or extended and nothing already paid for is asked again.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.rows import read_source

TRACES = "traces.jsonl"  # the name of a traces file in a directory of collect

# Why an answer ended, as endpoints call it. An answer is whole only for these, in any case of letters.
_WHOLE = {"", "stop", "eos", "end_turn", "stop_sequence"}
_REFUSED = {
    "refusal", "content_filter", "content-filter", "contentfilter", "safety", "recitation", "blocklist",
    "prohibited_content", "spii", "sensitive", "guardrail_intervened",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A sampled answer of a teacher.

    reference: text, a number or {"tests": [...]}, None when unknown. reasoning: what stood between <think> and
    </think>. response: what followed; a reply of another form is kept whole here. finish_reason: the endpoint's word,
    "stop" where it gave none, "unreadable" for a reply that is no answer and is kept as JSON. teacher: the model and
    its sampling parameters. usage: its token counts. logprobs: as OpenAI's API has them, where they were asked for.
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
    logprobs: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a line of a traces file."""
        return {name: value for name, value in vars(self).items() if name != "logprobs" or value is not None}

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
            expected = dict if name in ("teacher", "usage") else object if name in ("reference", "logprobs") else str
            if not isinstance(value, expected):
                raise ValueError(f"field '{name}': expected {expected.__name__}, found {type(value).__name__}")
        return cls(**known)


def ending(finish_reason: str | None) -> Literal["whole", "truncated", "refused"]:
    """Return what a finish reason says of an answer: only stop, eos, end_turn, stop_sequence or none is whole."""
    name = (finish_reason or "").strip().lower()
    return "whole" if name in _WHOLE else "refused" if name in _REFUSED else "truncated"


def is_whole(finish_reason: str | None) -> bool:
    """Return whether an answer came to its own end."""
    return ending(finish_reason) == "whole"


def normalise_prompt(prompt: str) -> str:
    """Return a prompt without what does not change the question: line ends, trailing and outer spaces."""
    return "\n".join([line.rstrip() for line in prompt.strip().splitlines()])


def record_id(domain: str, prompt: str, teacher: str, sampling: Mapping[str, Any], sample: int) -> str:
    """Return the sha256 (hex) of the canonical JSON of what was asked."""
    return RecordIds(domain, teacher, sampling).of(prompt, [sample])[0].hex()


class RecordIds:
    """Makes the ids of many records of a domain, see `record_id`, quickly: what they share is written once."""

    def __init__(self, domain: str, teacher: str, sampling: Mapping[str, Any]) -> None:
        # Canonical JSON has its keys in order and no spaces.
        self._before = f'{{"domain":{json.dumps(domain)},"prompt":'
        shared = {"sampling": dict(sampling), "teacher": teacher}
        self._after = "," + json.dumps(shared, sort_keys=True, separators=(",", ":"))[1:]

    def of(self, prompt: str, samples: Iterable[int]) -> list[bytes]:
        """Return the 32 bytes of the ids of several samples of a prompt."""
        start = f'{self._before}{json.dumps(normalise_prompt(prompt))},"sample":'
        return [hashlib.sha256(f"{start}{sample}{self._after}".encode()).digest() for sample in samples]


def shard_name(shard: tuple[int, int]) -> str:
    """Return the name of the folder in which part i of n is collected."""
    return f"shard-{shard[0]}-of-{shard[1]}"


def is_in_shard(text: str, shard: tuple[int, int]) -> bool:
    """Return whether a prompt or an id belongs to part i of n, which its text alone decides."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % shard[1] == shard[0]


def trace_files(traces: str | Sequence[str]) -> list[str]:
    """Return the sources that the setting `traces` names; a directory stands for the traces that `collect` wrote.

    A directory of shards stands for all of them together. UserError when some are missing.
    """
    names = [traces] if isinstance(traces, str) else traces
    if not names:
        raise UserError("traces: found an empty list, expected at least one file")
    folders = {name: bucket.local(name) if bucket.is_folder(name) else Path(name).expanduser() for name in names}
    return [file for name, path in folders.items() for file in (_files_in(path) if path.is_dir() else [name])]


def _files_in(folder: Path) -> list[str]:
    whole = folder / TRACES
    shards = shard_files(folder)
    counts = {count for _, count in shards}
    missing = {n: [i for i in range(n) if (i, n) not in shards] for n in counts}
    if shards and not whole.exists() and all(missing.values()):
        count = max(counts, key=lambda n: n - len(missing[n]))
        parts = ", ".join(shard_name((i, count)) for i in missing[count][:5])
        raise UserError(f"traces: {folder} lacks {parts}; collect the missing shards, or name the files to read")
    if not whole.exists() and not shards and any(folder.iterdir()):
        return [str(folder)]  # a folder of other files of rows
    return [*([str(whole)] if whole.exists() or not shards else []), *map(str, shards.values())]


def shard_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the traces files of the shards in a directory of collect, by (i, n), in order."""
    files = {}
    for path in folder.glob(f"shard-*-of-*/{TRACES}"):
        if match := re.fullmatch(r"shard-(\d+)-of-(\d+)", path.parent.name):
            files[int(match[2]), int(match[1])] = path
    return {(i, n): files[n, i] for n, i in sorted(files)}


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
