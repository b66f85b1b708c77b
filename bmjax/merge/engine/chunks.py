"""A tensor read from files in chunks of rows: the passes of methods over it, in memory that does not grow with it.

stream.py calls it. A chunk is about a million entries whatever memory there is, so results depend on nothing but the
inputs. The result of a step that a later one reads is computed chunk by chunk where it is read, never stored. Chunks
are worked on by a pool of threads, each of which reads, computes and writes, so the three overlap.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
import xxhash
from numpy.lib.stride_tricks import sliding_window_view

from bmjax.config import UserError
from bmjax.merge.engine import passes
from bmjax.merge.engine.quantile import bracket_search
from bmjax.merge.engine.tensor import BlockTensor, at, block_of
from bmjax.merge.methods.kernels import Block, Kernel
from bmjax.merge.methods.method import Operand
from bmjax.merge.plan.node import Node
from bmjax.merge.recipe.recipe import Recipe

CHUNK = 2**20  # entries
COLUMNS = 1024  # of a tensor whose rows do not matter
SAMPLE = 2**17  # entries from which an order statistic is estimated
LEAST_ENTRIES = 2**13
DOUBTFUL = 16  # rows that are computed at once where a quick kernel is in doubt
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a tensor."""

    index: int
    start: int  # first flat index
    count: int  # entries, without padding
    rows: slice
    height: int  # rows, with the padding

    def of(self, per_row: np.ndarray) -> np.ndarray:
        """Return the part of an array [..., rows of the tensor, n] that belongs to these rows, padded."""
        part = per_row[..., self.rows, :]
        padding = self.height - part.shape[-2]
        return np.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, padding), (0, 0)]) if padding else part


@dataclass(frozen=True)
class Sample:
    """Rows picked over the whole tensor, of each `width` columns from the column in `first` on.

    as_entries: each entry is a row of its own, as in `Entries`, whose programs it shares.
    """

    rows: np.ndarray
    first: np.ndarray
    width: int
    as_entries: bool = False
    index: None = None  # nothing is kept of a sample
    start: int = 0

    def of(self, per_row: np.ndarray) -> np.ndarray:
        part = per_row[..., self.rows, :]
        return np.repeat(part, self.width, axis=-2) if self.as_entries else part


class Entries:
    """Entries of a chunk, by flat indices, each as a row of its own; padded to one of few numbers, each a compilation.

    Chosen over programs that give the entries' values as they count them: those would write all values.
    """

    index: None = None  # nothing is kept of them

    def __init__(self, chunk: Chunk, entries: np.ndarray, columns: int) -> None:
        self._chunk, self._columns = chunk, columns
        size = LEAST_ENTRIES
        while size < len(entries):
            size *= 4
        self._entries = np.zeros(size, np.int64)
        self._entries[: len(entries)] = entries

    def of(self, per_row: np.ndarray) -> np.ndarray:
        return self._chunk.of(per_row)[..., self._entries // self._columns, :]

    def block(self, x: Block) -> Block:
        """Return the chunk's block `x` at these entries."""

        def pick(array: Any) -> Any:
            flat = np.asarray(array).reshape(-1)
            # Indexing integers is faster than indexing bfloat16.
            return flat.view(f"u{flat.itemsize}").take(self._entries)[:, None].view(flat.dtype)

        base = None if x.base is None else pick(x.base)
        return Block(base, tuple(map(pick, x.branches)), {name: pick(a) for name, a in x.models.items()}, x.start)


def block_digest(data: np.ndarray) -> bytes:
    """Return a block's checksum."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def digest(blocks: Iterable[bytes]) -> str:
    """Return the checksum of data from those of its blocks, as hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def digest_of_tensors(checksums: Mapping[str, str]) -> str:
    """Return one checksum of tensors from those of each, by name."""
    return digest(f"{tensor}\0{checksums[tensor]}\n".encode() for tensor in sorted(checksums))


class StoredTensor:
    """One model's tensor in a file: `read(start, out)` fills `out` with its entries from flat index `start` on.

    `digests` gets a checksum of every chunk when it is first read, and `count_read` is called with its bytes.
    """

    def __init__(
        self,
        model: str,
        tensor: str,
        dtype: np.dtype,
        read: Callable[[int, np.ndarray], None],
        count_read: Callable[[int], None],
    ) -> None:
        self.model, self.tensor, self.dtype, self.read, self._count_read = model, tensor, dtype, read, count_read
        self.digests: dict[int, bytes] = {}

    def read_chunk(self, chunk: Chunk, columns: int) -> np.ndarray:
        """Read a chunk [height, columns], padded with zeros; float64 becomes float32."""
        # JAX takes over without a copy what has an address that is a multiple of 64.
        size = chunk.height * columns
        raw = np.empty(size * self.dtype.itemsize + 64, np.uint8)
        offset = -raw.__array_interface__["data"][0] % 64  # a tenth of the time of raw.ctypes.data
        flat = raw[offset : offset + size * self.dtype.itemsize].view(self.dtype)
        self.read(chunk.start, flat[: chunk.count])
        # As integers: one bfloat16 at a time takes ten times as long.
        flat[chunk.count :].view(f"u{flat.itemsize}")[:] = 0
        if chunk.index not in self.digests:
            self.digests[chunk.index] = block_digest(flat[: chunk.count])
            self._count_read(chunk.count * self.dtype.itemsize)
        return _at_most_float32(flat.reshape(chunk.height, columns))

    def raw(self, chunk: Chunk) -> np.ndarray:
        """Read the entries of a chunk once more, as they are stored: [entries]."""
        out = np.empty(chunk.count, self.dtype)
        self.read(chunk.start, out)
        return out

    def values(self, chunk: Chunk) -> np.ndarray:
        """Read the entries of a chunk once more, float32 or float64 [entries]."""
        out = self.raw(chunk)
        return out if out.dtype == np.float64 else out.astype(np.float32)

    def check_finite(self, chunks: Sequence[Chunk], as_stored: bool = False) -> None:
        """Raise UserError where the tensor holds NaN or infinity. as_stored: float64 is not taken as float32."""
        for chunk in chunks:
            values = self.values(chunk)
            if not np.isfinite(values if as_stored else _at_most_float32(values)).all():
                raise UserError(
                    f"model '{self.model}': tensor '{self.tensor}' holds NaN or infinity; "
                    "the file or the training run is broken"
                )


def _at_most_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


class ChunkCache:
    """Cuts a tensor into `chunks` of `chunk_rows` rows of `columns`, and reads its inputs chunk by chunk."""

    def __init__(self, shape: Sequence[int], by_row: bool, pool: Executor, keep: bool) -> None:
        """by_row: rows are the tensor's own, its last axis; a vector is one row. keep: what is read, for later passes.

        Chunks have two heights at most, because each is a compilation.
        """
        size = math.prod(shape)
        self.size, self.columns = size, (shape[-1] if shape else 1) if by_row else COLUMNS
        self.rows = -(-size // self.columns)  # the last one perhaps not full
        self.chunk_rows = height = 1 << (max(1, CHUNK // self.columns).bit_length() - 1)
        self.chunks: list[Chunk] = []
        for first in range(0, self.rows, height):
            rows, low, start = min(height, self.rows - first), max(1, height // 8), first * self.columns
            count = min(height * self.columns, size - start)
            part = slice(first, first + rows)
            self.chunks.append(Chunk(len(self.chunks), start, count, part, low if rows <= low else height))
        self.keep, self._pool = keep, pool
        self._arrays: dict[tuple[StoredTensor, int], np.ndarray] = {}

    def map(self, work: Callable[[S], T], parts: Sequence[S]) -> list[T]:
        """Call `work` on every one of `parts`, in parallel. Returns the results in order."""
        return list(self._pool.map(work, parts)) if len(parts) > 1 else [work(parts[0])]

    def load(self, tensor: StoredTensor, rows: Chunk | Sample) -> np.ndarray:
        if isinstance(rows, Sample):
            sample = self._load_sample(tensor, rows)
            return sample.reshape(-1, 1) if rows.as_entries else sample
        array = self._arrays.get((tensor, rows.index))
        if array is None:
            array = tensor.read_chunk(rows, self.columns)
            if self.keep:
                self._arrays[tensor, rows.index] = array
        return array

    def _load_sample(self, tensor: StoredTensor, sample: Sample) -> np.ndarray:
        shape = (len(sample.rows), sample.width)
        if not self.keep:
            out = np.empty(shape, tensor.dtype)
            for row, start in zip(out, (sample.rows * self.columns + sample.first).tolist(), strict=True):
                tensor.read(start, row)
            return _at_most_float32(out)
        # From chunks that stay in memory anyway. Indexing integers is faster than indexing bfloat16.
        stored = np.dtype(np.float32) if tensor.dtype == np.float64 else tensor.dtype
        bits = np.empty(shape, f"u{stored.itemsize}")
        chunks = sample.rows // self.chunk_rows
        for i in np.unique(chunks).tolist():
            inside = chunks == i
            starts = (sample.rows[inside] - i * self.chunk_rows) * self.columns + sample.first[inside]
            entries = self.load(tensor, self.chunks[i]).reshape(-1).view(bits.dtype)
            bits[inside] = sliding_window_view(entries, sample.width)[starts]
        return bits.view(stored)


# What a step makes of some rows: the inputs, the result and `passes.leaves`' packed masks.
StepRows = tuple[Block, jax.Array, list[jax.Array]]


class View(BlockTensor):
    """One step of a recipe on one tensor, over chunks."""

    def __init__(
        self,
        recipe: Recipe,
        node: Node,
        inputs: Mapping[str, "StoredTensor | View"],
        cache: ChunkCache,
        mask_bytes: int,
    ) -> None:
        """inputs: stored tensors and views of earlier steps, by model. mask_bytes: for masks kept between passes."""
        super().__init__(recipe, node.step, node.name, node.shape)
        self._cache, self._inputs, self._mask_bytes = cache, inputs, mask_bytes
        self._dtype = np.dtype(np.float32) if node.dtype == np.float64 else node.dtype
        # The result of a step may depend on whole rows, so a sample of it has to have them.
        self._stored = all(isinstance(source, StoredTensor) for source in inputs.values())

    def block(self, rows: Chunk | Sample, results: dict["View", StepRows]) -> Block:
        """Return the inputs at `rows`. results: what steps made of these rows; those that are missing are computed."""

        def load(model: str) -> Any:
            source = self._inputs[model]
            if isinstance(source, StoredTensor):
                return self._cache.load(source, rows)
            return source.compute(rows, results)

        return block_of(self.step, {model: load(model) for model in self.step.reads}, rows.start)

    def compute(self, rows: Chunk | Sample, results: dict["View", StepRows]) -> jax.Array:
        """Compute the step's result at `rows`, once for all that use the same `results`."""
        if self not in results:
            x = self.block(rows, results)
            results[self] = (x, *self.result(x, rows, self._dtype))
        return results[self][1]

    def visit(self, work: Callable[[Block, Chunk], T]) -> list[T]:
        # Each thread waits for its chunk, or many chunks would be in memory at once.
        return self._cache.map(
            lambda chunk: jax.block_until_ready(work(self.block(chunk, {}), chunk)), self._cache.chunks
        )

    def join(self, parts: Sequence[Any]) -> np.ndarray:
        arrays = [np.asarray(part) for part in parts]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2)
        return joined[..., : self._cache.rows, :]

    def at_doubtful_rows(self, quick: Any, doubt: Any, program: Callable[..., Any], operands: Sequence[Any]) -> Any:
        doubtful = np.flatnonzero(doubt)
        if not doubtful.size:
            return quick
        # Some at a time, always as many, because each number is a compilation.
        height = min(DOUBTFUL, self._cache.rows)
        padded = np.append(doubtful, np.repeat(doubtful[-1:], -len(doubtful) % height))

        def work(rows: np.ndarray) -> np.ndarray:
            sample = Sample(rows, np.zeros(height, np.int64), self._cache.columns)
            x = self.block(sample, {})
            return np.asarray(program(x, at(operands, x, sample)))

        arrays = quick.copy()
        arrays[:, padded] = np.concatenate(self._cache.map(work, list(padded.reshape(-1, height))), axis=1)
        return arrays

    def totals(self, row_sums: Any) -> np.ndarray:
        return np.asarray(np.asarray(row_sums).sum(axis=1, dtype=np.float64))

    @staticmethod
    def zeros_and_sorted(array: Any) -> np.ndarray:
        rows, columns = array.shape
        result = np.empty((rows, columns + 1), np.float32)
        result[:, 0], result[:, 1:] = 0, array
        result[:, 1:].sort(axis=-1)
        return result

    def kept_masks(self, masks: Callable[[Block, Any], Sequence[Any]]) -> Operand:
        # The operand does not hold this view, which will hold it: all that is kept of a tensor would wait for the
        # garbage collector.
        keep = self.branches * self.size // 8 <= self._mask_bytes
        packed: dict[int, tuple[np.ndarray, tuple[int, ...]]] = {}

        def unpacked_masks(x: Block, rows: Chunk | Sample) -> list[np.ndarray]:
            if rows.index in packed:
                bits, shape = packed[rows.index]
                return list(np.unpackbits(bits, count=math.prod(shape)).view(np.bool_).reshape(shape))
            arrays = np.stack([np.asarray(mask) for mask in masks(x, rows)])
            if keep and rows.index is not None:
                packed[rows.index] = (np.packbits(arrays), arrays.shape)
            return list(arrays)

        return unpacked_masks

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *operands: Any, **static: Any
    ) -> list[np.ndarray]:
        columns, chunks = self._cache.columns, self._cache.chunks

        def arrays(rows: Chunk | Sample) -> list[np.ndarray]:
            x = self.block(rows, {})
            return [np.asarray(a) for a in passes.values(kernel, **static)(x, at(operands, x, rows))]

        if self.size <= SAMPLE and len(chunks) == 1:
            flat = [a.reshape(-1)[: self.size] for a in arrays(chunks[0])]
            return [np.sort(f)[list(r)] for f, r in zip(flat, ranks, strict=True)]
        bracket_counts = passes.brackets(kernel, tuple(k for k, r in enumerate(ranks) for _ in r), **static)
        values = passes.values(kernel, **static)

        def count(low: np.ndarray, high: np.ndarray) -> list[tuple[list[np.ndarray], np.ndarray]]:
            # A kernel gives 0 in the padding, which is not to be counted.
            zero = np.stack([low > 0, low >= 0, high >= 0], axis=-1).reshape(-1)

            def work(x: Block, chunk: Chunk) -> tuple[list[np.ndarray], np.ndarray]:
                inside, below = bracket_counts(x, at(operands, x, chunk), low, high)
                entries = np.flatnonzero(np.asarray(inside).reshape(-1)[: chunk.count])
                picked = Entries(chunk, entries, columns)
                y = picked.block(x)
                picks = [np.asarray(v)[: len(entries), 0] for v in values(y, at(operands, y, picked))]
                return picks, self.totals(below) - (chunk.height * columns - chunk.count) * zero

            return self.visit(work)

        # Rows of an earlier step's result are alike within themselves: a sample of them says less.
        spread = 1.0 if self._stored else 4.0
        return bracket_search(self.size, ranks, arrays(self._quantile_sample()), spread, count)

    def sample_of_rows(self, entries: int) -> Block | None:
        """Return about `entries` entries in whole rows; None for a smaller tensor."""
        g = self._cache
        rows = max(1, entries // g.columns)
        if g.rows < rows:
            return None
        picked = (2 * np.arange(rows) + 1) * g.rows // (2 * rows)
        return self.block(Sample(picked, np.zeros(rows, np.int64), g.columns), {})

    def _quantile_sample(self) -> Sample:
        """Pick a sample of one of few sizes, because each is a compilation.

        Where there are few rows, they come again, at other columns.
        """
        g = self._cache
        whole = g.size // g.columns
        width = min(g.columns, 32) if self._stored else g.columns
        entries = (SAMPLE if g.size > 16 * SAMPLE else SAMPLE // 4) if self._stored else 2 * SAMPLE
        rows = max(1, entries // width)
        picked = (2 * np.arange(rows) + 1) * whole // (2 * rows)
        first = np.arange(rows) * 7919 * width % (g.columns - width + 1)
        return Sample(picked, first, width, as_entries=self._stored)
