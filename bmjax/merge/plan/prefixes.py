"""Matches the names of tensors that differ only by a prefix: other versions of a library, classes, wrappers.

transformers 4.52 made `model.layers.0` of a vision-language model `model.language_model.layers.0`; a class without a
head drops `transformer.` or `bert.`; torch.compile puts `_orig_mod.` before all. `plan` calls it before anything else
looks at names, so all that follows sees the donor's.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from bmjax.io.safetensors import Checkpoint
from bmjax.merge.plan.tensor_names import is_head, layer

# Modules that hold the whole model, or a language model in a larger one: what lies in them has other names of its own.
_WRAPPERS = (
    "model", "language_model", "text_model", "transformer", "backbone", "base_model", "module", "_orig_mod",
    "_fsdp_wrapped_module", "bert", "roberta", "distilbert", "electra", "deberta", "mpnet", "albert", "esm", "gpt_neox",
)  # fmt: skip
_PREFIX = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*")
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
            pairs = Counter((_PREFIX.match(a)[0], _PREFIX.match(b)[0]) for a, b in names.items())  # type: ignore[index]
            told = ", ".join(
                f"'{old or 'no prefix'}' is '{new or 'no prefix'}'" for (old, new), _ in pairs.most_common()
            )
            notes.append(f"model '{model}' names its tensors otherwise than '{donor}': {told}; they are matched")
    return matched, notes


def donor_names(reference: Iterable[str], names: Iterable[str], *, heads_only_too: bool = False) -> dict[str, str]:
    """Return the names in `reference` of those of `names` that differ from them by a prefix alone.

    heads_only_too: also where no tensor of a layer is among them, which two models of one architecture have.
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
    if not (heads_only_too or any(layer(name) for name in pairs)):
        return {}
    # The donor's class has its head inside of the language model, or beside it.
    inside = any(name.startswith("language_model.") for name in reference)
    heads = {tail: found[0] for tail, found in lacking.items() if is_head(tail) and found[0] not in pairs}
    free = {name: f"language_model.{tail}" if inside else tail for tail, name in heads.items()}
    return pairs | {name: new for name, new in free.items() if new != name and new not in names}


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    tails: dict[str, list[str]] = {}
    for name in names:
        tails.setdefault(_INNER_TOWER.sub(r"\1.", _PREFIX.sub("", name, count=1)), []).append(name)
    return tails
