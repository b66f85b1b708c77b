"""Which keys of its donor's config.json a merge changes, and where the inputs' configs disagree."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bmjax.io.safetensors import Checkpoint
from bmjax.merge.plan.vocabulary import Vocabulary
from bmjax.model.config import read_hf_config

_TIED = "tie_word_embeddings"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_NESTED = ("text_config", "llm_config", "language_config")
_MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size", _TIED,
}  # fmt: skip


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the config.json beside the weights, or None."""
    # A link that leads nowhere is a mistake, not a model without a config.
    return read_hf_config(checkpoint.directory) if os.path.lexists(checkpoint.directory / "config.json") else None


def says_untied(checkpoint: Checkpoint) -> bool:
    """Return whether the config says that the head is not the embedding."""
    return any(block.get(_TIED) is False for block in _blocks(read_config(checkpoint) or {}))


def _blocks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config, and those of a language model inside another model's config."""
    yield config
    yield from (config[key] for key in _NESTED if isinstance(config.get(key), dict))


def config_changes(
    donor: str,
    models: Mapping[str, Checkpoint],
    *,
    heads: tuple[bool, bool],
    layers: Sequence[tuple[str, int]],
    donor_layers: int,
    vocabulary: Vocabulary | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of the donor's config.json that change, with their values, and notes.

    heads: whether the donor, and the result, have a head of their own. layers: the input and its layer that each of the
    result's is configured as; empty where that is not known. donor_layers: how many layers the donor has.
    """
    configs = {name: read_config(model) for name, model in models.items()}
    old = configs[donor]
    if old is None:
        return {}, [f"model '{donor}' has no config.json, so the result has none either"]
    new, notes = copy.deepcopy(old), list[str]()
    tied = any(block.get(_TIED) is True for block in _blocks(old))
    donor_has_head, result_has_head = heads
    if result_has_head and (tied or not donor_has_head):
        _put(new, _TIED, False)
    elif donor_has_head and not result_has_head:
        _put(new, _TIED, True)
    if vocabulary is not None:
        _put(new, "vocab_size", vocabulary.size)
        if vocabulary.source != models[donor].directory and (vocabulary.source / "config.json").exists():
            tokenizer_config = read_hf_config(vocabulary.source)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if key in tokenizer_config:
                    _put(new, key, tokenizer_config[key])
    if list(layers) != [(donor, number) for number in range(donor_layers)] and layers:
        notes += _set_layers(new, donor_layers, layers, configs)
    changes = {key: value for key, value in new.items() if key not in old or old[key] != value}
    # Where the inputs differ in more than bookkeeping.
    for name, config in configs.items():
        config = old if config is None else config
        candidates = {*old, *config} - _MAY_DIFFER - changes.keys()
        if keys := sorted(key for key in candidates if old.get(key) != config.get(key)):
            notes.append(f"config.json of '{name}' differs from '{donor}' in {', '.join(keys)}; it is not used")
    return changes, notes


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
    """Make `config`, of `count` layers, that of `layers`; returns notes."""
    notes, has_count = [], False
    for i, block in enumerate(_blocks(config)):
        for key in _LAYERS:
            if block.get(key) == count:
                block[key], has_count = len(layers), True
        for key, value in block.items():
            if not isinstance(value, list) or "layer" not in key or not value:
                continue
            if len(value) != count:
                notes.append(f"config.json: {key} names layers by number; it was not changed, look at it")
                continue
            try:
                block[key] = [list(_blocks(configs[model] or {}))[i][key][number] for model, number in layers]
            except (LookupError, TypeError):
                notes.append(f"config.json: {key} has an entry for every layer, and not every model has it; look at it")
    if not has_count:
        notes.append(f"config.json: no key holds the number of layers, {count}; set it to {len(layers)} yourself")
    return notes
