"""Numbers of layers in a config, which follow the layers in a stack: keys of dicts, single numbers, values of lists.

`merged_config` calls it for every part of a config. What has no one number in the result is told, never guessed.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.merge.plan.tensor_names import TOWERS

Layers = Sequence[tuple[str, int]]  # (input, its layer) that each layer of the result comes from
_NUMBER = re.compile(r"[0-9]{1,5}")
# Keys of the first and the last of a row of layers, and how far the last key's number lies behind the last layer.
_ROWS = (("moe_layer_start_index", "moe_layer_end_index", 0), ("loop_layer_index_start", "loop_layer_index_end", 1))
_OF_ROWS = {key for first, last, _ in _ROWS for key in (first, last)}
_ONE_LAYER = re.compile(r"(.*_)?(layer_?(idx|index|id|number)|(start|end|first|last|exit|split|switch)_layer)(_\w+)?")
# Lists with an entry for every layer that is the number of another, whose keys and values it takes, say.
_SOURCES = re.compile(r"(.*_)?(source|shared?|from)_?layers?(_(ids|idx|indices))?|(.*_)?layer_(sources?|map)")


def is_by_number(value: Any) -> bool:
    """Return whether a value is a dict whose keys are all numbers, as text."""
    return isinstance(value, Mapping) and bool(value) and all(map(_NUMBER.fullmatch, value))


def moved_entries(
    key: str, value: Mapping[str, Any], entries: Mapping[str, Any], count: int, layers: Layers
) -> tuple[Mapping[str, Any], list[str]]:
    """Return a dict of entries by the number of a layer, with the numbers of the result's layers; and a note.

    value: the donor's, of `count` layers. entries: of every model that `layers` names.
    """
    is_known = re.search("layer|pruned_heads", key) is not None
    if (last := max(map(int, value))) >= count:
        return value, [f"config.json: {key} names layer {last} of {count}; not changed, look at it"] * is_known
    if not all(is_by_number(entries[model]) for model, _ in layers):
        return value, [f"config.json: {key} has entries by layer, and not every model has it; look at it"]
    by_number = {model: {int(key): entry for key, entry in entries[model].items()} for model, _ in layers}
    moved = {n: by_number[model][number] for n, (model, number) in enumerate(layers) if number in by_number[model]}
    # transformers fills numbers up with zeros, so that they are in order as text, too.
    width = len(str(max(moved, default=0))) if any(key != str(int(key)) for key in value) else 1
    note = f"config.json: the keys of {key} are numbers that layers have, so they follow their layers; look at it"
    return {str(n).zfill(width): copy.deepcopy(entry) for n, entry in moved.items()}, [note] * (not is_known)


def is_of_sources(key: str, value: Sequence[Any], count: int) -> bool:
    """Return whether a list has an entry for each of `count` layers that is the number of a layer, or below 0."""
    is_of_numbers = all(type(number) is int and number < count for number in value)
    return _SOURCES.fullmatch(key) is not None and len(value) == count and is_of_numbers


def moved_sources(key: str, entries: Mapping[str, Sequence[int]], layers: Layers) -> tuple[list[int], list[str]]:
    """Return a list of layers by number, with an entry for every layer, for layers in their new order; and a note.

    A layer that is its own source stays so. Others take the nearest place of their source on the side where it was.
    """
    moved, lost = [], []
    for n, (model, number) in enumerate(layers):
        source = entries[model][number]
        side = range(n - 1, -1, -1) if source < number else range(n + 1, len(layers))
        place = next((k for k in side if layers[k] == (model, source)), None)
        if source < 0 or source == number:
            moved.append(source if source < 0 else n)
        elif place is not None:
            moved.append(place)
        else:
            moved.append(n)
            lost.append(f"{n} (was {number} of '{model}') takes from layer {source}")
    if not lost:
        return moved, []
    return moved, [
        f"config.json: {key}: layer {'; layer '.join(lost[:3])}, which the result does not have there: it computes "
        "something else; stack these layers with those that they take from"
    ]


def set_numbers(values: dict[str, Any], theirs: Mapping[str, Any], count: int, layers: Layers, path: str) -> list[str]:
    """Make the single numbers of layers in a part of a config, of `count` layers, those of `layers`; returns notes.

    theirs: the same part of every model's config. path: of the part, with a point behind it.
    """
    notes = []
    parts = {model: part if isinstance(part, Mapping) else {} for model, part in theirs.items()}
    for first, last, behind in _ROWS:
        if first in values or last in values:
            notes += _set_row(values, parts, layers, (first, last, behind), path)
    for key, value in values.items():
        if type(value) is not int or not 0 <= value <= count or key in _OF_ROWS or re.search(TOWERS, key):
            continue
        if not _ONE_LAYER.fullmatch(key):
            continue
        places = [n for n, (model, number) in enumerate(layers) if parts[model].get(key) == number]
        if len(places) == 1:
            values[key] = places[0]
        elif value < count or "end" in key:
            has = f"has it as {' and '.join(map(str, places))}" if places else "does not have it"
            notes.append(
                f"config.json: {path}{key} {value} is the number of a layer, and the result {has}: set it yourself"
            )
    return notes


def _set_row(
    values: dict[str, Any], parts: Mapping[str, Mapping[str, Any]], layers: Layers, row: tuple[str, str, int], path: str
) -> list[str]:
    """Set the first and the last number of a row of layers that are of another kind than those around it."""
    first, last, behind = row
    keys = f"{path}{first} and {last}"
    inside, numbers, notes = [], [], list[str]()
    for n, (model, number) in enumerate(layers):
        start, end = parts[model].get(first), parts[model].get(last)
        if behind == 0 and end in (None, -1):  # up to the last layer
            end = number
        if type(start) is not int or type(end) is not int:
            return [f"config.json: {keys} number layers, which have moved, and are no two numbers; look at them"]
        if start <= number <= end - behind:
            inside.append(n)
            numbers.append(number)
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        shown = ", ".join(map(str, inside[:8])) or "none"
        return [
            f"config.json: {keys} name one row of layers, and those of that kind are now {shown}: the result cannot be "
            "loaded as it is; stack other layers"
        ]
    if behind and numbers != list(range(values[first], values[last] - behind + 1)):
        notes = [f"config.json: {keys} name other layers than before; what is stored for each of them is not moved"]
    values[first] = inside[0]
    if values.get(last) not in (None, -1) or inside[-1] < len(layers) - 1:
        values[last] = inside[-1] + behind
    return notes
