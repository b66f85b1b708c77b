"""What both engines share of a tensor that is seen in blocks of rows: the passes of methods, and their operands.

chunks.py (files) and trees.py (arrays in memory) build on it. It must not know where a block comes from.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from bmjax.merge.engine import passes
from bmjax.merge.methods.method import Block, Kernel, Merged, Operand
from bmjax.merge.recipe.recipe import Recipe, Step

T = TypeVar("T")


class Rows(ABC):
    """Some rows of a tensor. index: number of the chunk that they are, None where nothing may be kept of them."""

    index: int | None

    @abstractmethod
    def of(self, per_row: Any) -> Any:
        """Return the part of an array [..., rows of the tensor, n] that belongs to these rows."""


@dataclass(frozen=True)
class Fixed(Operand):
    """The same for all rows, in its own type: keys of random numbers, sums of columns."""

    value: Any

    def at(self, x: Block, rows: Rows) -> Any:
        return self.value


@dataclass(frozen=True)
class PerRow(Operand):
    """An array [..., rows of the tensor, n], of which a kernel gets the rows of its block."""

    array: Any

    def at(self, x: Block, rows: Rows) -> Any:
        return rows.of(self.array)


@dataclass(frozen=True)
class RowOrderStatistic(Operand):
    """For every entry, the ranks-th smallest number of `values` in its row. operands: of `ranks`."""

    values: Kernel
    ranks: Kernel
    operands: Sequence[Any]
    sort_rows: Callable[[Any], Any]

    def at(self, x: Block, rows: Rows) -> Any:
        arrays = passes.values(self.values, ())(x, [])
        ranks = passes.values(self.ranks, ())(x, at(self.operands, x, rows))
        return [passes.lookup()(self.sort_rows(a), r) for a, r in zip(arrays, ranks, strict=True)]


def at(operands: Sequence[Any], x: Block, rows: Rows) -> list[Any]:
    """Return operands as a kernel takes them with the block `x`, which holds `rows`; numbers as float32."""
    return [o.at(x, rows) if isinstance(o, Operand) else np.asarray(o, np.float32) for o in operands]


def keys(seed: int, tensor: str, models: Sequence[str]) -> np.ndarray:
    """Return for every model the key of its random numbers: a hash of seed, tensor and model; uint32 [models, 2]."""
    texts = [f"{seed}\0{tensor}\0{name}" for name in models]
    return np.array([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4") for text in texts], np.uint32)


class BlockTensor(ABC):
    """One step on one tensor, a `bmjax.merge.methods.method.Tensor`. That class says what the passes return."""

    def __init__(self, recipe: Recipe, step: Step, tensor: str, shape: Sequence[int]) -> None:
        self.step = step
        self.size, self.vector, self.branches = math.prod(shape), len(shape) <= 1, len(step.branches)
        self.has_base, self.compat, self.rounded_to = step.base is not None, recipe.compat, step.dtype
        self.keys: Operand = Fixed(keys(recipe.seed, tensor, step.branches))
        self._merged: Merged

    @abstractmethod
    def visit(self, work: Callable[[Block, Any], T]) -> list[T]:
        """Call `work(block, rows)` for every block of the tensor. Returns the results in order."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Any:
        """Join arrays [..., rows of a block, n], one a block, to one of all the tensor's rows."""

    @abstractmethod
    def totals(self, row_sums: Any) -> np.ndarray:
        """Add up the row sums [K, rows] of a block: float64 [K]."""

    @staticmethod
    @abstractmethod
    def sort_rows(array: Any) -> Any:
        """Sort every row."""

    @abstractmethod
    def masks(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand: ...

    @abstractmethod
    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *operands: Any, **static: Any
    ) -> list[np.ndarray]: ...

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Make the method's passes that precede the result. arguments: the method's, for this tensor."""
        self._merged = self.step.method.merge(self, arguments)

    def result(self, x: Block, rows: Rows, dtype: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Compute the merged rows in `dtype`, and the packed masks of `passes.leaves`. `prepare` precedes it."""
        program = passes.leaves(self._merged.kernel, passes.static(self._merged.static), np.dtype(dtype))
        return program(x, at(self._merged.operands, x, rows))

    def statistics(self, x: Block, leaf: jax.Array, masks: Sequence[jax.Array]) -> np.ndarray:
        """Return what `Stats.of` takes, for one block and its result."""
        return np.concatenate([self.totals(sums) for sums in passes.statistics()(x, leaf, masks)])

    def sums(self, kernel: Kernel, *operands: Any, **static: Any) -> np.ndarray:
        program = passes.row_sums(kernel, passes.static(static))
        parts = self.visit(lambda x, rows: self.totals(program(x, at(operands, x, rows))))
        return np.asarray(np.sum(parts, axis=0))

    def counts(self, kernel: Kernel, *operands: Any, **static: Any) -> list[int]:
        return [int(total) for total in self.sums(kernel, *operands, **static)]

    def columns(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand:
        program = passes.column_sums(kernel, passes.static(static))
        parts = self.visit(lambda x, rows: program(x, at(operands, x, rows)))
        if len(parts) == 1:
            return Fixed(parts[0])
        return Fixed(np.sum([np.asarray(part, np.float64) for part in parts], axis=0).astype(np.float32))

    def rows(self, kernel: Kernel, *operands: Any, reorder: bool = False, **static: Any) -> PerRow:
        program = passes.values(kernel, passes.static(static), reorder)
        return PerRow(self.join(self.visit(lambda x, rows: program(x, at(operands, x, rows)))))

    def highest(self, rows: PerRow, index: int) -> float:
        return float(rows.array[index].max())

    def whole(self, kernel: Kernel, *operands: Any, **static: Any) -> PerRow:
        program = passes.values(kernel, passes.static(static))
        blocks = self.visit(lambda x, rows: (x.base, x.branches, x.models))
        x = passes.block(*jax.tree.map(lambda *parts: self.join(parts), *blocks))
        return PerRow(self.join([program(x, [np.asarray(operand, np.float32) for operand in operands])]))

    def row_order_statistic(self, values: Kernel, ranks: Kernel, *operands: Any) -> Operand:
        return RowOrderStatistic(values, ranks, operands, self.sort_rows)

    def map(self, kernel: Kernel, *operands: Any, **static: Any) -> Merged:
        return Merged(kernel, operands, static)
