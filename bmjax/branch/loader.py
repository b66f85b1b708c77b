"""The stream of batches: a pure function of (dataset, settings, step), so a resumed run sees what it would have."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bmjax.branch.examples import Dataset
from bmjax.branch.packing import best_fit, fill

ROW_MULTIPLE = 64  # unpacked rows are padded to the longest document, rounded up to this


@dataclass(frozen=True)
class Batch:
    """Arrays [B, T]: tokens int32, segment_ids int32 (1.. per document, 0 padding), loss_mask uint8."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def real_tokens(self) -> int:
        return int(np.count_nonzero(self.segment_ids))


class Loader:
    """Batches by step number. Rows are packed once; their order is drawn anew every epoch from (seed, epoch).

    An epoch's last batch is filled up with empty rows, so each row is seen exactly once an epoch; the loss is a
    mean over tokens, so empty rows weigh nothing. documents: the most of a row, padding counted as one.
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
        self.fill = fill(lengths, self.rows, self.length)
        self.documents = max(len(row) + (sum(lengths[i] for i in row) < self.length) for row in self.rows)
        self.steps_per_epoch = -(-len(self.rows) // batch)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, 1 + epoch]).permutation(len(self.rows))

    def at(self, step: int, places: range | None = None) -> Batch:
        """The batch of optimizer step `step`, counted from 0; or only its rows at `places`, in that order."""
        chosen = self._chosen(step)
        places = range(self.batch) if places is None else places
        shape = (len(places), self.length)
        tokens, segments, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
        for b, place in enumerate(places):
            start = 0
            for segment, document in enumerate(self.rows[chosen[place]] if place < len(chosen) else (), 1):
                example = self.dataset.examples[document]
                stop = start + len(example.tokens)
                tokens[b, start:stop], segments[b, start:stop] = example.tokens, segment
                mask[b, start:stop] = example.loss_mask
                start = stop
        return Batch(tokens, segments, mask)

    def real_tokens(self, step: int) -> int:
        """Tokens of documents in the whole batch of `step`."""
        documents = (document for row in self._chosen(step) for document in self.rows[row])
        return sum(len(self.dataset.examples[document].tokens) for document in documents)

    def _chosen(self, step: int) -> np.ndarray:
        """The rows of the batch; fewer than `batch` at the end of an epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self.batch : (place + 1) * self.batch]
