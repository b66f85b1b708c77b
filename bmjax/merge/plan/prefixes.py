"""Matches the names of tensors that differ only by a prefix or ending: versions of a library, classes.

transformers 4.52 made `model.layers.0` of a vision-language model `model.language_model.layers.0`; a class without a
head drops `transformer.` or `bert.`; BERT's own file has `LayerNorm.gamma`. `plan` calls it before anything compares
names, so all that follows sees the donor's. What training wrappers add is gone by then, see wrappers.py.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from bmjax.io.safetensors import Checkpoint
from bmjax.merge.plan.tensor_names import is_head, layer
from bmjax.merge.plan.wrappers import common_prefixes

# Modules that hold the whole model, or a language model in a larger one: what lies in them has other names of its own.
_WRAPPERS = (
    "model", "language_model", "text_model", "transformer", "backbone", "base_model", "module", "_orig_mod",
    "_fsdp_wrapped_module", "pretrained_model", "bert", "roberta", "distilbert", "electra", "deberta", "mpnet",
    "albert", "esm", "gpt_neox",
)  # fmt: skip
_PREFIX = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*")
# Older and newer names of the parts of a norm, and of a weight that is a direction times a length (`weight_norm`).
# Loaders read both.
_ENDINGS = (
    (re.compile(r"(norm\w*)\.gamma$", re.IGNORECASE), r"\1.weight"),
    (re.compile(r"(norm\w*)\.beta$", re.IGNORECASE), r"\1.bias"),
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
)
_ENDING = re.compile(r"(parametrizations\.weight\.original[01]|[^.]+)$")
_INNER_TOWER = re.compile(r"^(\w*(?:vision|visual|image|audio)\w*)\.(?:vision|audio)_model\.")


def match(models: Mapping[str, Checkpoint], donor: str) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with the donor's names for their tensors, and a note for each that has others."""
    reference, notes = models[donor].tensors, []
    matched: dict[str, Checkpoint] = {}
    for model, checkpoint in models.items():
        names = donor_names(reference, checkpoint.tensors)
        tensors = {names.get(name, name): info for name, info in checkpoint.tensors.items()}
        matched[model] = replace(checkpoint, tensors=tensors) if names else checkpoint
        if names:
            prefixes = Counter(_differing_prefixes(a, b) for a, b in names.items())
            endings = Counter((_ENDING.search(a)[0], _ENDING.search(b)[0]) for a, b in names.items())  # type: ignore[index]
            changed = [pair for kind in (prefixes, endings) for pair, _ in kind.most_common() if pair[0] != pair[1]]
            # Where neither differs, a module inside of a tower does.
            changed = changed or list(prefixes)
            told = ", ".join(f"'{old or 'no prefix'}' is '{new or 'no prefix'}'" for old, new in changed)
            notes.append(f"model '{model}' names its tensors otherwise than '{donor}': {told}; they are matched")
    return matched, notes


def donor_names(reference: Iterable[str], names: Iterable[str], *, heads_only_too: bool = False) -> dict[str, str]:
    """Return the names in `reference` of those of `names` that differ from them by a prefix or an ending alone.

    heads_only_too: other prefixes also where no tensor of a layer has one, as in two models of one architecture.
    """
    reference, names = dict.fromkeys(reference), dict.fromkeys(names)
    unmatched = _by_tail(name for name in reference if name not in names)
    lacking = _by_tail(name for name in names if name not in reference)
    # Where two names have one tail, none of them can be told.
    pairs = {
        found[0]: unmatched[tail][0]
        for tail, found in lacking.items()
        if len(found) == 1 and len(unmatched.get(tail, ())) == 1
    }
    if not any(map(layer, pairs)) and (matched := _by_whole_prefix(reference, names)):
        return matched
    if not (heads_only_too or any(layer(name) for name in pairs)):
        return {name: new for name, new in pairs.items() if _prefix(name) == _prefix(new)}
    # The donor's class has its head inside of the language model, or beside it.
    inside = any(name.startswith("language_model.") for name in reference)
    heads = {tail: found[0] for tail, found in lacking.items() if is_head(tail) and found[0] not in pairs}
    free = {name: f"language_model.{tail}" if inside else tail for tail, name in heads.items()}
    return pairs | {name: new for name, new in free.items() if new != name and new not in names}


def _by_whole_prefix(reference: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return the names in `reference` of `names` where all of one of the two begin with a prefix that is not known."""
    reference, names = dict.fromkeys(reference), dict.fromkeys(names)
    for prefix in common_prefixes(names):
        pairs = {name: name.removeprefix(prefix) for name in names}
        if _are_most_layers(pairs, reference):
            return pairs
    for prefix in common_prefixes(reference):
        pairs = {name: prefix + name for name in names}
        if _are_most_layers(pairs, reference):
            return pairs
    return {}


def _are_most_layers(pairs: Mapping[str, str], reference: Mapping[str, None]) -> bool:
    layered = [new for new in pairs.values() if layer(new)]
    return 2 * sum(new in reference for new in layered) > len(layered)


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    tails: dict[str, list[str]] = {}
    for name in names:
        tail = _INNER_TOWER.sub(r"\1.", name[len(_prefix(name)) :])
        for older, newer in _ENDINGS:
            tail = older.sub(newer, tail)
        tails.setdefault(tail, []).append(name)
    return tails


def _differing_prefixes(name: str, other: str) -> tuple[str, str]:
    if _prefix(name) == _prefix(other):
        for longer, shorter in ((name, other), (other, name)):
            if longer.endswith(f".{shorter}"):
                unknown = longer.removesuffix(shorter)
                return (unknown, "") if longer == name else ("", unknown)
    return _prefix(name), _prefix(other)


def _prefix(name: str) -> str:
    match = _PREFIX.match(name)
    return match[0] if match else ""
