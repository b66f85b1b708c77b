"""Which of a model's stacks of layers is the language model's: the one that slices and layer counts speak of."""

import re
from collections.abc import Mapping
from typing import Any

from bmjax.merge.plan.heads import config_blocks
from bmjax.merge.plan.tensor_names import TOWERS

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


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
        counts = [block[key] for block in inner or [whole] for key in LAYER_COUNTS if key in block]
        candidates = [stack for stack in candidates if stacks[stack] in counts]
    return candidates[0] if len(candidates) == 1 else None
