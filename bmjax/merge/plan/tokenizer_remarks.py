"""What a plan says of inputs whose tokenizers differ from the result's: in their tokens, or in how they split text.

A result has one tokenizer. Models that were trained with other pieces of the same text lose by that, so it is told.
"""

import contextlib
import filecmp
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bmjax.config import shortened
from bmjax.merge.plan.damaged_files import damage
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.tokenizer_text import tokenizer_difference, vocabulary_files
from bmjax.merge.plan.vocabulary import Vocabulary
from bmjax.weights.tokenizer import MAX_CHARACTERS, read_json

# The parts of tokenizer.json that make tokens of text and text of tokens, beside the tokens.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Flags of the model in tokenizer.json; `merges` is compared where the tokens are the same.
_FLAGS = ("type", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
_ADDED = ("special", "normalized", "lstrip", "rstrip", "single_word")
# Keys of tokenizer_config.json, and what loaders take where one is missing. None: what the class says, so that only
# two stated values differ.
_SETTINGS = {
    "add_bos_token": False, "add_eos_token": False, "padding_side": "right", "truncation_side": "right",
    "add_prefix_space": None,
}  # fmt: skip
_SPECIAL = ("bos_token", "pad_token", "unk_token")  # which chat.py does not speak of


def tokenizer_remarks(layout: Layout, models: Iterable[str], tokens: Vocabulary | None) -> Iterator[str]:
    """Yield a line for each model whose tokenizer is not the result's, or cannot be compared with it.

    models: those whose rows of tokens are merged. tokens: the result's tokenizer; None: the donor's.
    """
    donor = layout.recipe.donor
    source = layout.models[donor].directory if tokens is None else tokens.source
    for model in models:
        directory = layout.models[model].directory
        if tokens is None and (difference := tokenizer_difference(source, directory)):
            problems = ((directory / name, damage(directory / name)) for name in vocabulary_files(directory))
            path, problem = next(((path, problem) for path, problem in problems if problem), (None, None))
            if path is not None:
                yield (
                    f"model '{model}': {path}: {problem}; whether its tokens are those of '{donor}' cannot be told; "
                    "rows of tokens are merged by number"
                )
            else:
                yield (
                    f"model '{model}' has another tokenizer than '{donor}': {difference}; rows of tokens are merged by "
                    "number; write tokenizer_source: base (or union) to merge them by token"
                )
        elif differing := differing_parts(source, directory, by_id=tokens is None):
            whose = f"'{donor}'" if tokens is None else f"{source}"
            yield (
                f"model '{model}': its tokenizer reads or writes text otherwise than that of {whose}, which the result "
                f"gets: {', '.join(differing)}"
            )


def differing_parts(first: Path, second: Path, *, by_id: bool = True) -> list[str]:
    """Return what differs between two directories' tokenizers beside their tokens, by the names in their files.

    by_id: whether tokens have the same ids in both, so that what names them by id is compared, too.
    """
    differing = []
    if not _is_same_file(first, second, "tokenizer.json"):
        ours, theirs = (read_json(directory / "tokenizer.json") for directory in (first, second))
        if ours and theirs:
            differing += _parts(ours, theirs, by_id)
    is_slow = not any((directory / "tokenizer.json").is_file() for directory in (first, second))
    if is_slow and by_id and not _is_same_file(first, second, "merges.txt"):
        differing.append("merges.txt")
    if not _is_same_file(first, second, "tokenizer_config.json"):
        configs = [read_json(directory / "tokenizer_config.json") for directory in (first, second)]
        # Who asks for another tokenizer knows that its tokens have other names.
        settings = _SETTINGS | (dict.fromkeys(_SPECIAL) if by_id else {})
        for key, default in settings.items() if all(configs) else ():
            values = [_plain(config.get(key)) for config in configs]
            old, new = (default if value is None else value for value in values)
            if None not in (old, new) and old != new:
                differing.append(f"{key} {_shown(new)} for {_shown(old)}")
    return differing


def _parts(first: Mapping[str, Any], second: Mapping[str, Any], by_id: bool) -> list[str]:
    differing = []
    for part in _PARTS:
        ours, theirs = first.get(part), second.get(part)
        if ours == theirs:
            continue
        ours, theirs = _as_today(part, ours), _as_today(part, theirs)
        if (ours, theirs) != (None, None) and _without_ids(ours, by_id) != _without_ids(theirs, by_id):
            differing.append(f"{part} {_kind(theirs)} for {_kind(ours)}" if _kind(ours) != _kind(theirs) else part)
    ours, theirs = (content.get("model") or {} for content in (first, second))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        differing += [f"model.{key}" for key in _FLAGS if (ours.get(key) or None) != (theirs.get(key) or None)]
        if by_id and _pairs(ours.get("merges")) != _pairs(theirs.get("merges")):
            differing.append("model.merges")
    added = [
        {token.get("content"): token for token in content.get("added_tokens") or () if isinstance(token, dict)}
        for content in (first, second)
    ]
    for flag in _ADDED:
        names = [
            str(name) for name, token in added[0].items()
            if name in added[1] and bool(token.get(flag)) != bool(added[1][name].get(flag))
        ]  # fmt: skip
        if names:
            differing.append(f"`{flag}` of {shortened(names, 3)}")
    return differing


def _as_today(part: str, value: Any) -> Any:
    """Return a part of tokenizer.json as the library writes it now: older versions left out or spelt keys otherwise."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with contextlib.suppress(Exception):  # the library's own, for what it does not know
        read = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, part: value}))
        return json.loads(read.to_str())[part]
    return value


def _without_ids(value: Any, by_id: bool) -> Any:
    """Return a part without the ids of tokens, where those are not compared."""
    if by_id:
        return value
    if isinstance(value, dict):
        return {key: _without_ids(entry, by_id) for key, entry in value.items() if key != "ids"}
    if isinstance(value, list):
        return [_without_ids(entry, by_id) for entry in value if type(entry) is not int]
    return value


def _pairs(merges: Any) -> Any:
    """Return merges as pairs of tokens, which older files join by a space."""
    return [entry.split(" ") if isinstance(entry, str) else entry for entry in merges or ()]


def _kind(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "none"


def _plain(token: Any) -> Any:
    """Return a setting's value, of a token its text."""
    return token.get("content") if isinstance(token, dict) else token


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"'{str(value)[:20]}'"


def _is_same_file(first: Path, second: Path, name: str) -> bool:
    """Return whether both directories have a file in equal bytes, or neither has it. What is too large is not read."""
    paths = first / name, second / name
    are_there = [path.is_file() for path in paths]
    if not all(are_there):
        return not any(are_there)
    is_too_large = max(path.stat().st_size for path in paths) > MAX_CHARACTERS
    return is_too_large or paths[0].samefile(paths[1]) or filecmp.cmp(*paths, shallow=False)
