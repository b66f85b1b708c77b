"""Rows of tokens: which rows of a model's embedding or head make the result's, and reading them in that order."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import TensorInfo
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.vocabulary import MAX_ROWS, Vocabulary
from bmjax.merge.recipe.recipe import Recipe

Other = tuple[str, str, np.ndarray]  # model, tensor, for every row of the result the row of that, -1 for none


class TokenRows:
    """Where each model has the rows of the result. `notes` gathers what was done about differing sizes."""

    def __init__(self, recipe: Recipe, layout: Layout, tokens: Vocabulary | None) -> None:
        self.recipe, self.layout, self.tokens = recipe, layout, tokens
        self.notes: dict[str, None] = {}
        self._own: dict[tuple[str, str], np.ndarray] = {}
        self._of: dict[tuple[str, str], tuple[np.ndarray | None, tuple[Other, ...]]] = {}

    def of(self, model: str, result: str) -> tuple[np.ndarray | None, tuple[Other, ...]]:
        """The rows of an input for the tensor `result`, None for all as they are; what stands in for those it lacks."""
        if (model, result) not in self._of:
            has = (self.layout.shape(model, result) or (0,))[0]
            if self.tokens is None and has == self._wanted(result):
                self._of[model, result] = (None, ())
                return None, ()
            own = self._rows(model, result)
            same = len(own) == has and bool(np.array_equal(own, np.arange(has)))
            self._of[model, result] = (None, ()) if same else (own, self._stand_ins(model, result))
            if not same and self.tokens is None:
                donor, more = self.recipe.donor, has - len(own)
                told = f"its last {more} are not read" if more > 0 else f"the {-more} it lacks are taken from there"
                self.notes[f"model '{model}' has {has} rows of tokens, '{donor}' {len(own)}: {told}"] = None
        return self._of[model, result]

    def _wanted(self, result: str) -> int:
        """How many rows of tokens the result has: the new tokenizer's, or as many as the donor."""
        if self.tokens is not None:
            return self.tokens.size
        shapes = [self.layout.shape(model, result) for model in (self.recipe.donor, *self.recipe.inputs)]
        return next(shape[0] for shape in shapes if shape)

    def _rows(self, model: str, result: str) -> np.ndarray:
        """For every row of the result the model's row, -1 where it has none."""
        if (model, result) not in self._own:
            has, wanted = (self.layout.shape(model, result) or (0,))[0], self._wanted(result)
            if max(has, wanted) > MAX_ROWS:
                raise UserError(
                    f"tensor '{result}' has {has} rows in model '{model}', the result {wanted}; rows of tokens are put "
                    f"in order up to {MAX_ROWS}"
                )
            if self.tokens is not None:
                rows = self.tokens.rows(model, has)
            else:
                rows = np.arange(wanted, dtype=np.int64)
                rows[has:] = -1
            self._own[model, result] = rows
        return self._own[model, result]

    def _stand_ins(self, model: str, result: str) -> tuple[Other, ...]:
        lacks = self._rows(model, result) < 0
        found: dict[str, np.ndarray] = {}
        for row, (place, _) in (self.tokens.rules if self.tokens else {}).items():
            if lacks[row]:
                lacks[row] = False
                if place is not None:
                    found.setdefault(place[0], np.full(len(lacks), -1, np.int64))[row] = place[1]
        donor = self.recipe.donor
        for other in (donor, *(name for name in self.recipe.inputs if name != donor)):
            theirs = self._rows(other, result)
            takes = lacks & (theirs >= 0)
            if takes.any():
                found.setdefault(other, np.full(len(lacks), -1, np.int64))[takes] = theirs[takes]
            if other == donor:
                lacks &= ~takes
        places = ((other, self.layout.find(other, result), rows) for other, rows in found.items())
        return tuple((other, tensor, rows) for other, tensor, rows in places if tensor is not None)


def row_reader(
    info: TensorInfo,
    rows: np.ndarray,
    others: Sequence[tuple[TensorInfo, np.ndarray]],
    read: Callable[[TensorInfo, int, np.ndarray], None],
) -> Callable[[int, np.ndarray], None]:
    """Reads a tensor in the order of the result's rows: `f(start, out)` fills `out` [n] with entries `start`.. of it.

    rows, others: as in `bmjax.merge.plan.nodes.Source`. read: fills an array, of a tensor's stored type, with that
    tensor's entries from a given one on. Rows that follow each other in the file are read at once.
    """
    width = math.prod(info.shape[1:])

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
                found = [(other, int(theirs[row])) for other, theirs in others if theirs[row] >= 0]
                total = np.zeros(len(part), np.float32)
                for other, at in found:
                    values = np.empty(len(part), other.numpy_dtype)
                    read(other, at * width + inside, values)
                    total += values.astype(np.float32)
                part[...] = (total / max(1, len(found))).astype(part.dtype)
            row = last

    return fill
