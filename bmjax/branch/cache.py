"""Tokenized data on disk: made once for a training's data, template and tokenizer, and mapped into memory afterwards.

A cache is an Arrow file of documents (int32 tokens, one byte of mask each), KEY.arrow, and KEY.json, which is written
last and says what it was made of. `train` and `bmjax plan` open data here, `bmjax cache` lists and clears.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from bmjax.branch.examples import Dataset, Encoding, Example, Tally, build_dataset, dataset_of, documents
from bmjax.chat.forms import UNSUPPORTED
from bmjax.io import bucket
from bmjax.io.atomic import replacing_file, write_atomic
from bmjax.io.rows import Row, mapped, read_rows
from bmjax.io.states import data_states
from bmjax.log import Bar, Log, progress_bar, silent
from bmjax.parallel import processes

VERSION = 2  # of the tokens that the same rows give; a new one makes all caches anew
SMALL = 2**24  # bytes of files below which data are tokenized into memory, within seconds
_BATCH_TOKENS = 2**22  # of a record batch of the file
_COUNTED_TOKENS = 2**16  # between two looks of the progress bar


class MappedExamples(Sequence[Example]):
    """The documents of an Arrow file, which stay on disk until they are used."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for number in range(reader.num_record_batches):
            tokens, mask = reader.get_batch(number).columns
            self._columns.append((tokens.offsets.to_numpy(), tokens.values.to_numpy(), mask.values.to_numpy()))
        self._starts = np.cumsum([0, *(len(offsets) - 1 for offsets, _, _ in self._columns)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | Sequence[Example]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = int(np.searchsorted(self._starts, number, "right")) - 1
        offsets, tokens, mask = self._columns[batch]
        start, stop = offsets[number - self._starts[batch] :][:2]
        return Example(tokens[start:stop], mask[start:stop])


@dataclass(frozen=True)
class Cache:
    """A cache that is there. files: those it was made of, as `data_states` gave them; size: bytes on disk."""

    path: Path
    data: list[str]
    files: list[Any]
    size: int
    used: float  # seconds since 1970

    @property
    def is_dead(self) -> bool:
        """Whether its data have changed or gone since."""
        return data_states(self.data) != self.files

    def remove(self) -> None:
        """Remove it from the disk."""
        self.path.with_suffix(".json").unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".lock").unlink(missing_ok=True)


def folder() -> Path:
    """Return the directory of all caches: $BMJAX_CACHE, or `bmjax` in the user's cache directory."""
    return bucket.cache_folder("tokens")


def caches() -> list[Cache]:
    """Return all caches, the largest first."""
    entries = []
    for path in folder().glob("*.json") if folder().is_dir() else ():
        values, arrow = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".arrow")
        if arrow.is_file():
            entries.append(Cache(arrow, values["data"], values["files"], arrow.stat().st_size, path.stat().st_mtime))
    return sorted(entries, key=lambda cache: -cache.size)


def load(data: str | Sequence[str], columns: Mapping[str, str], encoding: Encoding, log: Log) -> Dataset:
    """Return the documents of data: tokenized into memory where they are small, else from a cache.

    The first process makes a cache that is missing; the others wait for it and map the same file. Where they do not see
    it, on a disk of their own, the first of them there makes it, and the others on that disk wait.

    Arguments:
        data, columns: names of data, see `read_rows`, and templates for rows of other columns, see `mapped`.
        encoding: how rows become documents.
        log: takes a line where a cache is made, and names those of the same data that are dead.
    """
    names = [data] if isinstance(data, str) else list(data)
    files = data_states(names)
    rows = mapped(read_rows(names, log=log), columns, UNSUPPORTED)
    if sum(size for _, size, _ in files) < SMALL:
        return build_dataset(rows, encoding)
    description = {"data": names, "files": files, "columns": dict(columns), **_describe(encoding), "version": VERSION}
    path = folder() / f"{hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]}.arrow"
    if processes.is_main():
        _make(path, rows, encoding, description, log)
    processes.wait_for_work("bmjax/tokens")
    if not processes.is_main():
        _make(path, rows, encoding, description, log)
    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    os.utime(path.with_suffix(".json"))
    return Dataset(MappedExamples(path), **facts["dataset"] | {"remarks": tuple(facts["dataset"]["remarks"])})


def _describe(encoding: Encoding) -> dict[str, Any]:
    text = encoding.tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(), "template": encoding.template,
        "seq_len": encoding.seq_len, "overlong": encoding.overlong, "turns": encoding.turns,
        "ignore": sorted(encoding.ignore), "end_tokens": sorted(encoding.end_tokens),
    }  # fmt: skip


def _make(path: Path, rows: Iterable[Row], encoding: Encoding, description: Mapping[str, Any], log: Log) -> None:
    """Tokenize rows into a cache, unless it is there. Of several processes on a disk one does, the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back when its holder dies
        _make_alone(path, rows, encoding, description, log)


def _make_alone(path: Path, rows: Iterable[Row], encoding: Encoding, description: Mapping[str, Any], log: Log) -> None:
    if path.is_file() and path.with_suffix(".json").is_file():
        log(f"tokenized before: {path}")
        return
    dead = [cache for cache in caches() if cache.data == description["data"] and cache.is_dead]
    if dead:
        size = f"{sum(cache.size for cache in dead) / 1e9:.2f} GB"
        log(f"{len(dead)} caches of these data before they changed: {size}; `bmjax cache --clear` removes them")
    log(f"tokenizing into {path} ...")
    began, tally = time.monotonic(), Tally()
    shown = progress_bar("tokenizing", "tokens", shown=log is not silent)
    with replacing_file(path) as file, shown as bar:
        _write(file, documents(rows, encoding, tally), bar)
    facts = asdict(dataset_of((), tally))
    facts.pop("examples")
    write_atomic(path.with_suffix(".json"), json.dumps({**description, "dataset": facts}, indent=1))
    seconds = time.monotonic() - began
    log(f"{tally.tokens:,} tokens in {seconds:.0f} s, {tally.tokens / seconds:,.0f} a second")


def _write(file: Any, examples: Iterator[Example], bar: Bar) -> None:
    """Write documents as record batches of an Arrow file, one batch in memory at a time. bar: counts their tokens."""
    import pyarrow as pa

    schema = pa.schema([("tokens", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8()))])
    batch: list[Example] = []
    with pa.ipc.new_file(file, schema) as writer:

        def flush() -> None:
            offsets = pa.array(np.cumsum([0, *(len(example.tokens) for example in batch)]), pa.int32())
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))
                for arrays in ([example.tokens for example in batch], [example.loss_mask for example in batch])
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            batch.clear()

        tokens = uncounted = 0
        for example in examples:
            batch.append(example)
            tokens += len(example.tokens)
            uncounted += len(example.tokens)
            if uncounted >= _COUNTED_TOKENS:
                bar.update(uncounted)
                uncounted = 0
            if tokens >= _BATCH_TOKENS:
                flush()
                tokens = 0
        if batch:
            flush()
