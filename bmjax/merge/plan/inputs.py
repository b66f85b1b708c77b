"""What is wrong or remarkable about a merge's inputs before tensors are planned: one model twice, layers that are lost,
tokens without rows.

Only plans call it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, listing
from bmjax.merge.plan.config_classes import is_free_count
from bmjax.merge.plan.heads import TIED_FAMILIES, UNTIED_FAMILIES, config_blocks
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.stacks import RARE_COUNTS, missing_layers, said_layers
from bmjax.merge.plan.tensor_names import is_of_tower, layer
from bmjax.merge.plan.tokenizer_text import largest_id
from bmjax.merge.recipe.recipe import Recipe

_MASKS = ("BOOL", "U8")
# Experts of a layer, each with matrices of its own or all of them in one tensor.
_SPLIT_EXPERTS, _STACKED_EXPERTS = re.compile(r"\bexperts\.\d+\."), re.compile(r"\bexperts\.[a-z]")
# Stacks of these names have tensors in every layer. A row of modules (`net.0`, `net.2`) has not.
_OF_LAYERS = re.compile(r"(.*\.)?(layers|layer|h|blocks?)")


def refuse_twins(recipe: Recipe, directories: Mapping[str, Path], adapters: Mapping[str, Path]) -> None:
    """Raise a UserError where a step merges one model by two names: a hub id and its directory in the cache, say.

    It would count twice, and with the base as a branch the change is zero. Other layers of it are another matter.
    """
    parts = {
        name: tuple(folder.resolve() for folder in (directory, adapters.get(name)) if folder is not None)
        for name, directory in directories.items()
    }
    for step in recipe.steps:
        for merged, ranges in [(part.step, part.ranges) for part in step.slices] or [(step, {})]:
            first_names: dict[Any, str] = {}
            for name in filter(None, (merged.base, *merged.branches)):
                if name not in parts:
                    continue
                first = first_names.setdefault((parts[name], ranges.get(name)), name)
                if first != name:
                    raise UserError(
                        f"models '{first}' and '{name}' are one directory, {'+'.join(map(str, parts[name]))}, so the "
                        "same model; list it once, and write one name for it"
                    )


def with_masks_of_one_type(models: Mapping[str, Checkpoint], donor: str) -> dict[str, Checkpoint]:
    """Return the models with masks of the donor's type: older versions saved as U8 what is BOOL now, in equal bytes."""
    masks = {name: info for name, info in models[donor].tensors.items() if info.dtype in _MASKS}
    changed = dict(models)
    for model, checkpoint in models.items():
        others = {
            name: replace(info, dtype=masks[name].dtype)
            for name, info in checkpoint.tensors.items()
            if name in masks and info.dtype in _MASKS and info.dtype != masks[name].dtype
        }
        if others:
            changed[model] = replace(checkpoint, tensors={**checkpoint.tensors, **others})
    return changed


def same_files(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Yield a line for every model whose directory is its own, but whose weights are the files of another."""
    first_names: dict[frozenset[Path], str] = {}
    for name, model in models.items():
        files = frozenset(file.resolve() for info in model.tensors.values() for file in info.files)
        first = first_names.setdefault(files, name)
        if first != name and model.directory.resolve() != models[first].directory.resolve():
            yield f"models '{first}' and '{name}' are two directories, but read the same files of weights"


def refuse_lost_layers(layout: Layout) -> None:
    """Raise a UserError where a step goes by the tensors of a model that lost layers as it was saved."""
    for step in layout.recipe.steps:
        ranges: list[tuple[str, int, int | None]] = [
            (model, low, high) for part in step.slices for model, (low, high) in part.ranges.items()
        ]
        for model, low, high in ranges or [(step.donor, 0, None)]:
            config = layout.configs.get(model) or {}
            if model not in layout.models or "block_configs" in config:  # which may leave out whole layers
                continue
            names = [name for name in layout.names[model] if name not in layout.further[model]]
            said, language = said_layers(config), layout.stack(model)
            # Of an encoder and a decoder neither is the language model's alone.
            stacks = [language] if language else [name for name in layout.layers[model] if not is_of_tower(name)]
            for stack in filter(_OF_LAYERS.fullmatch, stacks):
                count = layout.layers[model][stack]
                lost = missing_layers(names, stack)
                if lost and count not in said and not _are_layers_of_a_kind(layout.models[model], names, stack):
                    continue
                missing = [number for number in lost if low <= number < (count if high is None else high)]
                # One layer alone is a part on purpose, and some families may number theirs from 1 on.
                if missing and count - len(lost) > 1 and not (missing == [0] and count - 1 in said):
                    shown = ", ".join(map(str, missing[:5])) + (", ..." if missing[5:] else "")
                    raise UserError(
                        f"model '{model}': its weights hold no tensor of layer {shown} of {stack}, whose last is "
                        f"{count - 1}: they were saved in part; save the whole model"
                    )
                is_known = config.get("model_type") in UNTIED_FAMILIES | TIED_FAMILIES
                if is_known and language and not ranges and max(said, default=0) > count:
                    raise UserError(
                        f"model '{model}': its config.json says {max(said)} layers, its weights hold {count} in "
                        f"{stack}: loaders would make others at random; save the whole model, or write {count} there"
                    )


def _are_layers_of_a_kind(checkpoint: Checkpoint, names: Iterable[str], stack: str) -> bool:
    """Return whether all layers of a stack share a tensor, as their norm, of one shape.

    A codec's modules do not: convolutions, and activations between them, which have no tensors.
    """
    parts: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name in names:
        if (t := layer(name)) is not None and t.stack == stack:
            tensors = parts.setdefault(t.number, set())
            if "." in t.tensor and name in checkpoint.tensors:
                tensors.add((t.tensor, checkpoint.tensors[name].shape))
    return bool(set.intersection(*parts.values()))


def layers_beside_config(layout: Layout) -> Iterator[str]:
    """Yield a line for every model whose config says another number of layers than its weights hold."""
    for model in layout.models:
        stack, said = layout.stack(model), said_layers(layout.configs[model] or {})
        if not said or stack is None or not _OF_LAYERS.fullmatch(stack):
            continue
        names = (name for name in layout.names[model] if name not in layout.further[model])
        count = layout.layers[model][stack] - len(missing_layers(names, stack))
        config = layout.configs[model] or {}
        others = {block.get(key) for block in config_blocks(config) for key in RARE_COUNTS}
        if count not in said | others and is_free_count(config, count):
            consequence = "make the others at random" if max(said) > count else "leave some out"
            yield (
                f"config.json of '{model}' says {' or '.join(map(str, sorted(said)))} layers, its weights hold {count} "
                f"in {stack}: its loaders {consequence}"
            )


def tensors_lost_in_layers(layout: Layout) -> Iterator[str]:
    """Yield a line for every layer that lacks tensors which most layers of its stack have.

    A model that lacks what another one has is refused elsewhere; these may be lacking in all. A layer of another kind
    has tensors of its own, or is not the only one of its kind. The first and the last may lack some on purpose
    (ModernBERT's first has no norm before its attention).
    """
    models_by_line: dict[str, list[str]] = {}
    for model in layout.models:
        stacks: dict[str, dict[int, set[str]]] = {}
        for name in layout.names[model]:
            tensor = layer(name)
            if tensor and _OF_LAYERS.fullmatch(tensor.stack) and name not in layout.further[model]:
                stacks.setdefault(tensor.stack, {}).setdefault(tensor.number, set()).add(tensor.tensor)
        for stack, layers in stacks.items():
            kinds = Counter(map(frozenset, layers.values()))
            usual, count = kinds.most_common(1)[0]
            if 2 * count <= len(layers) or "block_configs" in (layout.configs.get(model) or {}):
                continue
            for number in sorted(layers)[1:-1]:
                tensors = layers[number]
                if tensors < usual and kinds[frozenset(tensors)] == 1:
                    lacking = listing([f"{stack}.{number}.{tensor}" for tensor in sorted(usual - tensors)])
                    line = f"lost {lacking}: {count} of {len(layers)} layers have it, so loaders will make it at random"
                    models_by_line.setdefault(line, []).append(model)
    for line, models in models_by_line.items():
        yield f"model{'s' * (len(models) > 1)} {' and '.join(map(repr, models))}: {line}"


def tokens_without_rows(layout: Layout) -> Iterator[str]:
    """Yield a line where the tokenizer that is copied has more tokens than the embedding has rows."""
    donor = layout.recipe.donor
    rows, largest = layout.row_count(donor, layout.embedding(donor) or ""), largest_id(layout.models[donor].directory)
    if rows is not None and largest is not None and largest >= rows:
        yield (
            f"model '{donor}': its tokenizer has ids up to {largest}, its embedding {rows} rows: a model fails at the "
            f"tokens beyond; `tokenizer: {{source: base}}` gives them rows"
        )


def experts_of_two_layouts(names: Iterable[str], other_names: Iterable[str], model: str, other: str) -> str | None:
    """Return a line where one of two models has its experts one by one and the other has them stacked; else None."""
    split, stacked = {}, {}
    for key, tensors in ((model, list(names)), (other, list(other_names))):
        if name := next(filter(_SPLIT_EXPERTS.search, tensors), None):
            split[key] = name
        elif name := next(filter(_STACKED_EXPERTS.search, tensors), None):
            stacked[key] = name
    if not split or not stacked:
        return None
    (first, matrix), (second, stack) = *split.items(), *stacked.items()
    return (
        f"model '{first}' has its experts one by one ({matrix}), model '{second}' has them stacked ({stack}); load "
        f"'{first}' with transformers 5 and stack them, too: save_pretrained(DIRECTORY, save_original_format=False)"
    )
