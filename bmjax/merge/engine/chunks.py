"""A tensor read from files in chunks of rows: the passes of methods over it, in memory that does not grow with it.

A chunk is about a million entries whatever memory there is, so results depend on nothing but the inputs. The result of
a step that a later one reads is computed chunk by chunk where it is read. Chunks are worked on by a pool of threads,
each of which reads, computes and writes, so the three overlap.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
import xxhash

from bmjax.config import UserError
from bmjax.merge.engine import passes
from bmjax.merge.methods.method import Block, Kernel, Merged, Ranked
from bmjax.merge.recipe.recipe import Step

CHUNK = 2**20  # entries
COLUMNS = 1024  # of a tensor whose rows do not matter
SAMPLE = 2**17  # entries from which an order statistic is estimated
SIGMAS = 6.0
T = TypeVar("T")


@dataclass(frozen=True)
class Geometry:
    """How a tensor of `size` entries is cut: chunks of `chunk_rows` rows of `columns`, the last one padded."""

    size: int
    columns: int
    chunk_rows: int

    @classmethod
    def of(cls, shape: Sequence[int], by_row: bool) -> "Geometry":
        """by_row: rows are the tensor's own (its last axis; a vector is one row)."""
        size = math.prod(shape)
        columns = (shape[-1] if shape else 1) if by_row else COLUMNS
        whole = max(1, CHUNK // columns)
        return cls(size, columns, 1 << (whole.bit_length() - 1))

    @property
    def rows(self) -> int:
        return -(-self.size // self.columns)

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return -(-self.rows // self.chunk_rows)

    def height(self, i: int) -> int:
        """Rows of chunk `i` with its padding: two heights at most, because each is a compilation."""
        rows, low = min(self.chunk_rows, self.rows - i * self.chunk_rows), max(1, self.chunk_rows // 4)
        return low if rows <= low else self.chunk_rows

    def entries(self, i: int) -> tuple[int, int]:
        """The first flat index of chunk `i`, and how many entries it has."""
        start = i * self.chunk_rows * self.columns
        return start, min(self.chunk_rows * self.columns, self.size - start)


class Source:
    """One model's stored tensor: `read(start, out)` fills `out` with its entries from flat index `start` on.

    `digests` gets a checksum of every chunk when it is first read.
    """

    def __init__(self, model: str, tensor: str, dtype: np.dtype, read: Callable[[int, np.ndarray], None]) -> None:
        self.model, self.tensor, self.dtype, self.read = model, tensor, dtype, read
        self.digests: dict[int, bytes] = {}

    def chunk(self, geometry: Geometry, i: int) -> np.ndarray:
        """Chunk `i` [height, columns], padded with zeros; float64 as float32."""
        start, count = geometry.entries(i)
        out = aligned((geometry.height(i), geometry.columns), self.dtype)
        flat = out.reshape(-1)
        self.read(start, flat[:count])
        flat[count:] = 0
        if i not in self.digests:
            self.digests[i] = xxhash.xxh3_128_digest(flat[:count].view(np.uint8).data)
        return out.astype(np.float32) if out.dtype == np.float64 else out

    def check(self, geometry: Geometry) -> None:
        """UserError where the tensor holds NaN or infinity."""
        for i in range(geometry.count):
            start, count = geometry.entries(i)
            out = np.empty(count, self.dtype)
            self.read(start, out)
            if not np.isfinite(out.astype(np.float32)).all():
                raise UserError(
                    f"model '{self.model}': tensor '{self.tensor}' holds NaN or infinity; "
                    "the file or the training run is broken"
                )


class NotFiniteError(Exception):
    """A pass met NaN."""


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can take over without a copy: its address is a multiple of 64."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    offset = -raw.__array_interface__["data"][0] % 64  # a tenth of the time of raw.ctypes.data
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor: chunk `index`. count: entries before the padding."""

    index: int
    start: int
    count: int
    rows: slice
    height: int


@dataclass(frozen=True)
class Sample:
    """Rows picked over the whole tensor, of each `width` columns from its own column on."""

    rows: np.ndarray
    first: np.ndarray
    width: int
    start: int = 0


Where = Chunk | Sample


class Job:
    """The sources of one tensor and what is kept of them between passes. keep: whether all chunks read are."""

    def __init__(self, shape: Sequence[int], by_row: bool, pool: Executor, memory: int) -> None:
        self.geometry, self.pool, self.memory = Geometry.of(shape, by_row), pool, memory
        self.vector = len(shape) <= 1
        self.keep = False
        self._kept: dict[tuple[Source, int], np.ndarray] = {}

    def chunk(self, i: int) -> Chunk:
        g = self.geometry
        start, count = g.entries(i)
        first = i * g.chunk_rows
        return Chunk(i, start, count, slice(first, first + -(-count // g.columns)), g.height(i))

    def each(self, work: Callable[[Chunk], T]) -> list[T]:
        """`work` on every chunk, in parallel; results in order."""
        chunks = [self.chunk(i) for i in range(self.geometry.count)]
        if len(chunks) == 1:
            return [work(chunks[0])]
        return list(self.pool.map(work, chunks))

    def load(self, source: Source, where: Where) -> np.ndarray:
        if isinstance(where, Sample):
            return self._sample(source, where)
        key = (source, where.index)
        found = self._kept.get(key)
        if found is None:
            found = source.chunk(self.geometry, where.index)
            if self.keep:
                self._kept[key] = found
        return found

    def _sample(self, source: Source, where: Sample) -> np.ndarray:
        g = self.geometry
        shape = (len(where.rows), where.width)
        if not self.keep:
            out = np.empty(shape, source.dtype)
            for row, start in zip(out, (where.rows * g.columns + where.first).tolist(), strict=True):
                source.read(start, row)
            return out.astype(np.float32) if out.dtype == np.float64 else out
        stored = np.dtype(np.float32) if source.dtype == np.float64 else source.dtype
        bits = np.empty(shape, f"u{stored.itemsize}")
        chunks, across = where.rows // g.chunk_rows, np.arange(where.width)
        for i in np.unique(chunks).tolist():
            mine = chunks == i
            starts = (where.rows[mine] - i * g.chunk_rows) * g.columns + where.first[mine]
            bits[mine] = self.load(source, self.chunk(i)).reshape(-1).view(bits.dtype)[starts[:, None] + across]
        return bits.view(stored)


@dataclass(frozen=True)
class Rows:
    """What a pass over rows gave, [..., rows, 1]."""

    array: np.ndarray

    def at(self, where: Where) -> np.ndarray:
        if isinstance(where, Sample):
            return self.array[..., where.rows, :]
        found = self.array[..., where.rows, :]
        padding = where.height - found.shape[-2]
        return np.pad(found, [(0, 0)] * (found.ndim - 2) + [(0, padding), (0, 0)]) if padding else found


class Masks:
    """Bool arrays that a kernel gives, kept as bits between passes where memory allows, else computed again.

    It does not hold its view, which holds it: all that is kept of a tensor would wait for the garbage collector.
    """

    def __init__(self, keep: bool, kernel: Kernel, numbers: Sequence[Any], keywords: passes.Static) -> None:
        self._keep, self._kernel, self._numbers, self._keywords = keep, kernel, numbers, keywords
        self._kept: dict[int, tuple[np.ndarray, tuple[int, ...]]] = {}

    def at(self, view: "View", where: Where, x: Block) -> list[np.ndarray]:
        if isinstance(where, Chunk) and where.index in self._kept:
            bits, shape = self._kept[where.index]
            return list(np.unpackbits(bits, count=math.prod(shape)).view(np.bool_).reshape(shape))
        found = passes.values(self._kernel, self._keywords)(x, view.numbers(self._numbers, where, x))
        masks = np.stack([np.asarray(mask) for mask in found])
        if self._keep and isinstance(where, Chunk):
            self._kept[where.index] = (np.packbits(masks), masks.shape)
        return list(masks)


class View:
    """One step of a recipe on one tensor: the `Tensor` of a method, over chunks."""

    def __init__(
        self, step: Step, job: Job, base: Any, branches: Sequence[Any], models: Mapping[str, Any], keys: np.ndarray,
        compat: str | None, prepare: Callable[["View"], Merged],
    ) -> None:  # fmt: skip
        """base, branches, models: each a Source or the View of an earlier step. prepare: the method's passes."""
        self.step, self.job = step, job
        self.size, self.vector, self.branches = job.geometry.size, job.vector, len(branches)
        self.has_base, self.keys, self.compat = base is not None, keys, compat
        self.rounded_to = step.dtype
        self._base, self._branches, self._models = base, list(branches), dict(models)
        self._prepare = prepare
        self._merged: Merged | None = None
        inputs = [*([] if base is None else [base]), *branches, *models.values()]
        # The result of a step may depend on whole rows, so a sample of it has to have them.
        self._stored = all(isinstance(x, Source) for x in inputs)

    def prepare(self) -> None:
        """Makes the passes that have to precede the result; those of earlier steps come first."""
        self._merged = self._prepare(self)

    def block(self, where: Where, memo: dict[Any, Any]) -> Block:
        """The inputs at `where`. memo: leaves of earlier steps there, by view."""

        def get(x: Any) -> Any:
            return self.job.load(x, where) if isinstance(x, Source) else x.leaf(where, memo)

        base = None if self._base is None else get(self._base)
        models = {name: get(x) for name, x in self._models.items()}
        return passes.block(base, [get(x) for x in self._branches], models, where.start)

    def leaf(self, where: Where, memo: dict[Any, Any], dtype: Any = np.float32) -> Any:
        """The step's result at `where`; memo[self] becomes (leaf, block, masks)."""
        if self not in memo:
            merged = self._merged
            if merged is None:
                raise RuntimeError(f"step '{self.step.name}' is read before it is prepared")
            x = self.block(where, memo)
            run = passes.leaves(merged.kernel, passes.static(merged.static), dtype)
            leaf, kept = run(x, self.numbers(merged.numbers, where, x))
            memo[self] = (leaf, x, kept)
        return memo[self][0]

    def numbers(self, numbers: Sequence[Any], where: Where, x: Block) -> list[Any]:
        """Arguments of a pass as the kernel takes them at `where`."""
        return [self._number(number, where, x) for number in numbers]

    def _number(self, number: Any, where: Where, x: Block) -> Any:
        if isinstance(number, Rows):
            return number.at(where)
        if isinstance(number, Masks):
            return number.at(self, where, x)
        if isinstance(number, Ranked):
            arrays = passes.values(number.values, ())(x, [])
            places = passes.values(number.places, ())(x, self.numbers(number.numbers, where, x))
            ordered = [np.sort(np.asarray(array), axis=-1) for array in arrays]
            return [passes.lookup()(o, p) for o, p in zip(ordered, places, strict=True)]
        if isinstance(number, np.ndarray) and number.dtype == np.uint32:
            return number
        return np.asarray(number, np.float32)

    def sums(self, kernel: Kernel, *numbers: Any, **static: Any) -> np.ndarray:
        run = passes.row_sums(kernel, passes.static(static))

        def work(where: Chunk) -> np.ndarray:
            x = self.block(where, {})
            return totals(run(x, self.numbers(numbers, where, x)))

        found: np.ndarray = np.sum(self.job.each(work), axis=0)
        return found

    def counts(self, kernel: Kernel, *numbers: Any, **static: Any) -> list[int]:
        return [int(total) for total in self.sums(kernel, *numbers, **static)]

    def highest(self, rows: Rows, index: int) -> float:
        return float(np.max(rows.array[index]))

    def columns(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        run = passes.column_sums(kernel, passes.static(static))

        def work(where: Chunk) -> np.ndarray:
            x = self.block(where, {})
            return np.asarray(run(x, self.numbers(numbers, where, x)), np.float64)

        return np.sum(self.job.each(work), axis=0).astype(np.float32)

    def rows(self, kernel: Kernel, *numbers: Any, reorder: bool = False, **static: Any) -> Rows:
        run = passes.values(kernel, passes.static(static), reorder)

        def work(where: Chunk) -> np.ndarray:
            x = self.block(where, {})
            return np.asarray(run(x, self.numbers(numbers, where, x)))[..., : where.rows.stop - where.rows.start, :]

        return Rows(np.concatenate(self.job.each(work), axis=-2))

    def whole(self, kernel: Kernel, *numbers: Any, **static: Any) -> Rows:
        g = self.job.geometry
        blocks = self.job.each(lambda where: self.block(where, {}))
        arrays = [
            np.concatenate([np.asarray(a) for a in parts])[: g.rows]
            for parts in zip(*(jax.tree.leaves(tuple(x[:3])) for x in blocks), strict=True)
        ]
        base, branches, models = jax.tree.unflatten(jax.tree.structure(tuple(blocks[0][:3])), arrays)
        x = passes.block(base, branches, models)
        run = passes.values(kernel, passes.static(static))
        return Rows(np.asarray(run(x, [np.asarray(number, np.float32) for number in numbers])))

    def masks(self, kernel: Kernel, *numbers: Any, **static: Any) -> Masks:
        keep = self.branches * self.size // 8 <= self.job.memory
        return Masks(keep, kernel, numbers, passes.static(static))

    def map(self, kernel: Kernel, *numbers: Any, **static: Any) -> Merged:
        return Merged(kernel, numbers, static)

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *numbers: Any, **static: Any
    ) -> list[np.ndarray]:
        keywords = passes.static(static)
        if self.size <= SAMPLE and self.job.geometry.count == 1:
            where = self.job.chunk(0)
            x = self.block(where, {})
            arrays = passes.values(kernel, keywords)(x, self.numbers(numbers, where, x))
            flat = [np.asarray(a).reshape(-1)[: self.size] for a in arrays]
            return [np.partition(f, list(r))[list(r)] for f, r in zip(flat, ranks, strict=True)]
        sample = self._sample()
        x = self.block(sample, {})
        arrays = passes.values(kernel, keywords)(x, self.numbers(numbers, sample, x))
        search = Search(self.size, ranks, [np.asarray(a) for a in arrays], 1.0 if self._stored else 4.0)
        run = passes.brackets(kernel, keywords)

        def work(where: Chunk) -> tuple[list[np.ndarray], np.ndarray]:
            # Of the counts < low, <= low and <= high, padding is in the last one where there is no upper end.
            unbounded = np.stack([np.zeros_like(search.high)] * 2 + [np.isinf(search.high)], axis=-1).reshape(-1)
            x = self.block(where, {})
            values, inside, below = run(x, self.numbers(numbers, where, x), where.count, search.low, search.high)
            padding = where.height * self.job.geometry.columns - where.count
            picks = [np.asarray(v)[np.asarray(m)] for v, m in zip(values, inside, strict=True)]
            return picks, totals(below) - padding * unbounded

        while not search.found(self.job.each(work)):
            pass
        return search.result

    def values_of_rows(self, kernel: Kernel, entries: int) -> list[np.ndarray]:
        """What a kernel gives for about `entries` entries in whole rows over the tensor; nothing for a smaller one."""
        g = self.job.geometry
        rows = max(1, entries // g.columns)
        if g.rows < rows:
            return []
        where = Sample((2 * np.arange(rows) + 1) * g.rows // (2 * rows), np.zeros(rows, np.int64), g.columns)
        return [np.asarray(array) for array in passes.values(kernel, ())(self.block(where, {}), [])]

    def _sample(self) -> Sample:
        """Of one size for all tensors, because each is a compilation: rows come again, at other columns, where there
        are few of them."""
        g = self.job.geometry
        whole = g.size // g.columns
        width = min(g.columns, 32) if self._stored else g.columns
        rows = max(1, SAMPLE // width) if self._stored else max(1, 2 * SAMPLE // width)
        picked = (2 * np.arange(rows) + 1) * whole // (2 * rows)
        first = np.arange(rows) * 7919 * width % (g.columns - width + 1)
        return Sample(picked, first, width)


def totals(rows: Any) -> np.ndarray:
    """Row sums [K, rows] summed in float64."""
    return np.asarray(rows).sum(axis=1, dtype=np.float64)


class Search:
    """Exact order statistics of a large tensor: brackets estimated from a sample, then counts of what lies below them
    and all values within, in one pass; again with wider brackets for a rank that was missed."""

    def __init__(self, size: int, ranks: Sequence[Sequence[int]], sample: Sequence[np.ndarray], spread: float) -> None:
        most = max(len(r) for r in ranks)
        self._lengths = [len(r) for r in ranks]
        self._ranks = [[*r, *[r[-1]] * (most - len(r))] for r in ranks]
        self._size, self._spread = size, SIGMAS * spread
        self._sample = [np.sort(a, axis=None) for a in sample]
        self._values: list[list[float | None]] = [[None] * most for _ in ranks]
        self._bracket()

    def _bracket(self) -> None:
        bounds = [[self._bounds(k, r) for r in range(len(ranks))] for k, ranks in enumerate(self._ranks)]
        self.low, self.high = np.moveaxis(np.array(bounds, np.float32), -1, 0)

    def _bounds(self, k: int, r: int) -> tuple[float, float]:
        value, ordered = self._values[k][r], self._sample[k]
        if value is not None:
            return value, value
        share = (self._ranks[k][r] + 0.5) / self._size
        place = share * len(ordered)
        reach = self._spread * math.sqrt(len(ordered) * share * (1 - share)) + 3
        below, above = math.floor(place - reach), math.ceil(place + reach)
        return (
            float(ordered[below]) if below >= 0 else -math.inf,
            float(ordered[above]) if above < len(ordered) else math.inf,
        )

    def found(self, chunks: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> bool:
        """Takes what a pass saw; whether every rank is found. If not, `low` and `high` are wider for the next."""
        shape = (*self.low.shape, 3)
        counts = np.sum([below for _, below in chunks], axis=0).reshape(shape)
        for k, ranks in enumerate(self._ranks):
            picks = np.concatenate([values[k] for values, _ in chunks])
            for r, rank in enumerate(ranks):
                if self._values[k][r] is None:
                    self._values[k][r] = _resolve(rank, picks, self.low[k, r], self.high[k, r], counts[k, r])
        if all(value is not None for values in self._values for value in values):
            return True
        if not np.isfinite(self.low).any() and not np.isfinite(self.high).any():
            raise NotFiniteError
        self._spread *= 8
        self._bracket()
        return False

    @property
    def result(self) -> list[np.ndarray]:
        return [np.array(v[:n], np.float32) for v, n in zip(self._values, self._lengths, strict=True)]


def _resolve(rank: int, picks: np.ndarray, low: float, high: float, counts: np.ndarray) -> float | None:
    """The value of `rank`, from how many are < low, <= low and <= high and the values strictly between; None if it
    lies outside."""
    under, first, last = (int(count) for count in counts)
    if under <= rank < first:
        return float(low)
    between = picks[(picks > low) & (picks < high)]
    if first <= rank < first + len(between):
        return float(np.partition(between, rank - first)[rank - first])
    return float(high) if first + len(between) <= rank < last else None
