"""The layers of a slice: which of each model's it is merged from, and where it may hold none."""

from collections.abc import Sequence

from bmjax.config import UserError
from bmjax.merge.recipe.yaml_blocks import LayersEntry


def layer_ranges(reads: Sequence[str], entries: Sequence[LayersEntry]) -> dict[str, tuple[int, int]]:
    """Return which layers of each model a slice reads; a model that is not listed is read where all others are.

    reads: the models, in order.
    """
    ranges = {entry.model: entry.layer_range for entry in entries}
    leader, (start, stop) = next(iter(ranges.items()))
    for model, (first, end) in ranges.items():
        if not 0 <= first <= end:
            raise UserError(f"model '{model}': layer_range [{first}, {end}]: expected [first, end], 0 <= first <= end")
    for model, (first, end) in ranges.items():
        if end - first != stop - start:
            raise UserError(
                f"'{leader}' gives {stop - start} layers, '{model}' {end - first}; all sources of a slice give as many"
            )
    unlisted = [model for model in reads if model not in ranges]
    if unlisted and len(set(ranges.values())) > 1:
        raise UserError(f"list '{unlisted[0]}' among the sources: which of its layers are meant is not clear")
    return {model: ranges.get(model, (start, stop)) for model in reads}


def check_lengths(counts: Sequence[int]) -> None:
    """Raise a UserError for a slice without layers where it would give nothing. counts: the layers of each slice.

    The first slice gives what stands before the layers, too, and the last one the head: they may hold no layer.
    """
    for i, count in enumerate(counts):
        if count == 0 and (0 < i < len(counts) - 1 or not any(counts)):
            raise UserError(
                f"slices[{i}]: its layer_range holds no layer, so nothing is taken from it: remove it; only the first "
                "slice may hold none, for the embedding, or the last, for the head"
            )
