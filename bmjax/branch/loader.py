"""The stream of batches of a training: documents packed into rows, rows drawn into batches, read ahead on threads.

A batch is a pure function of (documents, settings, step). So a resumed training sees what the undisturbed one would
have seen, on any mesh and any number of processes.
"""

import contextlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from copy import copy
from functools import lru_cache, partial
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch.examples import Dataset
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import sharding

ROW_MULTIPLE = 64  # unpacked rows are padded to the longest document, rounded up to this
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # the buffer counts batches


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows by best-fit decreasing, within 11/9 of the least number of rows.

    The longest document goes first, each into the row with the least room left. It looks at lengths (tokens, at most
    `capacity`) alone, so every process packs alike. Returns rows as lists of document numbers.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        tightest = bisect_left(room, (length, -1))
        if tightest < len(room):
            free, row = room.pop(tightest)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(room, (free - length, row))
    return rows


class Loader:
    """The batches of a training by step number; the arguments are keys of a training's settings.

    Documents are packed into rows once. The order of the rows is drawn anew every epoch from (seed, epoch). An epoch's
    last batch is filled up with empty rows, so that an epoch has each row once; the loss is a mean over tokens, so
    empty rows weigh nothing.

    rows: the documents of each row, by number. length: tokens of a row. fill: share of positions with a token.
    documents: the most segments of a row, padding counted as one.
    """

    def __init__(self, dataset: Dataset, seq_len: int, batch: int, packing: bool, shuffle: bool, seed: int) -> None:
        lengths = [len(example.tokens) for example in dataset.examples]
        self.dataset, self.batch, self.shuffle, self.seed = dataset, batch, shuffle, seed
        if packing:
            order = np.random.default_rng([seed, 0]).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
            packed = best_fit([lengths[i] for i in order], seq_len)
            self.rows = [[int(order[i]) for i in row] for row in packed]
            self.length = seq_len
        else:
            self.rows = [[i] for i in range(len(lengths))]
            self.length = min(seq_len, -(-max(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE)
        self.fill = sum(lengths) / (len(self.rows) * self.length)
        self.documents = max(len(row) + (sum(lengths[i] for i in row) < self.length) for row in self.rows)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see each row once."""
        return -(-len(self.rows) // self.batch)

    def with_batch(self, batch: int) -> "Loader":
        """Return the same rows in batches of another size."""
        other = copy(self)
        other.batch = batch
        return other

    def _draw_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, 1 + epoch]).permutation(len(self.rows))

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of a step's batch by number; at the end of an epoch they may be fewer than `batch`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[index * self.batch : (index + 1) * self.batch]

    def at(self, step: int, positions: range | None = None) -> Batch[np.ndarray]:
        """Lay out the batch of optimizer step `step`, from 0, in host memory; or only its rows at `positions`."""
        rows = self.rows_of(step)
        positions = range(self.batch) if positions is None else positions
        shape = (len(positions), self.length)
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        loss_mask = np.zeros(shape, np.uint8)
        for b, position in enumerate(positions):
            start = 0
            for segment, document in enumerate(self.rows[rows[position]] if position < len(rows) else (), 1):
                example = self.dataset.examples[document]
                stop = start + len(example.tokens)
                tokens[b, start:stop], segment_ids[b, start:stop] = example.tokens, segment
                loss_mask[b, start:stop] = example.loss_mask
                start = stop
        return Batch(tokens, segment_ids, loss_mask)

    def real_tokens(self, step: int) -> int:
        """Count the tokens of documents in the whole batch of `step`."""
        documents = (document for row in self.rows_of(step) for document in self.rows[row])
        return sum(len(self.dataset.examples[document].tokens) for document in documents)


def load_batch(mesh: Mesh, loader: Loader, step: int) -> Batch[jax.Array]:
    """Return the batch of optimizer step `step` on the mesh; a process lays out the rows of its own devices only."""
    shape = (loader.batch, loader.length)
    layout = sharding(mesh, ("batch", "length"), shape)
    rows_at = lru_cache(maxsize=None)(lambda start, stop: loader.at(step, range(start, stop)))

    def shard(field: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(loader.batch)
        return getattr(rows_at(start, stop), field)[:, index[1]]

    fields = ("tokens", "segment_ids", "loss_mask")
    return Batch(*(jax.make_array_from_callback(shape, layout, partial(shard, field)) for field in fields))


def read_ahead(mesh: Mesh, loader: Loader, first: int, stop: int) -> contextlib.closing[Any]:
    """Return a context of the batches of steps first..stop-1 on the mesh, in order, the next few laid out on threads.

    The threads end with the block. An error in a thread is raised by the `next` that wants its batch.
    """
    batches = grain.MapDataset.range(first, stop).map(partial(load_batch, mesh, loader))
    return contextlib.closing(iter(batches.to_iter_dataset(READ_AHEAD)))
