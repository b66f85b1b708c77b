"""Kinds of layers that a config gives by position: sliding or full attention, linear attention, layers without RoPE.

A model class computes them from a layer's number where the config is silent (every sixth layer is full, say). Layers
that are stacked in another order keep the kind that they were trained as, so the kinds have to be written.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.merge.plan.config_classes import Completed, completed, is_known
from bmjax.merge.plan.heads import config_blocks

Config = dict[str, Any]
KIND_LISTS = ("layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types")
_REPEATED = ("block_types",)  # lists that may hold the kinds of the first layers alone, which begin again behind them
# Classes without kinds of layers, which need not be asked; loading transformers takes seconds.
UNIFORM_FAMILIES = frozenset({"llama", "mistral", "mixtral", "gpt2", "gpt_neox", "gemma", "phi3"})
_PERIOD = re.compile(r".*(_period|_freq|_sparse_step|_layer_step|moe_layer_interval)|n_layers_per_\w+")
_BY_POSITION = re.compile(r".*(_pattern|_interval|_period|_freq|_step|_layers_interval)|max_window_layers")
# How many of the first layers are dense where the others have experts; how many of the last share another's keys.
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers")
_LAST_SHARED = "num_kv_shared_layers"


def is_numbers_of_layers(value: list[Any], count: int, first: int = 0) -> bool:
    """Return whether a list of a config names layers by number, from `first` on: whole numbers that rise."""
    is_whole = all(type(number) is int for number in value)
    return is_whole and value == sorted(set(value)) and value[0] >= first and value[-1] < count + first


def repeated(key: str, value: Any, count: int) -> Any:
    """Return a list with an entry for each of `count` layers where it holds a pattern of kinds; else the value."""
    if key not in _REPEATED or not isinstance(value, list) or not 0 < len(value) < count:
        return value
    return [value[number % len(value)] for number in range(count)]


def set_kinds(
    new: Config, layers: Sequence[tuple[str, int]], configs: Mapping[str, Config | None], donor: Config
) -> list[str]:
    """Write into `new` the kinds of its layers where position alone would give others; returns notes.

    Arguments:
        new: the result's config, with its number of layers.
        layers: (input, its layer) that each layer of the result comes from.
        configs: of the inputs.
        donor: the config that `new` was made of.
    """
    notes = []
    new_kinds = _computed(new).blocks
    sources = {model: _computed(configs[model] or donor) for model in dict.fromkeys(model for model, _ in layers)}
    unknown = next((source for source in sources.values() if not source.blocks), None)
    for i, block in enumerate(config_blocks(new)):
        for key in (*KIND_LISTS, *_REPEATED):
            if key in block and block[key] is not None:
                continue
            kinds = _kinds(sources, i, key, layers)
            made = new_kinds[i].get(key) if i < len(new_kinds) else None
            if kinds and kinds != repeated(key, made, len(layers)):
                block[key] = kinds
        notes += _positions(block, i, layers, configs, donor)
        if unknown and not _is_uniform(block) and not any(key in block for key in KIND_LISTS):
            notes += _unknown_kinds(block, new, unknown.refusal)
    return list(dict.fromkeys(notes)) + ([] if unknown else _taken_otherwise(new, sources, layers))


def _kinds(sources: Mapping[str, Completed], i: int, key: str, layers: Sequence[tuple[str, int]]) -> list[Any] | None:
    """Return the kinds that the i-th block of the sources' configs gives to `layers`; None where one says none."""
    try:
        kinds = {model: repeated(key, source.blocks[i][key], source.layers or 0) for model, source in sources.items()}
        return [kinds[model][number] for model, number in layers]
    except (LookupError, TypeError):
        return None


def _unknown_kinds(block: Config, config: Config, refusal: str) -> list[str]:
    """Return a note where neither a config nor its class says of what kind its layers are."""
    if refusal:
        return [
            f"config.json: the class of {config['model_type']!r} refuses this config ({refusal}), so the kinds of its "
            "layers are not known: the layers have moved, look at it"
        ]
    keys = [key for key in block if _BY_POSITION.fullmatch(key) and not _PERIOD.fullmatch(key)]
    keys = [key for key in keys if type(block[key]) is int and block[key] > 1]
    if not keys or is_known(config):
        return []
    return [
        f"config.json: {', '.join(keys)} may give layers their kind by position, and the class of "
        f"{block.get('model_type')!r} is not known here: the layers have moved, look at it"
    ]


def _taken_otherwise(new: Config, sources: Mapping[str, Completed], layers: Sequence[tuple[str, int]]) -> list[str]:
    """Return a note where the class, which takes the models' configs, refuses the result's or gives it other kinds."""
    result, family = _computed(new), new.get("model_type")
    if result.refusal:
        return [
            f"config.json: the class of {family!r} takes the models' configs and refuses the result's "
            f"({result.refusal}): it cannot be loaded as it is; stack other layers"
        ]
    notes = []
    for i, block in enumerate(result.blocks):
        for key in KIND_LISTS:
            kinds, made = _kinds(sources, i, key, layers), block.get(key)
            if kinds and isinstance(made, list) and kinds != made:
                others = [n for n, kind in enumerate(kinds) if n >= len(made) or made[n] != kind]
                notes.append(
                    f"config.json: the class of {family!r} gives layer {', '.join(map(str, others[:5]))} another kind "
                    f"in {key} than the models have, whatever is written there; stack other layers"
                )
    return notes


def _is_uniform(block: Config) -> bool:
    """Return whether a config's class gives all its layers one kind, known without its class."""
    family = str(block.get("model_type"))
    windowed = family.startswith(("qwen2", "qwen3")) and not {"next", "5"} & set(re.split(r"[_.]", family[4:]))
    return family in UNIFORM_FAMILIES or (windowed and not block.get("use_sliding_window"))


def _computed(config: Config) -> Completed:
    """Return a config as its class completes it; nothing where its class need not be asked."""
    is_uniform = all(_is_uniform(block) for block in config_blocks(config))
    return Completed([], None, "") if is_uniform else completed(config)


def _positions(
    block: Config, i: int, layers: Sequence[tuple[str, int]], configs: Mapping[str, Config | None], donor: Config
) -> list[str]:
    """Set or note the whole numbers of a config that say by position which layers are of another kind."""
    notes = []
    for key in _FIRST_DENSE:
        if type(block.get(key)) is not int:
            continue
        # The first layers are dense, the others have experts.
        dense = [number < (entry_of(configs[model] or donor, i, key) or 0) for model, number in layers]
        if dense == sorted(dense, reverse=True):
            block[key] = sum(dense)
        else:
            notes.append(
                f"config.json: {key} cannot say that layers {[n for n, d in enumerate(dense) if d]} are dense "
                "and those between them not; the result cannot be loaded as it is"
            )
    if type(block.get(_LAST_SHARED)) is int and block[_LAST_SHARED] > 0:
        notes.append(
            f"config.json: {_LAST_SHARED} {block[_LAST_SHARED]} says by position which layers take another layer's "
            "keys and values, and the layers have moved; look at it"
        )
    for key, period in block.items():
        if _PERIOD.fullmatch(key) and type(period) is int and period > 1:
            moved = [f"{number} is now {n}" for n, (_, number) in enumerate(layers) if (n - number) % period]
            if moved:
                notes.append(
                    f"config.json: {key} {period} gives layers their kind by position, and they have moved (layer "
                    f"{moved[0]}); stack multiples of {period} layers"
                )
    return notes


def entry_of(config: Config, i: int, key: str) -> Any:
    """Return the value of a key in the i-th block of a config; None where it has no such block or key."""
    blocks = list(config_blocks(config))
    return blocks[i].get(key) if i < len(blocks) else None
