"""Which keys of its donor's config.json a merge changes, and where the inputs' configs disagree."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.config import UserError
from bmjax.merge.plan.config_classes import completed, is_known
from bmjax.merge.plan.config_token_ids import follow_tokens
from bmjax.merge.plan.heads import (
    ALWAYS_TIED_FAMILIES,
    NESTED,
    TIED,
    TIED_FAMILIES,
    UNTIED_FAMILIES,
    config_blocks,
    says_tied,
)
from bmjax.merge.plan.labels import has_same_labels, source_of_class
from bmjax.merge.plan.layer_kinds import KIND_LISTS, is_numbers_of_layers, repeated, set_kinds
from bmjax.merge.plan.layer_numbers import is_by_number, is_of_sources, moved_entries, moved_sources, set_numbers
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.per_layer_tensors import PER_LAYER_ROWS, per_layer_rows
from bmjax.merge.plan.quantized import QUANTIZATION_KEYS
from bmjax.merge.plan.quantized_names import follow_files, follow_names
from bmjax.merge.plan.stacks import LAYER_COUNTS, MTP_COUNTS, RARE_COUNTS, said_layers
from bmjax.merge.plan.tensor_names import TOWERS, layer
from bmjax.merge.plan.vocabulary import Vocabulary

Config = dict[str, Any]
_TYPES = ("dtype", "torch_dtype")
# Lists with an entry for every layer. Of some families other values of these keys are numbers.
_OF_LAYERS = re.compile(
    "layer|attn_idxs|attn_type_list|block_configs|block_types|_heads$|ffn_multipliers|intermediate_size$|_pattern$"
)
# Keys of other things than layers, whose lists may be as long by chance.
_OF_NO_LAYERS = re.compile(r"token|_ids?$|architectures|language|section|label|expert")
_COUNTING = ("layers_block_type", "hybrid_override_pattern", "layer_types", "block_configs")
_FROM_ONE = ("ple_layer_ids",)  # lists of layers that are numbered from 1 on, whatever their last number is
_OF_OTHERS = re.compile(rf"{TOWERS}|^mtp_")  # parts of a config that speak of no layer of the language model's stack
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
# What a config says of the class and of the labels of its head.
_OF_CLASS = ("architectures", "auto_map", "num_labels", "id2label", "label2id", "problem_type")
_MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size", TIED,
}  # fmt: skip


def config_changes(
    layout: Layout, has_head: bool, vocabulary: Vocabulary | None, *, is_quantized: bool = True
) -> tuple[Config, list[str]]:
    """Return the keys of the donor's config.json that change, with their values, and notes.

    has_head: whether the result has a head of its own. is_quantized: whether it keeps what is said of quantization.
    """
    donor, result = layout.recipe.donor, layout.recipe.steps[-1].name
    configs = layout.configs
    old = configs[donor]
    if old is None:
        if having := next((name for name, config in configs.items() if config is not None), None):
            raise UserError(
                f"model '{donor}' gives the result its config and tokenizer, and has no config.json; copy that of "
                f"'{having}' into {layout.models[donor].directory}, or make '{having}' the base_model"
            )
        return {}, [f"model '{donor}' has no config.json, so the result has none either"]
    new, notes = copy.deepcopy(old), list[str]()
    # The head, and the tokens.
    donor_has_head, said = any(map(layout.is_head_weight, layout.names[donor])), says_tied(old)
    is_silent = said is None and old.get("model_type") not in UNTIED_FAMILIES  # its class may tie what it finds
    if has_head and (said or is_silent or not donor_has_head):
        # T5 scales its logits unless a config says that it is not tied, or says it of the scale itself.
        for block in config_blocks(new):
            if block.get("model_type") in ALWAYS_TIED_FAMILIES and block.get(TIED) is not False:
                block.setdefault("scale_decoder_outputs", True)
        _put(new, TIED, False)
    elif donor_has_head and not has_head and layout.is_tied_result():
        _put(new, TIED, True)
    notes += _set_class(new, layout)
    if vocabulary is None:
        notes += _set_rows(new, layout)
    else:
        for block in config_blocks(new):  # Marian's
            if "decoder_vocab_size" in block and block["decoder_vocab_size"] == block.get("vocab_size"):
                block["decoder_vocab_size"] = vocabulary.size
        _put(new, "vocab_size", vocabulary.size)
        if (rows := per_layer_rows(layout, vocabulary)) is not None:
            _put(new, PER_LAYER_ROWS, rows)
        followed, lines = follow_tokens(new, vocabulary.ids[donor], vocabulary.tokens, stated=vocabulary.stated)
        new |= followed
        notes += lines
        for key, value in vocabulary.stated.items():
            _put(new, key, value)
    if layout.further[donor] and not layout.further[result]:
        for block in config_blocks(new):
            block |= {key: 0 for key in MTP_COUNTS if block.get(key)}
        notes.append(f"what predicts further tokens (MTP) in '{donor}' is left out: the last layers' model has none")
    last = layout.last_input(result)
    if layout.further[result] and not layout.further[donor]:
        for block, theirs in zip(config_blocks(new), config_blocks(configs.get(last) or old), strict=False):
            block |= {key: theirs[key] for key in MTP_COUNTS if theirs.get(key)}
        notes.append(
            f"what predicts further tokens (MTP) is that of '{last}', whose config says how many layers it has"
        )
    # The layers: which input's layer each of the result's is configured as, where that is known.
    donor_stack = layout.stack(donor)
    layers, donor_layers = layout.stacked_layers()
    if layers:
        further = {t.number for name in layout.further[donor] if (t := layer(name)) and t.stack == donor_stack}
        counts = [block[key] for block in config_blocks(old) for key in MTP_COUNTS if type(block.get(key)) is int]
        behind = len(further) or (max(counts, default=0) if layout.further[donor] else 0)
        tail = None
        if layout.further[result]:
            last_stack = layout.stack(last)
            tail = configs.get(last) or old, layout.layers[last][last_stack] if last_stack else 0
        notes += _set_layers(new, donor_layers, behind, layers, configs, old, tail)
        notes += set_kinds(new, layers, configs, old)
        for block in config_blocks(new) if is_quantized else ():
            for key in QUANTIZATION_KEYS:
                if isinstance(block.get(key), dict):
                    block[key], lines = follow_names(block[key], layers, donor_layers, f"config.json: {key}")
                    notes += lines
    changes = {key: value for key, value in new.items() if key not in old or old[key] != value}
    # Where the inputs differ in more than bookkeeping.
    for name, config in configs.items():
        config = old if config is None else config
        ours, theirs = _with_one_rope(old), _with_one_rope(config)
        if vocabulary is not None and vocabulary.ids[name] != vocabulary.ids[donor]:  # ids are compared as tokens
            ours, theirs = (
                follow_tokens(part, vocabulary.ids[model], vocabulary.tokens)[0]
                for model, part in ((donor, ours), (name, theirs))
            )
        candidates = {*ours, *theirs} - _MAY_DIFFER - changes.keys()
        if has_same_labels(old, config):  # what their order means is told where heads are merged
            candidates -= {"id2label", "label2id"}
        keys = sorted(key for key in candidates if ours.get(key) != theirs.get(key))
        if "rope_parameters" in keys:  # by the names that the configs have
            keys = sorted({*keys, *(key for key in _ROPE if key in old or key in config)} - {"rope_parameters"}
                          | {"rope_parameters"} & {*old, *config})  # fmt: skip
        if keys:
            notes.append(f"config.json of '{name}' differs from '{donor}' in {', '.join(keys)}; it is not used")
    return changes, notes


def settings_changes(layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Return the new content of the donor's files of quantization settings beside config.json, by name, and notes."""
    layers, count = layout.stacked_layers()
    return follow_files(layout.models[layout.recipe.donor].directory, layers, count) if layers else ({}, [])


def _set_class(new: Config, layout: Layout) -> list[str]:
    """Take the class and its labels from the model of the last layers where slices end in a head of another kind."""
    donor, last = layout.recipe.donor, source_of_class(layout)
    theirs = layout.configs[last]
    if last == donor or theirs is None:
        return []
    changed = [key for key in _OF_CLASS if key in theirs and new.get(key) != theirs[key]]
    new |= {key: copy.deepcopy(theirs[key]) for key in changed}
    if not changed:
        return []
    return [
        f"config.json: the result ends as '{last}' does, a model of another kind than '{donor}', so "
        f"{', '.join(changed)} is that model's"
    ]


def _set_rows(new: Config, layout: Layout) -> list[str]:
    """Set vocab_size where an adapter gave the donor's embedding other rows; return a note where it never fitted."""
    donor = layout.recipe.donor
    info = layout.tensor(donor, layout.embedding(donor) or "")
    said = [block["vocab_size"] for block in config_blocks(new) if type(block.get("vocab_size")) is int]
    if info is None or not info.shape or not said or info.shape[0] in said:
        return []
    if info.file.parent == layout.models[donor].directory:
        # Some classes have rows behind for other things than tokens.
        rows = {layout.row_count(donor, name) for name in layout.names[donor] if layout.is_head_weight(name)}
        if new.get("model_type") not in UNTIED_FAMILIES | TIED_FAMILIES and rows != {info.shape[0]}:
            return []
        return [
            f"config.json of '{donor}' says vocab_size {said[0]}, its embedding has {info.shape[0]} rows: loaders may "
            "refuse the result, as they do that model"
        ]
    _put(new, "vocab_size", info.shape[0])
    return []


def _with_one_rope(config: Config) -> Config:
    """Return a config whose blocks have `rope_parameters` alone, in place of transformers 4's keys for it."""
    new = {key: _with_one_rope(value) if key.endswith("_config") and isinstance(value, dict) else value
           for key, value in config.items() if key not in _ROPE}  # fmt: skip
    held = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(held, dict) or not any(key in config for key in _ROPE):
        return {**new, **{key: config[key] for key in _ROPE if key in config}}
    kind = held.get("rope_type") or held.get("type") or "default"
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    rest = {key: value for key, value in held.items() if key not in ("type", "rope_type")}
    return {**new, "rope_parameters": {**theta, **rest, "rope_type": kind}}


def set_type(config: Config, name: str) -> None:
    """Make `name` the type of the weights wherever a config speaks of it, in both spellings: loaders read either."""
    blocks = [config, *(block for block in config.values() if isinstance(block, dict))]
    holders = [(block, key) for block in blocks for key in _TYPES if isinstance(block.get(key), str)]
    if not any(block is config for block, _ in holders):
        holders.append((config, "dtype"))
    for block, key in holders:
        block[key] = name


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    blocks = list(config_blocks(config))
    holders = [block for block in blocks if key in block] or [blocks[-1] if key == PER_LAYER_ROWS else config]
    for block in holders:
        block[key] = value


def _set_layers(
    config: Config,
    count: int,
    further: int,
    layers: Sequence[tuple[str, int]],
    configs: Mapping[str, Config | None],
    donor: Config,
    tail: tuple[Config, int] | None,
) -> list[str]:
    """Make `config`, of `count` layers, that of `layers`; returns notes.

    further: how many layers behind them predict further tokens (MTP), of which lists may speak, too.
    tail: the config of the model whose MTP layers stand in the result, and its number of layers; None for no such.
    """
    notes, has_count, said = [], False, said_layers(config)
    counts = {count} if count in said or len(said) > 1 else {count, *said}  # a config may be wrong about its layers
    for i, block in enumerate(config_blocks(config)):
        for key in (*LAYER_COUNTS, *RARE_COUNTS):
            if block.get(key) in counts:
                block[key], has_count = len(layers), True
        per_model = {model: list(config_blocks(configs[model] or donor)) for model, _ in layers}
        theirs = {model: blocks[i] if i < len(blocks) else {} for model, blocks in per_model.items()}
        for model, part in theirs.items():
            theirs[model] = _without_further(part, count, further)
        block |= {k: value[:count] for k, value in block.items() if _is_with_further(value, count, further)}
        tails = _tails(block, list(config_blocks(tail[0]))[i:][:1], tail[1], count) if tail else {}
        notes += _set_entries(block, theirs, count, layers)
        block |= {key: [*block[key], *tail] for key, tail in tails.items()}
    if not has_count and not _gives_count(config, len(layers)):
        notes.append(f"config.json: no key holds the number of layers, {count}; set it to {len(layers)} yourself")
    return notes


def _gives_count(config: Config, count: int) -> bool:
    """Return whether a config without a count of its layers gives their number by a list with an entry for each."""
    if is_known(config):
        return completed(config).layers == count
    lists = (block.get(key) for block in config_blocks(config) for key in _COUNTING)
    return any(isinstance(entries, (list, str)) and len(entries) == count for entries in lists)


def _tails(block: Config, theirs: Sequence[Config], their_count: int, count: int) -> dict[str, list[Any]]:
    """Return the entries of MTP layers by the key of each list of `count` layers in a part of a config.

    theirs: the same part of the config that has them, of `their_count` layers, where it has one.
    """
    lists = {key: part[key] for part in theirs for key in block if isinstance(part.get(key), list)}
    return {
        key: value[their_count:] for key, value in lists.items()
        if isinstance(block[key], list) and len(block[key]) == count and len(value) > their_count
    }  # fmt: skip


def _is_with_further(value: Any, count: int, further: int) -> bool:
    return further > 0 and isinstance(value, list) and len(value) == count + further


def _without_further(part: Config, count: int, further: int) -> Config:
    """Return a part of a config whose lists end before the layers that predict further tokens."""
    return {key: v[:count] if _is_with_further(v, count, further) else v for key, v in part.items()}


def _set_entries(
    values: Config, theirs: Mapping[str, Any], count: int, layers: Sequence[tuple[str, int]], path: str = ""
) -> list[str]:
    """Make what a part of a config says of each of `count` layers follow `layers`; returns notes.

    theirs: the same part of every input's config. path: of the part in the config, with a point behind it.
    """
    notes = set_numbers(values, theirs, count, layers, path)
    first = _first_number(values, count)
    for key, value in values.items():
        if key in (*NESTED, *QUANTIZATION_KEYS, "rope_parameters", "rope_scaling") or _OF_OTHERS.search(key):
            continue
        entries: dict[str, Any] = {
            model: part.get(key) if isinstance(part, dict) else None for model, part in theirs.items()
        }
        if is_by_number(value) and not _OF_NO_LAYERS.search(key):
            values[key], lines = moved_entries(f"{path}{key}", value, entries, count, layers)
            notes += lines
            continue
        if isinstance(value, dict):
            notes += _set_entries(value, entries, count, layers, f"{path}{key}.")
            continue
        is_text = isinstance(value, str) and key.endswith("_pattern")  # a letter for each layer
        is_known = _OF_LAYERS.search(key) is not None
        if not value or not (is_text or isinstance(value, list)):
            continue
        pattern, value = value, repeated(key, value, count)
        entries = {model: repeated(key, entry, count) for model, entry in entries.items()}
        if not is_known and (len(value) != count or _OF_NO_LAYERS.search(key)):
            continue
        shift = first if len(value) < count else 0  # a list as long as the layers has their kinds, or all from 0 on
        shift = 1 if key in _FROM_ONE else shift
        is_set = not is_text and key not in KIND_LISTS and not is_of_sources(key, value, count)
        if is_set and is_numbers_of_layers(value, count, shift):
            values[key] = [n + shift for n, (m, number) in enumerate(layers) if number + shift in (entries[m] or ())]
        elif len(value) != count:
            if not (is_text or path):
                notes.append(f"config.json: {path}{key} is no list of {count} layers; it was not changed, look at it")
        elif not all(type(entries[m]) is type(value) and number < len(entries[m]) for m, number in layers):
            notes.append(
                f"config.json: {path}{key} has an entry for every layer, and not every model has it; look at it"
            )
        else:
            moved = [entries[model][number] for model, number in layers]
            if not is_text and is_of_sources(key, value, count):
                moved, lines = moved_sources(f"{path}{key}", entries, layers)
                notes += lines
            if moved != repeated(key, pattern, len(layers)):
                values[key] = "".join(moved) if is_text else moved
            if not is_known:
                notes.append(
                    f"config.json: {path}{key} has as many entries as there were layers, so they follow their layers; "
                    "look at it"
                )
    return notes


def _first_number(values: Config, count: int) -> int:
    """Return the number of a config's first layer: 1 where a list of some layers by number goes up to `count`."""
    lists = [
        value for key, value in values.items()
        if isinstance(value, list) and 0 < len(value) < count and _OF_LAYERS.search(key) and not re.search(TOWERS, key)
        and all(type(number) is int for number in value) and value == sorted(set(value))
    ]  # fmt: skip
    return int(any(value[-1] == count for value in lists) and all(value[0] >= 1 for value in lists))
