"""Rows of tokens: which rows of a model's embedding or head make the result's, and reading them in that order."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import TensorInfo, listing
from bmjax.merge.plan.heads import config_blocks
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.per_layer_tensors import per_layer_rows
from bmjax.merge.plan.tensor_names import is_per_layer_embedding, with_tokens
from bmjax.merge.plan.vocabulary import MAX_ROWS, Vocabulary

StandIn = tuple[str, str, np.ndarray]  # model, tensor, for every row of the result the row of that tensor, -1 for none


class TokenRows:
    """Where each input has the rows of the result. Remarks on differing sizes go to `layout.notes`."""

    def __init__(self, layout: Layout, tokens: Vocabulary | None) -> None:
        self.layout, self.tokens = layout, tokens
        self._rows: dict[tuple[str, str], np.ndarray] = {}
        self._are_moved = False

    def of(self, model: str, result: str) -> tuple[np.ndarray | None, tuple[StandIn, ...]]:
        """Return an input's rows for the tensor `result` (None: as they are), and what stands in for missing ones."""
        count = self.layout.row_count(model, result) or 0
        if self.tokens is None and count == self._result_count(result):
            return None, ()
        rows = self._rows_of(model, result)
        if len(rows) == count and bool(np.array_equal(rows, np.arange(count))):
            return None, ()
        self._are_moved |= self.tokens is not None
        if self.tokens is None:
            donor, surplus = self.layout.recipe.donor, count - len(rows)
            missing = f"the {-surplus} it lacks are taken from there"
            remark = f"its last {surplus} are not read" if surplus > 0 else missing
            self.layout.notes[f"model '{model}' has {count} rows of tokens, '{donor}' {len(rows)}: {remark}"] = None
        return rows, self._stand_ins(model, result)

    def remarks(self, names: Iterable[str]) -> Iterator[str]:
        """Yield a line on those of the donor's tensors that may have a part for each token, and are not known to."""
        donor = self.layout.recipe.donor
        embedding = self.layout.tensor(donor, self.layout.embedding(donor) or "")
        if not self._are_moved or embedding is None:
            return
        # What a config counts, by whether it is tokens. Of as many of something else by chance nothing can be said.
        counts, sizes = {embedding.shape[0]}, {*embedding.shape[1:]}
        for block in config_blocks(self.layout.configs[donor] or {}):
            for key, value in block.items():
                if type(value) is int and "token" not in key:
                    (counts if "vocab" in key else sizes).add(value)
        infos = self.layout.models[donor].tensors
        unknown = [
            name for name in names
            if {*infos[name].shape} & (counts - sizes - {1}) and not self.layout.is_vocabulary(name)
        ]  # fmt: skip
        if unknown:
            yield (
                f"{listing(unknown)} of '{donor}': an axis is as long as its rows of tokens, which move; if it goes "
                "along the tokens the result is wrong, for it is merged by number"
            )

    def _result_count(self, result: str) -> int:
        if self.tokens is not None:
            if is_per_layer_embedding(result) and (rows := per_layer_rows(self.layout, self.tokens)) is not None:
                return rows
            return self.tokens.size + self._is_embedding(result) * self.tokens.result_behind
        recipe = self.layout.recipe
        counts = (self.layout.row_count(model, result) for model in (recipe.donor, *recipe.inputs))
        return next(count for count in counts if count is not None)

    def _is_embedding(self, result: str) -> bool:
        return result == self.layout.embedding(self.layout.recipe.donor)

    def _rows_of(self, model: str, result: str) -> np.ndarray:
        """Return for every row of the result the model's row, -1 where it has none: int64."""
        if (model, result) not in self._rows:
            count, result_count = self.layout.row_count(model, result) or 0, self._result_count(result)
            if max(count, result_count) > MAX_ROWS:
                raise UserError(
                    f"tensor '{result}' has {count} rows in model '{model}', the result {result_count}; rows of tokens "
                    f"are put in order up to {MAX_ROWS}"
                )
            if self.tokens is not None and is_per_layer_embedding(result):
                # Of tokens beyond its last row a model takes the first.
                embedded = self.layout.row_count(model, self.layout.embedding(model) or "") or count
                rows = self.tokens.rows(model, max(embedded, count))[:result_count]
                rows[rows >= count] = 0
            elif self.tokens is not None:
                rows = self.tokens.rows(model, count, self._is_embedding(result))
            else:
                rows = np.arange(result_count, dtype=np.int64)
                rows[count:] = -1
            self._rows[model, result] = rows
        return self._rows[model, result]

    def _stand_ins(self, model: str, result: str) -> tuple[StandIn, ...]:
        """Return what gives the rows that a model lacks: the recipe's rules, else the donor alone, else all others."""
        lacks = self._rows_of(model, result) < 0
        taken: dict[str, np.ndarray] = {}
        for row, rule in (self.tokens.rules if self.tokens else {}).items():
            if row < len(lacks) and lacks[row]:
                lacks[row] = False
                if rule.source is not None:
                    source_model, source_row = rule.source
                    taken.setdefault(source_model, np.full(len(lacks), -1, np.int64))[row] = source_row
        donor = self.layout.recipe.donor
        for other in dict.fromkeys([donor, *self.layout.recipe.inputs]):
            rows = self._rows_of(other, result)
            usable = lacks & (rows >= 0)
            if usable.any():
                taken.setdefault(other, np.full(len(lacks), -1, np.int64))[usable] = rows[usable]
            if other == donor:
                lacks &= ~usable
        tensors = ((other, self.layout.find(other, result), rows) for other, rows in taken.items())
        return tuple((other, tensor, rows) for other, tensor, rows in tensors if tensor is not None)


def row_reader(
    info: TensorInfo,
    rows: np.ndarray,
    others: Sequence[tuple[TensorInfo, np.ndarray]],
    read: Callable[[TensorInfo, int, np.ndarray], None],
) -> Callable[[int, np.ndarray], None]:
    """Return `fill(start, out)`, which reads a tensor in the order of the result's rows into `out` [n].

    Rows that follow each other in the file are read at once. info, rows, others: a tensor, its rows and what stands in,
    as in `bmjax.merge.plan.node.TensorSource`. read: fills an array, of a tensor's stored type, with that tensor's
    entries from a flat index on.
    """
    width = math.prod(with_tokens(info.name, info.shape))

    def fill(start: int, out: np.ndarray) -> None:
        row, end = start // width, start + len(out)
        while row * width < end:
            last = row + 1
            if rows[row] >= 0:
                while last * width < end and rows[last] == rows[row] + last - row:
                    last += 1
            first, stop = max(start, row * width), min(end, last * width)
            part, inside = out[first - start : stop - start], first - row * width
            if rows[row] >= 0:
                read(info, int(rows[row]) * width + inside, part)
            else:
                stand_ins = [(other, int(other_rows[row])) for other, other_rows in others if other_rows[row] >= 0]
                total = np.zeros(len(part), np.float32)
                for other, other_row in stand_ins:
                    values = np.empty(len(part), other.numpy_dtype)
                    read(other, other_row * width + inside, values)
                    total += values.astype(np.float32)
                part[...] = (total / max(1, len(stand_ins))).astype(part.dtype)
            row = last

    return fill
