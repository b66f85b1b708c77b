"""Takes the names of training wrappers out of tensors' names, which no class of a model knows: its weights would load
at random.

`plan` calls it first, so that all that follows sees a class's own names. Prefixes that classes do have are matched in
prefixes.py.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bmjax.io.safetensors import Checkpoint
from bmjax.merge.plan.heads import TIED_FAMILIES, UNTIED_FAMILIES
from bmjax.merge.plan.tensor_names import is_head, is_task_head, layer

# Of torch.compile, FSDP, activation checkpointing and DeepSpeed's engines, around any module.
_INNER = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module)\."
)
# Of data parallelism, PEFT and TRL, around the whole model.
_OUTER = re.compile(r"module\.|base_model\.model\.|pretrained_model\.")
# What a language model's names begin with in the classes of transformers, but for its heads.
_TOP = re.compile(r"(model|transformer)\.")
# Prefixes that some classes have: whether they are a wrapper's is not told by another model without them.
_OF_CLASSES = ("model", "transformer", "language_model", "text_model", "backbone")


def unwrapped(
    models: Mapping[str, Checkpoint], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with names of tensors that their classes know, and a note for each that had others.

    configs: the models' config.json. A wrapper's name that is not known is told by the config's class, or by a model
    whose names lack it.
    """
    plain, notes = dict(models), list[str]()
    for model, checkpoint in models.items():
        names, parts = _without_known(checkpoint.tensors)
        if parts:
            plain[model] = _renamed(checkpoint, names)
            shown = " and ".join(f"'{part}'" for part in parts)
            notes.append(f"model '{model}' has names of training wrappers, {shown}, in those of its tensors: left out")
    for model, checkpoint in list(plain.items()):
        others = [other.tensors.keys() for name, other in plain.items() if name != model]
        config = configs[model]
        is_known = config.get("model_type") in UNTIED_FAMILIES | TIED_FAMILIES and "text_config" not in config
        prefix = _unknown_prefix(checkpoint.tensors, others, is_known)
        if prefix:
            plain[model] = _renamed(checkpoint, {name: name.removeprefix(prefix) for name in checkpoint.tensors})
            notes.append(f"model '{model}': all names of its tensors begin with '{prefix}', a wrapper's: left out")
    return plain, notes


def common_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that all names have, each of whole modules, the shortest first: `a.`, `a.b.`."""
    names = list(names)
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))  # between which all others stand
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    segments = [f"{segment}." for segment, _ in pairs]
    return ["".join(segments[:count]) for count in range(1, len(segments) + 1)]


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    return replace(checkpoint, tensors={names[name]: info for name, info in checkpoint.tensors.items()})


def _without_known(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return names without those of known wrappers, by the stored ones, and what was left out, most frequent first.

    Nothing is left out where two tensors would get one name.
    """
    plain, parts = dict[str, str](), Counter[str]()
    for name in names:
        if "_orig_mod." not in name and "module." not in name and "_model." not in name:  # quick, for 100,000 names
            plain[name] = name
            continue
        inner = _INNER.findall(name)
        rest = _INNER.sub("", name)
        while match := _OUTER.match(rest):
            inner.append(match[0])
            rest = rest[match.end() :]
        plain[name] = rest
        parts.update(dict.fromkeys(inner, 1))
    if len({*plain.values()}) < len(plain) or "" in plain.values():
        return {}, []
    return plain, [part for part, _ in parts.most_common()]


def _unknown_prefix(names: Iterable[str], others: Iterable[Iterable[str]], is_known: bool) -> str:
    """Return the wrapper's prefix that all names of a language model have; "" where they have none.

    Without it they must begin as those of a class do. is_known: whether the class is known to have no such prefix.
    Where it is not, one of the `others`, the other models' names, must have the layers' tensors without it.
    """
    names = list(names)
    for prefix in common_prefixes(names):
        rests = [name.removeprefix(prefix) for name in names]
        if not all(_TOP.match(rest) or is_head(rest) or is_task_head(rest) for rest in rests):
            continue
        in_layers = {rest for rest in rests if layer(rest) is not None and _TOP.match(rest)}
        if not in_layers:
            continue
        is_told = any(2 * len(in_layers.intersection(other)) > len(in_layers) for other in others)
        if is_known or (is_told and prefix.split(".")[0] not in _OF_CLASSES):
            return prefix
    return ""
