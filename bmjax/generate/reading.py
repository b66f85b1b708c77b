"""Reads prompts into the cache: packs short ones, cuts long ones into chunks, reads what several share once.

The engine places requests here and calls `read` in every step; it decides who enters and what is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bmjax.generate import cache as caches
from bmjax.generate.answer import Answer, with_logprobs
from bmjax.generate.programs import PACKED, Programs
from bmjax.generate.requests import Token
from bmjax.generate.slots import SlotTable
from bmjax.parallel import turns

CHUNKS = {"cpu": (64, 256)}  # tokens of prompts that a row reads at once, by platform
OTHER_CHUNKS = (128, 1024)


class PromptReader:
    """Reads the prompts of requests that have a slot.

    Attributes:
        chunks: tokens that a row reads at once, two sizes.
        reading: requests whose prompts are not yet read.
    """

    def __init__(self, programs: Programs, weights: Any, table: SlotTable) -> None:
        self._programs, self._weights, self._table = programs, weights, table
        self.chunks = CHUNKS.get(jax.default_backend(), OTHER_CHUNKS)
        self.reading: list[Answer] = []

    def place(self, answer: Answer) -> None:
        """Give a request a slot; its prompt is read from where it is not in the cache."""
        is_scored = answer.request.prompt_logprobs  # which needs every token's hidden state
        if not is_scored:
            same = (row for row in self.reading if row.request.tokens == answer.request.tokens)
            answer.leader = next((row for row in same if row.leader is None), None)
        self._table.place(answer, share=not is_scored and answer.leader is None)
        self.reading.append(answer)

    def drop(self, answer: Answer) -> None:
        """Forget a request; one that waited for its prompt reads it itself."""
        if answer in self.reading:
            self.reading.remove(answer)
            for follower in self.reading:
                if follower.leader is answer:
                    follower.leader = None

    def read(self, limit: int, is_interrupted: Callable[[], bool]) -> Iterator[Answer]:
        """Read chunks of prompts, about `limit` tokens or until something else is to be done.

        Yields requests whose prompts have been read.
        """
        read = 0
        while self.reading and read < limit and not is_interrupted():
            leaders = [answer for answer in self.reading if answer.leader is None]
            new = [answer for answer in leaders if answer.read == 0]
            read += self._read_first(new) if new else self._read_next(leaders[0])
            for answer in [answer for answer in leaders if answer.ready]:
                yield from self._finish(answer)

    def _finish(self, answer: Answer) -> list[Answer]:
        """Hand a prompt that has been read to the rows that wait for it; return all of them."""
        followers = [row for row in self.reading if row.leader is answer]
        for follower in followers:
            self._table.copy(answer.slot, follower.slot)
            follower.read, follower.leader = answer.read, None
        for row in (done := [answer, *followers]):
            self.reading.remove(row)
        return done

    def _read_first(self, new: Sequence[Answer]) -> int:
        """Read the first chunks of prompts, packed into rows; return the tokens computed."""
        rows = self._table.shards
        total = sum(len(answer.prompt) for answer in new[: PACKED * rows])
        size = caches.bucket(max(len(new[0].prompt), -(-total // rows)), self.chunks)
        tokens, segments, positions = np.zeros((3, rows, size), np.int32)
        used, packed = [0] * rows, [0] * rows
        placed: list[tuple[Answer, int]] = []
        pieces = []
        for answer in new:
            # The next row with room; a prompt to be scored has one for itself, and a long one fills it.
            length = min(len(answer.prompt), size)
            needed = size if answer.request.prompt_logprobs else length
            row = next((r for r in range(rows) if used[r] + needed <= size and packed[r] < PACKED), None)
            if row is None:
                continue
            first = used[row]
            tokens[row, first : first + length] = answer.prompt[:length]
            packed[row] += 1
            segments[row, first : first + length] = packed[row]
            positions[row, first : first + length] = np.arange(length)
            used[row] += needed
            pieces.append((row, first, answer.slot, 0, length))
            placed.append((answer, row))
            answer.read = length
        h_RTD, chunk = self._run(self._programs.first_chunk, tokens, segments, positions)
        self._table.insert(chunk, h_RTD, pieces)
        for answer, row in placed:
            self._score(answer, h_RTD, row, 0)
        return rows * size

    def _read_next(self, answer: Answer) -> int:
        """Read the next chunk of one prompt; return the tokens computed."""
        start = answer.read
        size = caches.bucket(len(answer.prompt) - start, self.chunks)
        piece = answer.prompt[start : start + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(piece)] = piece
        h_1TD, chunk = self._run(self._programs.next_chunk, self._table.take(answer.slot), tokens, np.int32(start))
        self._table.insert(chunk, h_1TD, [(0, 0, answer.slot, start, len(piece))])
        answer.read += len(piece)
        self._score(answer, h_1TD, 0, start)
        return size

    def _run(self, program: Any, *arguments: Any) -> Any:
        return turns.finished(program(self._weights, *arguments))

    def _score(self, answer: Answer, h_RTD: Any, row: int, start: int) -> None:
        """Compute the log-probabilities of the tokens after those of a chunk, where they are asked for."""
        if not answer.request.prompt_logprobs:
            return
        first = (Token(int(answer.prompt[0])),) if start == 0 else ()
        targets = np.zeros(h_RTD.shape[1], np.int32)
        following = answer.prompt[start + 1 : start + 1 + len(targets)]
        targets[: len(following)] = following
        scores = self._run(self._programs.score, h_RTD, np.int32(row), targets)
        parts = [np.asarray(part)[: len(following)] for part in scores]
        count = answer.request.sampling.logprobs or 0
        answer.prompt_tokens = (*answer.prompt_tokens, *first, *with_logprobs(following, parts, count))

    def compile_ahead(self) -> None:
        """Run each program of reading once with nothing to read, in the table's present size.

        The table holds no row then.
        """
        rows = self._table.shards
        for size in self.chunks:
            nothing = np.zeros((3, rows, size), np.int32)
            h_RTD, chunk = self._run(self._programs.first_chunk, *nothing)
            self._table.insert(chunk, h_RTD, [])
            self._run(self._programs.score, h_RTD, np.int32(0), np.zeros(size, np.int32))
            h_1TD, chunk = self._run(self._programs.next_chunk, self._table.take(0), nothing[0, :1], np.int32(0))
            self._table.insert(chunk, h_1TD, [])
            self._run(self._programs.score, h_1TD, np.int32(0), np.zeros(size, np.int32))
        self._table.copy(0, 0)
