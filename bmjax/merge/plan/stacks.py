"""Which of a model's stacks of layers is the language model's, the one that slices and layer counts speak of.

Layers behind it that predict further tokens (MTP: DeepSeek-V3, GLM-4.5, Qwen3-Next) are told apart: a config does not
count them among its layers, and trainers that do not know them leave them out.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bmjax.merge.plan.heads import config_blocks
from bmjax.merge.plan.tensor_names import TOWERS, layer

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
# Counts of some families (OpenELM, xLSTM) whose names mean something else in others: read where no other count stands.
RARE_COUNTS = ("num_transformer_layers", "num_blocks")
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_MTP_PARTS = re.compile(r"(eh_proj|enorm|hnorm|shared_head)\b")


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers each stack has, by the names of tensors."""
    stacks: dict[str, int] = {}
    for tensor in filter(None, map(layer, names)):
        stacks[tensor.stack] = max(stacks.get(tensor.stack, 0), tensor.number + 1)
    return stacks


def missing_layers(names: Iterable[str], stack: str) -> list[int]:
    """Return the numbers below a stack's last layer of which there is no tensor."""
    numbers = {tensor.number for tensor in filter(None, map(layer, names)) if tensor.stack == stack}
    return [number for number in range(max(numbers, default=0)) if number not in numbers]


def counts_of(block: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of layers that a part of a config speaks of, by their keys."""
    known = ({key: block[key] for key in keys if type(block.get(key)) is int} for keys in (LAYER_COUNTS, RARE_COUNTS))
    return next(filter(None, known), {})


def said_layers(config: dict[str, Any]) -> set[int]:
    """Return the numbers of layers that a config speaks of; those of a language model inside another model alone."""
    whole, *inner = config_blocks(config)
    counts = [set(counts_of(block).values()) for block in (*inner, whole)]
    return set().union(*counts[:-1]) or counts[-1]


def further_token_tensors(names: Iterable[str], config: dict[str, Any]) -> dict[str, None]:
    """Return the names of what predicts further tokens: modules called mtp, and layers beyond those of the config.

    names: of a model's tensors. config: the content of its config.json.
    """
    names = dict.fromkeys(names)
    chosen = {name: None for name in names if _MTP.search(name)}
    stacks = layer_counts(name for name in names if name not in chosen and not re.search(TOWERS, name))
    for block in config_blocks(config):
        further = max((block[key] for key in MTP_COUNTS if type(block.get(key)) is int), default=0)
        count = next(iter(counts_of(block).values()), 0)
        for stack, stored in stacks.items():
            behind = {n: None for n in names if (t := layer(n)) and t.stack == stack and t.number >= count}
            if 0 < count < stored and (stored - count <= further or any(map(_MTP_PARTS.search, behind))):
                chosen |= behind
    return chosen


def language_stack(stacks: Mapping[str, int], config: dict[str, Any]) -> str | None:
    """Return the name of the language model's stack; None where neither names nor the config tell it.

    stacks: how many layers each has. config: the content of config.json, whose text part counts the stack's layers.
    """
    if len(stacks) == 1:
        return next(iter(stacks))
    candidates = [stack for stack in stacks if not re.search(TOWERS, stack)]
    if len(candidates) > 1:
        # Where the language model's config stands inside, that of the whole may count other layers.
        whole, *inner = config_blocks(config)
        counts = [count for block in inner or [whole] for count in counts_of(block).values()]
        candidates = [stack for stack in candidates if stacks[stack] in counts]
    return candidates[0] if len(candidates) == 1 else None
