"""Ids of tokens in config.json and generation_config.json, which follow their tokens to another tokenizer.

Plans call it where a result gets another tokenizer than its donor's. It reads and writes no files.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bmjax.config import shortened
from bmjax.merge.plan.heads import config_blocks

Config = dict[str, Any]
# Keys whose values are ids of the tokenizer's tokens. Those of codecs, units of speech and CTC count otherwise.
_KEY = re.compile(
    r"(?!(?:\w*_)?(?:codec|t2u|blank)_)(?:\w+_)?token_(?:id|idx|index)(?:e?s)?|(?:\w+_)?token_indices"
    r"|(?:im|img|image|video|audio|vision)_(?:start|end|patch|col|newline|pad)_id"
    r"|(?:begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_decoder_ids|sequence_bias|(?:lang|task)_to_id"
)
_PAIRS = {"forced_decoder_ids": 1, "sequence_bias": 0}  # lists of pairs, and which of the two is tokens
# Special tokens that a model may be without: null. A config's other keys take numbers alone: -1 is no token's id.
_MAY_BE_NULL = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id")
STATED = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


class _Missing(NamedTuple):
    """Stands for a token that the result lacks."""

    text: str


class _Ids:
    """Maps the ids of one tokenizer to those of the same tokens in the result's."""

    def __init__(self, old: Mapping[str, int], new: Mapping[str, int]) -> None:
        self.texts, self.new = {i: text for text, i in old.items()}, new
        self.new_texts = {i: text for text, i in new.items()}
        self.has_moves = any(new.get(text) != i for text, i in old.items())
        self.lost: dict[str, None] = {}  # texts of tokens without a counterpart, of the last value
        self.unknown: dict[int, None] = {}  # ids of no token, which stay, of the last value

    def moved(self, value: Any, key: str, depth: int = 0) -> Any:
        """Return a value of a key under the result's ids. What has no counterpart is dropped from a list."""
        if not depth:
            self.lost, self.unknown = {}, {}
        if type(value) is int:
            return self._id(value)
        if isinstance(value, dict):
            return {name: self.moved(part, key, depth + 1) for name, part in value.items()}
        if not isinstance(value, list):
            return value
        if depth == 1 and key in _PAIRS and len(value) == 2:
            parts = list(value)
            parts[_PAIRS[key]] = self.moved(value[_PAIRS[key]], key, 2)
        else:
            parts = [self.moved(part, key, depth + 1) for part in value]
        # A sequence of tokens is nothing without one of them.
        missing = next((part for part in parts if isinstance(part, _Missing)), None)
        if depth and missing is not None:
            return missing
        return [part for part in parts if not isinstance(part, _Missing)]

    def _id(self, value: int) -> int | _Missing:
        if value < 0:
            return value
        text = self.texts.get(value)
        if text is None:
            # Padding has no text. It matters where tokens move around it, or one takes its place.
            if self.has_moves or value in self.new_texts:
                self.unknown[value] = None
            return value
        if text not in self.new:
            self.lost[text] = None
            return _Missing(text)
        return self.new[text]


def follow_tokens(
    config: Mapping[str, Any],
    old: Mapping[str, int],
    new: Mapping[str, int],
    file: str = "config.json",
    stated: Mapping[str, Any] | None = None,
) -> tuple[Config, list[str]]:
    """Return a config whose ids of tokens are those of the same tokens in the result's tokenizer, and notes.

    Arguments:
        config: a config or generation config. Blocks of language models inside it are changed, too.
        old: the id of each token in the tokenizer that the config was written for.
        new: the same of the result's tokenizer.
        file: what the notes call the config.
        stated: ids that the model of the result's tokenizer states. They go before those of the same tokens.
    """
    result, notes, stated = copy.deepcopy(dict(config)), dict[str, None](), stated or {}
    ids, moved = _Ids(old, new), dict[str, None]()
    for block in config_blocks(result):
        for key in [key for key, value in block.items() if _KEY.fullmatch(key) and value is not None]:
            if key in stated:
                if block[key] != stated[key]:
                    moved[key] = None
                block[key] = copy.deepcopy(stated[key])
                continue
            value = ids.moved(block[key], key)
            if isinstance(value, dict):
                value = {name: i for name, i in value.items() if not isinstance(i, _Missing)}
            outcome = "left out"
            if isinstance(value, _Missing) or (value == [] and block[key]):
                is_null = isinstance(block[key], list) or _MAY_BE_NULL.fullmatch(key) is not None
                value, outcome = (None, "written as null") if is_null else (-1, "written as -1, no token's id")
            if ids.lost:
                notes[
                    f"{file}: {key}: the result's tokenizer lacks {shortened([*map(repr, ids.lost)], 3)}: {outcome}; "
                    "name it under `tokenizer:` `tokens:` to keep it"
                ] = None
            if ids.unknown:
                taken = [repr(ids.new_texts[i]) for i in ids.unknown if i in ids.new_texts]
                now = f", and is now {shortened(taken, 3)}: look at it" if taken else ""
                shown = shortened([*map(str, ids.unknown)], 3)
                notes[f"{file}: {key}: {shown} was no token's id, so it stays{now}"] = None
            if value != block[key] and outcome == "left out":  # else it is told already
                moved[key] = None
            block[key] = value
    if moved:
        notes[f"{file}: {', '.join(moved)}: by the result's tokenizer, which has other ids than the donor's"] = None
    # Other blocks may count ids of their own.
    models = {id(block) for block in config_blocks(dict(config))}
    others = [path for path, key, value in _other_ids(config, models) if ids.moved(value, key) != value]
    if others:
        notes[f"{file}: {shortened(others, 3)} stay as they are: look whether they are ids of the tokenizer"] = None
    return result, list(notes)


def stated_ids(config: Mapping[str, Any]) -> Config:
    """Return the ids of special tokens that a config states, itself or in the block of its language model."""
    blocks = reversed(list(config_blocks(dict(config))))  # the outermost decides
    return {key: block[key] for block in blocks for key in STATED if block.get(key) is not None}


def _other_ids(config: Mapping[str, Any], models: set[int], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of ids in blocks that are none of `models`, which holds the objects' ids."""
    for key, value in config.items():
        if not isinstance(value, dict) or _KEY.fullmatch(key):
            continue
        if id(value) not in models:
            yield from ((f"{path}{key}.{k}", k, v) for k, v in value.items() if v is not None and _KEY.fullmatch(k))
        yield from _other_ids(value, models, f"{path}{key}.")
