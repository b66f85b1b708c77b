"""The engine: continues many prompts together. Finished rows leave, waiting ones enter, and nothing is compiled anew.

A row of the batch has a slot in the key/value cache. A step admits waiting requests, reads chunks of their prompts, and
draws some tokens of every row in one call of a compiled program. `prompts.generate`, the server and evaluation use it;
it knows token ids only, no text. slots.py has the cache, reading.py the prompts.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.generate import sampling
from bmjax.generate.answer import Answer, check_prompt, with_logprobs
from bmjax.generate.cache import MANY, Buckets
from bmjax.generate.programs import programs
from bmjax.generate.reading import PromptReader
from bmjax.generate.requests import FinishReason, OnTokens, Request, Token
from bmjax.generate.slots import SlotTable
from bmjax.log import Log, silent
from bmjax.model import qwen2
from bmjax.model.attention import paged
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import sharding

MOST_READ = 8  # times `prefill_tokens` are read in a step while more rows read than draw


class Engine:
    """Continues requests together, on the mesh in scope when it is made; `requests.Generator`.

    Arguments:
        config: of the model.
        params: its parameters, which are cast and laid out once, here.
        end_ids: tokens that end every answer.
        dtype: of the computation and the cache.
        slots: the most rows that are computed together; rounded up to a multiple of the mesh's data x fsdp.
        context: the most tokens of prompt and answer; None: the model's.
        memory: bytes that the cache may take on a device; None: most of what is free.
        quantized_cache: keep keys and values as int8 with a scale for every token and head.
        attention: the kernel that reads the cache, see `model.attention.paged`; auto is the device's, or else xla.
        buckets: the sizes that the cache may have; fewer of them compile sooner.
        tokens_per_call: tokens that are drawn of every row before the host looks at them.
        prefill_tokens: tokens of prompts that a step reads before other rows get their next tokens, see MOST_READ.
        log: told when the device's attention kernel cannot be used.

    `submit` and `cancel` may be called by any thread, `step` by one at a time, which also calls `on_tokens`.
    Raises UserError where not even one slot of the context fits into the memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        end_ids: Sequence[int],
        *,
        dtype: Any = jnp.float32,
        slots: int = 64,
        context: int | None = None,
        memory: int | None = None,
        quantized_cache: bool = False,
        attention: paged.Kernel = "auto",
        buckets: Buckets = MANY,
        tokens_per_call: int = 8,
        prefill_tokens: int = 1024,
        log: Log = silent,
    ) -> None:
        mesh = jax.sharding.get_mesh()
        self._mesh = None if mesh.empty else mesh
        self._config = config
        self._tokens_per_call, self._prefill_tokens = tokens_per_call, prefill_tokens
        self._end_ids = frozenset(end_ids)
        self.context = min(context or config.max_length, config.max_length)
        dtype = jnp.dtype(dtype)
        self._weights = qwen2.unstack(config, params, dtype, self._mesh)
        self.attention, reason = paged.choose(attention, config, dtype, quantized_cache)
        columns = self.attention == "xla" and jax.default_backend() == "cpu"
        self._table = SlotTable(config, dtype, slots, self.context, memory, quantized_cache, columns, buckets)
        if reason:
            log(f"generation: attention in plain XLA: {reason}")
        self._programs = programs(config, str(dtype), quantized_cache, tokens_per_call, self.attention, columns)
        self._reader = PromptReader(self._programs, self._weights, self._table)
        self._unseen: Any = None  # [B, V] bool: no token, where no row has a repetition penalty
        self._lock = threading.Lock()  # of the next two
        self._waiting: deque[Answer] = deque()
        self._cancelled: list[Answer] = []

    @property
    def slots(self) -> int:
        """The most rows that are computed together."""
        return self._table.slots

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._table.active)

    def submit(self, request: Request, on_tokens: OnTokens) -> Answer:
        """Queue a request; see `requests.Generator`. UserError for one that the model cannot answer."""
        settings = request.sampling
        scoring = request.prompt_logprobs and settings.max_new_tokens == 0
        sampling.check(settings, scoring=request.prompt_logprobs)
        check_prompt(self._config, request.tokens, "prompt", self.context, scoring)
        room = min(settings.max_new_tokens, self.context - len(request.tokens))
        ends = frozenset(settings.end_ids) | (frozenset() if settings.ignore_end else self._end_ids)
        prompt = np.array(request.tokens, np.int32)
        answer = Answer(request, on_tokens, prompt, room, ends)
        with self._lock:
            self._waiting.append(answer)
        return answer

    def cancel(self, running: Answer) -> None:
        """End a request with 'cancelled' at the next step; one that has ended stays as it is."""
        with self._lock:
            self._cancelled.append(running)

    def step(self) -> bool:
        """Admit waiting requests, read prompts, draw some tokens of each row; return whether work is left."""
        with self._on_mesh():
            self._drop_cancelled()
            self._admit()
            for answer in self._reader.read(self._read_limit(), lambda: bool(self._cancelled)):
                if answer.room == 0:  # only its prompt's scores were asked for
                    self._end(answer, [], "length")
            if any(row.ready for row in self._table.active):
                self._draw()
        with self._lock:
            return bool(self._waiting or self._cancelled or self._table.active)

    def _read_limit(self) -> int:
        """Return how many tokens of prompts a step reads: more while most rows would only watch the others draw."""
        reading = len(self._reader.reading)
        return self._prefill_tokens * (MOST_READ if reading > self.running - reading else 1)

    def run(self) -> None:
        """Step until no work is left."""
        while self.step():
            pass

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            yield

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled = [answer for answer in dict.fromkeys(self._cancelled) if answer.finish_reason is None]
            self._cancelled = []
            for answer in cancelled:
                if answer.slot < 0:
                    self._waiting.remove(answer)
        for answer in cancelled:
            self._end(answer, [], "cancelled")

    def _end(self, answer: Answer, tokens: Sequence[Token], reason: FinishReason) -> None:
        """Free a request's slot and tell its last tokens."""
        answer.finish_reason = reason
        if answer.slot >= 0:
            self._table.free(answer)
        self._reader.drop(answer)
        answer.on_tokens(tokens, reason)

    def _admit(self) -> None:
        """Give slots to waiting requests in order, as far as all rows' answers are sure to fit into the memory."""
        active = self._table.active
        longest = max((row.longest for row in active), default=0)
        admitted: list[Answer] = []
        with self._lock:
            while self._waiting and len(active) + len(admitted) < self.slots:
                longest = max(longest, self._waiting[0].longest)
                if not self._table.fits(len(active) + len(admitted) + 1, longest):
                    break
                admitted.append(self._waiting.popleft())
            are_more_waiting = bool(self._waiting)
        if not active and not admitted:
            return
        rows = [*active, *admitted]
        tokens = max(max(len(row.prompt), min(row.length + self._tokens_per_call, row.longest)) for row in rows)
        self._table.resize(len(rows), tokens, are_more_waiting)
        for answer in admitted:
            self._reader.place(answer)

    def _draw(self) -> None:
        """Draw the next tokens of every row whose prompt has been read, and tell them."""
        ready = [row for row in self._table.active if row.ready]
        steps = min(self._tokens_per_call, max(row.room - len(row.drawn) for row in ready))
        drawn, used = self._decode(ready, steps)
        tokens = np.asarray(drawn.tokens)
        reported = [np.asarray(part) for part in drawn[1:]] if used.logprobs else []
        for row in ready:
            # An answer ends before its first end token, or where its room ends.
            ids = tokens[: min(steps, row.room - len(row.drawn)), row.slot].tolist()
            end = next((i for i, token in enumerate(ids) if token in row.end_ids), None)
            reason: FinishReason | None = None
            if end is not None:
                ids, reason = ids[:end], "stop"
            row.drawn += ids
            if reason is None and len(row.drawn) >= row.room:
                reason = "length"
            count = row.request.sampling.logprobs
            if count is None:
                told = [Token(token) for token in ids]
            else:
                told = with_logprobs(ids, [part[: len(ids), row.slot] for part in reported], count)
            if reason is not None:
                self._end(row, told, reason)
            elif told:
                row.on_tokens(told, None)

    def _decode(self, ready: Sequence[Answer], steps: int) -> tuple[Any, sampling.Used]:
        """Call the decode program; return what it drew (`programs.Drawn`) and what of it was asked for."""
        table = self._table
        lengths = np.array(
            [len(table.resident[slot]) if row is None else row.length for slot, row in enumerate(table.rows)], np.int32
        )
        arrays, seen, used = self._settings(ready)
        table.cache, table.hidden, drawn = self._programs.decode(
            self._weights, table.cache, table.hidden, lengths, arrays, seen, np.int32(steps), used
        )
        return drawn, used

    def _settings(self, ready: Iterable[Answer]) -> tuple[sampling.Rows, Any, sampling.Used]:
        """Return every row's settings, which tokens each has seen [B, V], and what is used."""
        B = self._table.width
        arrays = sampling.Rows(
            np.zeros(B, np.float32), np.ones(B, np.float32), np.zeros(B, np.float32), np.ones(B, np.float32),
            np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, np.uint32),
        )  # fmt: skip
        is_sampled, filters, logprobs, penalized = False, False, False, []
        for row in ready:
            s, slot = row.request.sampling, row.slot
            values = (
                s.temperature, s.top_p, s.min_p, s.repetition_penalty, min(s.top_k, self._config.vocab_size),
                row.request.sample & 0x7FFFFFFF, len(row.drawn), s.seed & 0xFFFFFFFF,
            )  # fmt: skip
            for array, value in zip(arrays, values, strict=True):
                array[slot] = value
            is_sampled |= s.temperature > 0
            filters |= s.temperature > 0 and (s.top_p < 1 or s.top_k > 0 or s.min_p > 0)
            logprobs |= s.logprobs is not None
            penalized += [row] if s.repetition_penalty != 1 else []
        used = sampling.Used(*map(np.bool_, (is_sampled, filters, logprobs, bool(penalized))))
        return arrays, self._seen(penalized), used

    def _seen(self, penalized: Sequence[Answer]) -> Any:
        """Return which tokens each row has seen, bool [B, V] on the devices, as far as a penalty asks for it."""
        shape = (self._table.width, self._config.vocab_size)
        target = None if self._mesh is None else sharding(self._mesh, ("batch", None), shape)
        if not penalized:
            if self._unseen is None or self._unseen.shape != shape:
                self._unseen = jax.device_put(np.zeros(shape, bool), target)
            return self._unseen
        seen = np.zeros(shape, bool)
        for row in penalized:
            seen[row.slot, row.prompt] = True
            seen[row.slot, row.drawn] = True
        return jax.device_put(seen, target)

    def compile_ahead(self) -> int:
        """Compile every program for every size that the cache can have, so that no request waits for that.

        To be called while there is no request. Returns the number of sizes.
        """
        assert not self._table.active and not self._waiting, "requests are under way"
        sizes = [(width, length) for length in self._table.lengths for width in self._table.widths]
        sizes = [size for size in sizes if self._table.holds(*size)]
        with self._on_mesh():
            for width, length in sizes:
                self._table.clear()
                self._table.move_to(width, length)
                self._reader.compile_ahead()
                self._decode([], 0)
                self._table.compile_moves()
            self._table.clear()
        return len(sizes)
