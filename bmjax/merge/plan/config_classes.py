"""What transformers' own class makes of a config: its values where the config is silent, or why it refuses it.

Nothing of a model is run. Loading transformers takes seconds, so callers ask only what no table of theirs says.
"""

import copy
from typing import Any, NamedTuple

from bmjax.merge.plan.heads import config_blocks
from bmjax.merge.plan.stacks import counts_of

Config = dict[str, Any]
# How transformers 5 writes numbers that JSON does not have.
_FLOAT_TAG, _FLOATS = "__float__", {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


class Completed(NamedTuple):
    """A config as its class completes it."""

    blocks: list[Config]  # as `config_blocks` yields them; [] where the class is not known or refuses the config
    layers: int | None  # how many the class gives the language model
    refusal: str  # the class's words; "" where it takes the config or is not known


def completed(config: Config) -> Completed:
    """Return what the class of a config makes of it."""
    if not is_known(config):
        return Completed([], None, "")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(_decoded(config))
        blocks = list(config_blocks(made.to_dict()))
        layers = getattr(made.get_text_config(), "num_hidden_layers", None)
    except Exception as error:  # whatever a class raises at values that it does not take
        return Completed([], None, " ".join(str(error).split())[:200] or type(error).__name__)
    return Completed(blocks, layers if type(layers) is int else None, "")


def is_known(config: Config) -> bool:
    """Return whether transformers, which a merge does without where it is not installed, has a class for a config."""
    if not isinstance(config.get("model_type"), str):
        return False
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return False
    return config["model_type"] in CONFIG_MAPPING


def is_free_count(config: Config, count: int) -> bool:
    """Return whether a config's number of layers is what its class builds, so that another number is taken.

    EfficientNet's class computes it from a list of numbers, num_block_repeats, whatever the config says. count: another
    number. True where the class is not known.
    """
    lists = (value for value in config.values() if isinstance(value, list) and value)
    if not any(all(type(number) is int for number in value) for value in lists):  # its class need not be asked
        return True
    changed = copy.deepcopy(config)
    for block in config_blocks(changed):
        block |= dict.fromkeys(counts_of(block), count)
    taken = completed(changed)
    return bool(taken.refusal) or taken.layers in (None, count)


def _decoded(value: Any) -> Any:
    """Return a copy of a config's value with the numbers that JSON does not have."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_TAG} and str(value[_FLOAT_TAG]) in _FLOATS:
            return _FLOATS[str(value[_FLOAT_TAG])]
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
