"""The slots: which request is where in the cache, how many fit into the memory, growth, shrinking and copies.

The engine and its reader of prompts share one `SlotTable`. Nothing here runs the model. The cache's size moves along
buckets of width and length, one bucket at a time, so that the programs that move it are few.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from bmjax.config import UserError
from bmjax.generate import cache as caches
from bmjax.generate.answer import Answer
from bmjax.generate.programs import PACKED
from bmjax.model.attention.cached import Pieces
from bmjax.model.config import ModelConfig
from bmjax.parallel import turns

LEAST_SHARED = 32  # tokens of a common beginning that are worth a copy
NOTHING = np.zeros(0, np.int32)

Piece = tuple[int, int, int, int, int]  # row of a chunk, offset in it, slot, start in that, tokens


class SlotTable:
    """The slots of the batch and the cache behind them, on the mesh in scope when it is made.

    Arguments:
        config: of the model.
        dtype: of the computation and the cache.
        slots: the most rows that are computed together; rounded up to a multiple of the mesh's data x fsdp.
        context: the most tokens of prompt and answer.
        memory: bytes that the cache may take on a device; None: most of what is free.
        quantized: keep keys and values as int8.
        columns: how keys lie in the cache, see `cached.Slots`.
        buckets: the sizes that the cache may have.

    Attributes:
        rows: the request in each slot, or None.
        resident: of each slot that is free, the tokens whose keys and values still lie in it.
        width, length: how many slots the cache has now, and the tokens of each; 0 before the first request.
        cache, hidden: keys and values, and the hidden state [B, D] of every row's last token.

    Raises UserError where not even the fewest slots of the context fit into the memory.
    """

    def __init__(
        self, config: ModelConfig, dtype: Any, slots: int, context: int, memory: int | None, quantized: bool,
        columns: bool, buckets: caches.Buckets,
    ) -> None:  # fmt: skip
        mesh = jax.sharding.get_mesh()
        self.shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        self.slots, self.context, self.columns = -(-slots // self.shards) * self.shards, context, columns
        self._config, self._dtype, self._quantized = config, dtype, quantized
        self.widths = buckets.widths(self.slots, self.shards)
        self.lengths = buckets.lengths(context)

        # How many tokens the slots may hold together.
        budget = caches.free_memory() if memory is None else memory
        tensor = 1 if mesh.empty else mesh.shape["tensor"]
        head_shards = tensor if config.num_kv_heads % tensor == 0 else 1
        bytes_a_token = caches.token_bytes(config, dtype, quantized) // head_shards
        self._capacity = budget // bytes_a_token * self.shards
        least = self.widths[0] * self.lengths[-1]
        if least > self._capacity:
            raise UserError(
                f"generation: the cache of a context of {context} tokens takes "
                f"{least * bytes_a_token / self.shards / 2**20:,.0f} MiB a device, the budget is "
                f"{budget / 2**20:,.0f} MiB; set a shorter context, fewer slots, an int8 cache or more devices"
            )
        self.clear()

    def clear(self) -> None:
        """Forget all rows and give the cache's memory back."""
        self.width = self.length = 0
        self.cache: caches.Cache = []
        self.hidden: Any = None
        self.rows: list[Answer | None] = []
        self.resident: list[np.ndarray] = []

    @property
    def active(self) -> list[Answer]:
        """The requests that have a slot."""
        return [row for row in self.rows if row is not None]

    def holds(self, width: int, length: int) -> bool:
        """Return whether the memory holds so many slots of so many tokens."""
        return width * length <= self._capacity

    def fits(self, rows: int, tokens: int) -> bool:
        """Return whether the memory holds so many rows, the longest of so many tokens."""
        return self.holds(caches.bucket(rows, self.widths), caches.bucket(tokens, self.lengths))

    def resize(self, rows: int, tokens: int, are_more_waiting: bool) -> None:
        """Make the cache as wide and long as the next call needs; smaller only where it is clearly too large.

        Arguments:
            rows: requests with a slot, and those that get one now.
            tokens: in the longest of them after the next call.
            are_more_waiting: keep the width, for others will fill it.
        """
        least_width, least_length = caches.bucket(rows, self.widths), caches.bucket(tokens, self.lengths)
        width, length = max(self.width, least_width), max(self.length, least_length)
        if not are_more_waiting:
            width = least_width
        if 4 * least_length <= length:
            length = least_length
        if not self.holds(width, length):
            width, length = least_width, least_length
        self.move_to(width, length)

    def move_to(self, width: int, length: int) -> None:
        """Give the cache another width and length, keeping what its rows hold."""
        if not self.cache:
            slots = caches.allocate(self._config, width, length, self._dtype, self._quantized, self.columns)
            self.cache = turns.finished(slots)
            self.hidden = turns.finished(caches.no_hidden(self._config, width, self._dtype))
            self.rows, self.resident = [None] * width, [NOTHING] * width
            self.width, self.length = width, length
            return
        for next_width, next_length in self._path(width, length):
            order = None
            if next_width != self.width:
                # The rows in use come first, then free slots with something in them.
                rank = sorted(range(self.width), key=lambda slot: (self.rows[slot] is None, -len(self.resident[slot])))
                kept = rank[:next_width]
                order = np.array(kept + [0] * (next_width - len(kept)), np.int32)
                empty = next_width - len(kept)
                self.rows = [self.rows[slot] for slot in kept] + [None] * empty
                self.resident = [self.resident[slot] for slot in kept] + [NOTHING] * empty
                self.hidden = turns.finished(caches.rows_of(self.hidden, order))
                for slot, row in enumerate(self.rows):
                    if row is not None:
                        row.slot = slot
            caches.resize(self.cache, order, next_length, self.columns)
            self.resident = [tokens[:next_length] for tokens in self.resident]
            self.width, self.length = next_width, next_length

    def _path(self, width: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the buckets on the way to a size: what shrinks first, so that the memory holds each of them."""
        here = [self.width, self.length]
        axes = [(0, self.widths, width), (1, self.lengths, length)]
        for axis, buckets, target in sorted(axes, key=lambda item: item[2] > here[item[0]]):
            start, end = buckets.index(here[axis]), buckets.index(target)
            for index in range(start + 1, end + 1) if end > start else range(start - 1, end - 1, -1):
                here[axis] = buckets[index]
                yield here[0], here[1]

    def compile_moves(self) -> None:
        """Run the programs that move the cache from its present size to the buckets beside it, and keep nothing."""
        for width in (width for pair in pairwise(self.widths) if self.width in pair for width in pair):
            if width != self.width and self.holds(width, self.length):
                order = np.zeros(width, np.int32)
                turns.finished((caches.rows_of(self.hidden, order), self._resized(order, self.length)))
        for length in (length for pair in pairwise(self.lengths) if self.length in pair for length in pair):
            if length != self.length and self.holds(self.width, length):
                turns.finished(self._resized(None, length))

    def _resized(self, rows: np.ndarray | None, length: int) -> Any:
        return caches.resized(self.cache[0], rows, length, self.columns)

    def free(self, answer: Answer) -> None:
        """Take a request from its slot. What it has read and drawn stays there until another one comes."""
        self.rows[answer.slot] = None
        self.resident[answer.slot] = np.array([*answer.prompt[: answer.read], *answer.drawn], np.int32)

    def place(self, answer: Answer, share: bool) -> None:
        """Give a request a free slot, with as much of its prompt as another slot or this one holds.

        share: whether to look for the prompt's beginning in the cache.
        """
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        source, shared = self._longest_shared(answer.prompt) if share else (-1, 0)
        # A free slot that holds the beginning is used itself; else one that holds least.
        answer.slot = source if source in free else min(free, key=lambda slot: len(self.resident[slot]))
        if shared and source != answer.slot:
            self.copy(source, answer.slot)
        answer.read = shared
        self.rows[answer.slot], self.resident[answer.slot] = answer, NOTHING

    def _longest_shared(self, prompt: np.ndarray) -> tuple[int, int]:
        """Return the slot that holds most of a prompt's beginning and how many tokens; its last token is read anew."""
        best = (-1, 0)
        last = len(prompt) - 1
        if last < LEAST_SHARED:
            return best
        for slot, row in enumerate(self.rows):
            tokens, known = (self.resident[slot], len(self.resident[slot])) if row is None else (row.prompt, row.read)
            size = min(known, last)
            # Most prompts differ in the first tokens already.
            if size < LEAST_SHARED or size <= best[1] or tokens[LEAST_SHARED - 1] != prompt[LEAST_SHARED - 1]:
                continue
            different = np.flatnonzero(tokens[:size] != prompt[:size])
            size = int(different[0]) if len(different) else size
            if size >= LEAST_SHARED and size > best[1]:
                best = (slot, size)
        return best

    def copy(self, source: int, target: int) -> None:
        """Copy a whole slot with its hidden state, that of the last token that was read."""
        copied = caches.copy(self.cache, self.hidden, np.int32(source), np.int32(target), self.columns)
        self.cache, self.hidden = turns.finished(copied)

    def insert(self, chunk: Any, h_RTD: Any, pieces: Sequence[Piece]) -> None:
        """Put pieces of a chunk, with its hidden states, into the slots."""
        table = np.zeros((PACKED * h_RTD.shape[0], 5), np.int32)
        if pieces:
            table[: len(pieces)] = pieces
        arrays = Pieces(*table.T.copy())
        inserted = caches.insert(self.cache, self.hidden, chunk, h_RTD, arrays, np.int32(len(pieces)), self.columns)
        self.cache, self.hidden = turns.finished(inserted)

    def take(self, slot: int) -> caches.Cache:
        """Return the cache of one slot."""
        return turns.finished(caches.take(self.cache, np.int32(slot)))
