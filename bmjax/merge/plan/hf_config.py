"""What a merge changes in its donor's config.json, and where the inputs' configs disagree."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.io.safetensors import Checkpoint
from bmjax.model.config import read_hf_config

_TIED = "tie_word_embeddings"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_NESTED = ("text_config", "llm_config", "language_config")
_MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size", _TIED,
}  # fmt: skip


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The config.json beside the weights, or None."""
    # A link that leads nowhere is a mistake, not a model without a config.
    return read_hf_config(checkpoint.directory) if os.path.lexists(checkpoint.directory / "config.json") else None


def says_untied(checkpoint: Checkpoint) -> bool:
    """Whether the config says that the head is not the embedding."""
    return any(block.get(_TIED) is False for block in _blocks(read_config(checkpoint) or {}))


def _blocks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and what it holds of a language model inside another."""
    yield config
    yield from (config[key] for key in _NESTED if isinstance(config.get(key), dict))


def config_changes(
    donor: str,
    models: Mapping[str, Checkpoint],
    *,
    head: tuple[bool, bool],
    layers: Sequence[tuple[str, int]],
    donor_layers: int,
    vocabulary: tuple[int, Path] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(the keys of the donor's config.json that change, with their values; notes).

    head: whether the donor, and the result, have a head of their own. layers: the input and its layer that each of the
    result's is configured as; empty where there is nothing to say. vocabulary: rows of tokens, and the directory that
    a new tokenizer comes from.
    """
    old = read_config(models[donor])
    if old is None:
        return {}, [f"model '{donor}' has no config.json, so the result has none either"]
    new, notes = copy.deepcopy(old), list[str]()
    tied = any(block.get(_TIED) is True for block in _blocks(old))
    if head[1] and (tied or not head[0]):
        _put(new, _TIED, False)
    elif head[0] and not head[1]:
        _put(new, _TIED, True)
    if vocabulary is not None:
        size, source = vocabulary
        _put(new, "vocab_size", size)
        theirs = (
            read_hf_config(source) if (source / "config.json").exists() and source != models[donor].directory else {}
        )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in theirs:
                _put(new, key, theirs[key])
    if list(layers) != [(donor, number) for number in range(donor_layers)] and layers:
        notes += _set_layers(new, donor_layers, layers, {name: read_config(model) for name, model in models.items()})
    return {key: value for key, value in new.items() if key not in old or old[key] != value}, notes


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    holders = [block for block in _blocks(config) if key in block] or [config]
    for block in holders:
        block[key] = value


def _set_layers(
    config: dict[str, Any],
    count: int,
    layers: Sequence[tuple[str, int]],
    configs: Mapping[str, dict[str, Any] | None],
) -> list[str]:
    """Makes `config`, of `count` layers, that of `layers`; returns notes."""
    notes, found = [], False
    for place, block in enumerate(_blocks(config)):
        for key in _LAYERS:
            if block.get(key) == count:
                block[key], found = len(layers), True
        for key, value in block.items():
            if not isinstance(value, list) or "layer" not in key or not value:
                continue
            if len(value) != count:
                notes.append(f"config.json: {key} names layers by number; it was not changed, look at it")
                continue
            try:
                block[key] = [list(_blocks(configs[model] or {}))[place][key][number] for model, number in layers]
            except (LookupError, TypeError):
                notes.append(f"config.json: {key} has an entry for every layer, and not every model has it; look at it")
    if not found:
        notes.append(f"config.json: no key holds the number of layers, {count}; set it to {len(layers)} yourself")
    return notes


def config_notes(donor: str, models: Mapping[str, Checkpoint], changed: Mapping[str, Any]) -> list[str]:
    """One line for every input whose config differs from the donor's in more than bookkeeping."""
    configs = {name: read_config(model) for name, model in models.items()}
    ours = configs[donor]
    if ours is None:
        return []
    notes = []
    for name, config in configs.items():
        if config is None:
            continue
        keys = sorted(k for k in {*ours, *config} - _MAY_DIFFER - changed.keys() if ours.get(k) != config.get(k))
        if keys:
            notes.append(f"config.json of '{name}' differs from '{donor}' in {', '.join(keys)}; it is not used")
    return notes
