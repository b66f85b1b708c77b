"""One step on one tensor: the passes of its method over blocks of the tensor's rows, and their operands.

trees.py uses it as it is, with one block of arrays in memory; chunks.py reads blocks from files. What stands in
`BlockTensor` but for its last methods must not know where a block comes from.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.merge.engine import passes
from bmjax.merge.engine.quantile import order_statistics
from bmjax.merge.methods.kernels import Block, Kernel
from bmjax.merge.methods.method import Merged, Operand, PerRow
from bmjax.merge.recipe.recipe import Recipe, Step

T = TypeVar("T")


def keys(seed: int, tensor: str, models: Sequence[str]) -> np.ndarray:
    """Return for every model the key of its random numbers: a hash of seed, tensor and model; uint32 [models, 2]."""
    texts = [f"{seed}\0{tensor}\0{name}" for name in models]
    return np.array([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4") for text in texts], np.uint32)


class AllRows:
    """The rows of a block that holds all of a tensor's. `of` takes their part of an array [..., tensor's rows, n]."""

    @staticmethod
    def of(per_row: Any) -> Any:
        return per_row


def at(operands: Sequence[Any], x: Block, rows: Any) -> list[Any]:
    """Return operands as a kernel takes them with the block `x`, which holds `rows`; numbers as float32."""
    return [o(x, rows) if callable(o) else np.asarray(o, np.float32) for o in operands]


def block_of(step: Step, arrays: Mapping[str, Any], start: int = 0) -> Block:
    """Make the block of what a step reads. arrays: rows by model; the first entry has the flat index `start`."""
    base = None if step.base is None else arrays[step.base]
    models = {name: arrays[model] for name, model in step.named.items()}
    return passes.block(base, [arrays[model] for model in step.branches], models, start)


class BlockTensor:
    """One step on one tensor, a `bmjax.merge.methods.method.Tensor`. That class says what the passes return."""

    def __init__(
        self, recipe: Recipe, step: Step, tensor: str, shape: Sequence[int], block: Block | None = None
    ) -> None:
        """block: all rows of the tensor, for whoever does not override `visit`."""
        self.step, self._block = step, block
        self.size, self.vector, self.branches = math.prod(shape), len(shape) <= 1, len(step.branches)
        self.has_base, self.compat, self.rounded_to = step.base is not None, recipe.compat, step.dtype
        branch_keys = keys(recipe.seed, tensor, step.branches)
        self.keys: Operand = lambda x, rows: branch_keys
        self._merged: Merged

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Make the method's passes that precede the result. arguments: by recipe name, per-model ones as tuples."""
        method = self.step.method
        keywords = {p.argument: arguments[p.name] for p in method.parameters.values()}
        # An input that is not finite is an error of the engine's, which names it; not a warning of the arithmetic's.
        with np.errstate(all="ignore"):
            self._merged = method.function(self, **keywords)

    def result(self, x: Block, rows: Any, dtype: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Compute the merged rows in `dtype`, and the packed masks of `passes.leaves`. `prepare` precedes it."""
        kernel, operands, static = self._merged
        return passes.leaves(kernel, np.dtype(dtype), **static)(x, at(operands, x, rows))

    def statistics(self, x: Block, leaf: jax.Array, masks: Sequence[jax.Array]) -> np.ndarray:
        """Return what `Stats.of` takes, for one block and its result."""
        (row_sums,) = passes.statistics()(x, leaf, masks)
        return self.totals(row_sums)

    def sums(self, kernel: Kernel, *operands: Any, **static: Any) -> np.ndarray:
        program = passes.values(kernel, True, passes.sum_rows, **static)
        parts = self.visit(lambda x, rows: self.totals(program(x, at(operands, x, rows))))
        return np.asarray(np.sum(parts, axis=0))

    def columns(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand:
        program = passes.values(kernel, False, passes.sum_columns, **static)
        parts = self.visit(lambda x, rows: np.asarray(program(x, at(operands, x, rows)), np.float64))
        total = np.sum(parts, axis=0).astype(np.float32)
        return lambda x, rows: total

    def rows(self, kernel: Kernel, *operands: Any, quick: Kernel | None = None, **static: Any) -> PerRow:
        program = passes.values(kernel, **static) if quick is None else passes.values(quick, True)
        arrays = self.join(self.visit(lambda x, rows: program(x, at(operands, x, rows))))
        if quick is not None:
            arrays = self.at_doubtful_rows(arrays[:-1], arrays[-1], passes.values(kernel, **static), operands)
        return PerRow(arrays)

    def whole(self, kernel: Kernel, *operands: Any, **static: Any) -> PerRow:
        blocks = self.visit(lambda x, rows: (x.base, x.branches, x.models))
        x = passes.block(*jax.tree.map(lambda *parts: self.join(parts), *blocks))
        return PerRow(self.join([passes.values(kernel, **static)(x, at(operands, x, None))]))

    def masks_by_rank(self, values: Kernel, ranks: Kernel, *operands: Any) -> Operand:
        values_of, ranks_of, sort_rows = passes.values(values), passes.values(ranks), self.zeros_and_sorted

        def masks(x: Block, rows: Any) -> list[jax.Array]:
            pairs = zip(values_of(x, []), ranks_of(x, at(operands, x, rows)), strict=True)
            return [passes.of_rank()(array, sort_rows(array), least) for array, least in pairs]

        return self.kept_masks(masks)

    def map(self, kernel: Kernel, *operands: Any, **static: Any) -> Merged:
        return Merged(kernel, operands, static)

    # What depends on where the blocks lie.

    def visit(self, work: Callable[[Block, Any], T]) -> list[T]:
        """Call `work(block, rows)` for every block of the tensor. Returns the results in order."""
        assert self._block is not None
        return [work(self._block, AllRows())]

    def join(self, parts: Sequence[Any]) -> Any:
        """Join arrays [..., rows of a block, n], one a block, to one of all the tensor's rows."""
        (array,) = parts
        return array

    def at_doubtful_rows(self, quick: Any, doubt: Any, program: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """Replace arrays [K, rows, 1] by what a program gives, at rows where `doubt` [rows, 1] is not 0."""
        if not doubt.any():
            return quick
        exact = self.join(self.visit(lambda x, rows: program(x, at(operands, x, rows))))
        return jnp.where(doubt != 0, exact, quick)

    def totals(self, row_sums: Any) -> np.ndarray:
        """Add up the row sums [K, rows] of a block: float64 [K]."""
        return np.asarray(_sum_rows(row_sums), np.float64)

    @staticmethod
    def zeros_and_sorted(array: Any) -> Any:
        """Return the array with each row sorted, after a column of zeros."""
        return _zeros_and_sorted(array)

    def kept_masks(self, masks: Callable[[Block, Any], Sequence[Any]]) -> Operand:
        """Return `masks` as an operand that keeps what it computed where memory allows."""
        (arrays,) = self.visit(masks)
        return lambda x, rows: arrays

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *operands: Any, **static: Any
    ) -> list[np.ndarray]:
        program = passes.values(kernel, **static)
        (arrays,) = self.visit(lambda x, rows: program(x, at(operands, x, rows)))
        return [np.asarray(_order_statistics(a, np.asarray(r, np.int32))) for a, r in zip(arrays, ranks, strict=True)]


_order_statistics = jax.jit(order_statistics)
_zeros_and_sorted = jax.jit(lambda x: jnp.pad(jnp.sort(x, axis=-1), [(0, 0), (1, 0)]))
# Apart from the sums within rows, since in one long float32 sum small terms would be lost.
_sum_rows = jax.jit(lambda row_sums: jnp.sum(row_sums, axis=1))
