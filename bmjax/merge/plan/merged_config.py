"""Which keys of its donor's config.json a merge changes, and where the inputs' configs disagree."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.merge.plan.layout import TIED, Layout, config_blocks, read_config
from bmjax.merge.plan.tensor_names import is_head
from bmjax.merge.plan.vocabulary import Vocabulary
from bmjax.model.config import read_hf_config

Config = dict[str, Any]
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size", TIED,
}  # fmt: skip


def config_changes(layout: Layout, has_head: bool, vocabulary: Vocabulary | None) -> tuple[Config, list[str]]:
    """Return the keys of the donor's config.json that change, with their values, and notes.

    has_head: whether the result has a head of its own.
    """
    donor, result = layout.recipe.donor, layout.recipe.steps[-1].name
    configs = {name: read_config(model) for name, model in layout.models.items()}
    old = configs[donor]
    if old is None:
        return {}, [f"model '{donor}' has no config.json, so the result has none either"]
    new, notes = copy.deepcopy(old), list[str]()
    # The head, and the tokens.
    tied = any(block.get(TIED) is True for block in config_blocks(old))
    donor_has_head = any(map(is_head, layout.names[donor]))
    if has_head and (tied or not donor_has_head):
        _put(new, TIED, False)
    elif donor_has_head and not has_head:
        _put(new, TIED, True)
    if vocabulary is not None:
        _put(new, "vocab_size", vocabulary.size)
        if vocabulary.source != layout.models[donor].directory and (vocabulary.source / "config.json").exists():
            tokenizer_config = read_hf_config(vocabulary.source)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if key in tokenizer_config:
                    _put(new, key, tokenizer_config[key])
    # The layers: which input's layer each of the result's is configured as, where that is known.
    stacks, donor_layers = layout.layers[result], max(layout.layers[donor].values(), default=0)
    count = max(stacks.values()) if len(stacks) == 1 else 0
    layers = [layout.origin_of_layer(result, number) for number in range(count)]
    if layers and layers != [(donor, number) for number in range(donor_layers)]:
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
    holders = [block for block in config_blocks(config) if key in block] or [config]
    for block in holders:
        block[key] = value


def _set_layers(
    config: Config, count: int, layers: Sequence[tuple[str, int]], configs: Mapping[str, Config | None]
) -> list[str]:
    """Make `config`, of `count` layers, that of `layers`; returns notes."""
    notes, has_count = [], False
    for i, block in enumerate(config_blocks(config)):
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
                block[key] = [list(config_blocks(configs[model] or {}))[i][key][number] for model, number in layers]
            except (LookupError, TypeError):
                notes.append(f"config.json: {key} has an entry for every layer, and not every model has it; look at it")
    if not has_count:
        notes.append(f"config.json: no key holds the number of layers, {count}; set it to {len(layers)} yourself")
    return notes
