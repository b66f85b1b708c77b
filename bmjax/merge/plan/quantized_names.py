"""Names of modules in quantization settings: those of layers follow their layers in a stack.

Settings name modules as they are, by globs or by regular expressions, in lists or as keys. A pattern that names layers
by number in a way that cannot be renamed is told.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.merge.plan.tensor_names import TOWERS
from bmjax.weights.tokenizer import read_json

# Files beside config.json that hold such settings.
SETTINGS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
MAX_CHARACTERS = 10_000  # of a name or a pattern that is looked at
_STACK = r"\b(?:layers?|h|blocks?)"
_OTHERS = re.compile(rf"{TOWERS}|(^|[.*])mtp")  # modules beside the language model's stack
# A name, or a glob with a point behind the number: `model.layers.3.mlp.up_proj`, `*.layers.3.*`.
_NAME = re.compile(rf"((?!re:|[-+]:)[^\\]*?{_STACK}\.)([0-9]{{1,5}})((?:\.[^\\]*)?)")
_BEGIN = re.compile(rf"((?!re:|[-+]:)[^\\]*?{_STACK}\.)([0-9]{{1,5}})\*")  # ModelOpt's `model.layers.3*`
# A regular expression with one number between points: `re:.*layers\.3\.mlp.*`, `-:model\.layers\.3\..*`.
_PATTERN = re.compile(rf"(.*?{_STACK}\\?\.)([0-9]{{1,5}})((?:\\\.|\.(?=[A-Za-z_])|\$).*|)")
# What stands for any number behind `layers.`, and what stands for some.
_ANY = r"\(?(?:\?:)?(?:\\d[+*]|\[0-9\][+*]|\.[+*]|\\w[+*]|\[\^[^]]*\][+*])"
_SOME = re.compile(rf"{_STACK}(?:\\\.|\.|\[\.\])(?!{_ANY})\(?(?:\?[:!=])?(?:[0-9]|\[[0-9]|\\d)")
_NUMBERS = re.compile(rf"{_STACK}\\?\.\(?[0-9]")


def follow_names(settings: Any, layers: Sequence[tuple[str, int]], count: int, path: str) -> tuple[Any, list[str]]:
    """Return quantization settings of `count` layers whose names of modules are those of `layers`; and notes.

    They stay where models of one scheme are copied, so all of them have the same settings. path: of the settings in
    config.json, or their file, for the notes.
    """
    if isinstance(settings, dict):
        moved: dict[str, Any] = {}
        notes = []
        for key, value in settings.items():
            names, lines = _renamed(key, layers, count, path)
            new, more = follow_names(value, layers, count, f"{path}.{key}")
            moved |= dict.fromkeys([key] if names is None else names, new)
            notes += lines + more
        return moved, notes
    if not isinstance(settings, list):
        return settings, []
    others, by_layer, notes = [], list[tuple[int, str]](), []
    for value in settings:
        if not isinstance(value, str):
            new, lines = follow_names(value, layers, count, path)
            others.append(new)
        else:
            names, lines = _renamed(value, layers, count, path)
            if names is None:
                others.append(value)
            else:
                by_layer += [(place, name) for name, place in names.items()]
        notes += lines
    by_layer.sort(key=lambda item: item[0])
    return others + [name for _, name in by_layer], notes


def follow_files(directory: Path, layers: Sequence[tuple[str, int]], count: int) -> tuple[dict[str, Any], list[str]]:
    """Return the new content of a directory's files of quantization settings that name layers; and notes."""
    changed: dict[str, Any] = {}
    notes = []
    for name in SETTINGS_FILES:
        if content := read_json(directory / name):
            moved, lines = follow_names(content, layers, count, name)
            notes += lines
            if moved != content:
                changed[name] = moved
    return changed, notes


def _renamed(
    name: str, layers: Sequence[tuple[str, int]], count: int, path: str
) -> tuple[dict[str, int] | None, list[str]]:
    """Return what a name becomes, with the layer of each; None for a name of no layer by number; and a note."""
    if _OTHERS.search(name):
        return None, []
    if len(name) > MAX_CHARACTERS:
        return None, [f"{path}: '{name[:60]}...' has {len(name)} characters: it is not changed, look at it"]
    if match := _BEGIN.fullmatch(name):  # of layer 1, 10, 11 and so on
        numbers = [number for number in range(count) if str(number).startswith(match[2])]
        places = [n for n, (_, number) in enumerate(layers) if number in numbers]
        return {f"{match[1]}{n}.*": n for n in places}, []
    match = _NAME.fullmatch(name)
    is_one = len(_NUMBERS.findall(name)) == 1 and not re.search(r"\(\?<?!", name) and "|" not in _outside(name)
    if match is None and is_one:
        match = _PATTERN.fullmatch(name)
    if match is not None:
        number = int(match[2])
        if number >= count:  # of those that predict further tokens
            return {f"{match[1]}{number - count + len(layers)}{match[3]}": number - count + len(layers)}, []
        return {f"{match[1]}{n}{match[3]}": n for n, (_, old) in enumerate(layers) if old == number}, []
    if _SOME.search(name):
        return None, [
            f"{path}: '{name[:200]}' names layers by number, and they have moved: it is not changed, so other layers "
            "are treated as it says; write it for the result's layers"
        ]
    return None, []


def _outside(pattern: str) -> str:
    """Return what of a pattern stands in no parentheses."""
    while (inner := re.sub(r"\([^()]*\)", "", pattern)) != pattern:
        pattern = inner
    return pattern
