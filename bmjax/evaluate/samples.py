"""The samples of a task on disk: every answer is appended as it arrives, and every verdict as it is found.

OUTPUT/samples/TASK.jsonl holds a line for each. A killed run leaves at most a torn line, which the next one cuts off,
and it asks for nothing that is there. A line with only some of the fields changes the earlier line with its id. At the
end the file is written anew, one line a sample, in the order of the questions. Answers to what is no longer asked
(another prompt, other sampling, fewer samples) are kept in TASK.former.jsonl, where a later run finds them.
"""

import json
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from bmjax.evaluate.questions import Asked
from bmjax.io import bucket
from bmjax.io.atomic import replacing_file
from bmjax.io.jsonl import JsonLines, json_line, read_lines

_SYNC_EVERY_SECONDS = 1.0
_LONGEST_REFERENCE = 10_000  # bytes as JSON; tests of a program can be a hundred megabytes

Sample = dict[str, Any]


def samples_file(output: str | Path, task: str) -> Path:
    """Return the file of a task's samples in an output directory."""
    return Path(output) / "samples" / f"{task}.jsonl"


def _former_file(output: str | Path, task: str) -> Path:
    """Return the file of answers to what was asked once."""
    return samples_file(output, task).with_name(f"{task}.former.jsonl")


def stored_samples(output: str | Path, task: str) -> dict[str, Sample]:
    """Return all samples of a task that are in an output directory, by their ids."""
    return read_samples(_former_file(output, task)) | read_samples(samples_file(output, task))


def read_samples(path: str | Path) -> dict[str, Sample]:
    """Return the samples of a file by their ids, each with the fields of all its lines; none without a file."""
    samples: dict[str, Sample] = {}
    if not bucket.local(path).is_file():
        return samples
    for _, line in read_lines(path):
        if isinstance(line, dict) and isinstance(line.get("id"), str):
            samples.setdefault(line["id"], {}).update(line)
    return {identity: sample for identity, sample in samples.items() if "answer" in sample}


class Samples:
    """The samples of one task while it is evaluated, used as a context manager by one process; threads may append."""

    def __init__(self, output: str | Path, task: str, asked: Iterable[Asked]) -> None:
        self.path = samples_file(output, task)
        self._former = _former_file(output, task)
        self._wanted = [sample.id for sample in asked]
        self._lock = threading.Lock()
        self._lines = JsonLines(self.path, sync_every=2**20)
        self._synced = time.monotonic()
        try:
            # The former file is written first when samples move, so that no answer is ever in neither.
            self.by_id = stored_samples(output, task)
        except BaseException as error:
            self._lines.__exit__(type(error))
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.__exit__(kind)

    def append(self, identity: str, fields: Mapping[str, Any]) -> None:
        """Keep fields of a sample: it survives the end of this process at once, a power cut after a second or two."""
        with self._lock:
            self.by_id.setdefault(identity, {"id": identity}).update(fields)
            self._lines.append({"id": identity, **fields})
            if time.monotonic() - self._synced >= _SYNC_EVERY_SECONDS:
                self._synced = time.monotonic()
                self._lines.sync()

    def settle(self) -> None:
        """Write the file anew: the wanted samples in their order, all others into the former file."""
        wanted = set(self._wanted)
        former = {identity: sample for identity, sample in self.by_id.items() if identity not in wanted}
        if former:
            _write(self._former, former.values())
        _write(self.path, (self.by_id[identity] for identity in self._wanted if identity in self.by_id))
        if not former and bucket.local(self._former).exists():
            bucket.local(self._former).unlink()


def _write(path: Path, samples: Iterable[Sample]) -> None:
    with replacing_file(path) as file:
        file.writelines(map(json_line, samples))


def shown_reference(reference: Any) -> Any:
    """Return a reference as samples hold it: itself, or its size where it is very long."""
    size = len(json.dumps(reference, default=str))
    return reference if size <= _LONGEST_REFERENCE else {"bytes": size, "omitted": "very long; it is in the data"}
