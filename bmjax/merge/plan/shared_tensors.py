"""Gives tensors that a class makes one the same name in all models, whatever names their files hold them under.

A tied model's files may hold its embedding as the head alone, since safetensors' `save_model` keeps the first of two
names. Encoder-decoder models may hold `shared` once more as the embedding of encoder and decoder. `plan` calls it
before it compares names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, TensorInfo
from bmjax.merge.plan.heads import (
    ALWAYS_TIED_FAMILIES,
    config_blocks,
    embedding_of,
    is_language_class,
    is_tied,
    is_tied_copy,
    tied_embedding,
)
from bmjax.merge.plan.stacks import further_token_tensors, language_stack, layer_counts
from bmjax.merge.plan.tensor_names import is_before_layers, is_embedding, is_head, is_of_tower, layer

Config = dict[str, Any]
_SHARED = re.compile(r"(.*\.)?shared\.weight")
_OF_STACK = r"(text_)?(encoder|decoder)\.embed_tokens\.weight"
# What stands before the layers, and has no row for each token.
_OF_NO_TOKENS = re.compile(r"posit|wpe|token_type|segment|norm|(^|\.)ln_|patch|mask", re.IGNORECASE)
# Families whose layers are named as those of others, and whose embedding is not.
_NAMED_OTHERWISE = ("kyutai_speech_to_text", "modernvbert", "neomme", "openai-gpt", "ctrl")
_WORD_EMBEDDINGS = ("falcon", "bloom", "RefinedWeb", "RefinedWebModel")


def head_without_embedding(shapes: Mapping[str, tuple[int, ...]], config: Config) -> str | None:
    """Return the head of a language model that has one and no embedding, None for all other models.

    shapes: of its tensors. config: the content of its config.json. Heads of speech (CTC) and image models have no
    embedding beside them, and a matrix that stands before the layers may be one under a name of its own.
    """
    heads = [name for name, shape in shapes.items() if is_head(name) and name.endswith(".weight") and len(shape) == 2]
    if len(heads) != 1 or not is_language_class(config):
        return None
    rows = shapes[heads[0]][0]
    for name, shape in shapes.items():
        if name == heads[0] or layer(name) is not None or not shape:
            continue
        has_rows = len(shape) == 2 and shape[0] == rows
        is_before = is_embedding(name) or (is_before_layers(name) and _OF_NO_TOKENS.search(name) is None)
        if has_rows or (is_before and not is_of_tower(name)):
            return None
    return heads[0]


def with_embeddings(
    models: Mapping[str, Checkpoint], configs: Mapping[str, Config]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models, and notes. An embedding that a tied model stored only as its head gets its own name.

    Raises UserError where that name cannot be told.
    """
    named, notes = dict(models), list[str]()
    for model, checkpoint in models.items():
        tensors, config = checkpoint.tensors, configs[model]
        head = head_without_embedding({name: info.shape for name, info in tensors.items()}, config)
        if head is None or not is_tied(config):
            continue
        others = (other.tensors for name, other in models.items() if name != model)
        embedding = _embedding_beside(tensors, head, config, others)
        if embedding is None:
            raise UserError(
                f"model '{model}': it is tied, and its weights hold its embedding only as {head}, whose name as an "
                "embedding its layers do not tell; load it and save it again with save_pretrained"
            )
        named[model] = replace(
            checkpoint, tensors={embedding if name == head else name: info for name, info in tensors.items()}
        )
        notes.append(f"model '{model}' is tied, and stored its embedding only as {head}: it counts as {embedding}")
    return named, notes


def _embedding_beside(
    tensors: Mapping[str, TensorInfo], head: str, config: Config, others: Iterable[Mapping[str, TensorInfo]]
) -> str | None:
    """Return the name of the embedding that belongs to a head and the layers beside it; None where it is not known."""
    stacks = _stacks(tensors, config)
    stack = language_stack(stacks, config)
    for other in others:
        their_stacks = _stacks(other, config)
        same_stack = stack is not None and language_stack(their_stacks, config) == stack
        embedding = embedding_of(other)
        if embedding is not None and (same_stack or their_stacks.keys() == stacks.keys()):
            return embedding
    model_type = config.get("model_type")
    if model_type in _NAMED_OTHERWISE:
        return None
    # T5 and BART, alone or inside of another model.
    for name in stacks:
        match = re.fullmatch(r"((?:led\.|(?:model\.|language_model\.)*))decoder\.(block|layers)", name)
        if match and f"{match[1]}encoder.{match[2]}" in stacks:
            return f"{match[1]}shared.weight"
    if stack is None:
        return None
    parent, _, module = stack.rpartition(".")
    before = f"{parent}." if parent else ""
    if stack == "gpt_neox.layers":
        return "gpt_neox.embed_in.weight"
    if re.search(r"(^|\.)lm_head\.weight$", head):
        if module == "layers" and re.fullmatch(r"(.*\.)?(model|language_model|text_model|decoder)", parent):
            return f"{before}embed_tokens.weight"
        if stack == "backbone.layers":
            return "backbone.embeddings.weight"
        if module in ("h", "blocks") and parent.endswith("transformer"):
            return f"{before}{'word_embeddings' if model_type in _WORD_EMBEDDINGS else 'wte'}.weight"
    if module == "layer" and parent.endswith("encoder"):
        return f"{before.removesuffix('encoder.')}embeddings.word_embeddings.weight"
    return None


def _stacks(tensors: Mapping[str, TensorInfo], config: Config) -> dict[str, int]:
    further = further_token_tensors(tensors, config)
    return layer_counts(name for name in tensors if name not in further)


def with_shared_tensors(
    models: Mapping[str, Checkpoint], configs: Mapping[str, Config]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with each tensor that a class shares under the same names, and notes.

    Copies of `shared` as embeddings of encoder and decoder, and of a head's bias as its decoder's, are left out, as
    loaders of tied models restore them. Where a model is not tied the result is not either, and its loaders restore
    none: then the models get the copies that they lack. Only equal tensors are copies.
    """
    names_of_copies = _names_of_copies(models.values())
    if not names_of_copies:
        return dict(models), []
    types = {block.get("model_type") for config in configs.values() for block in config_blocks(config)}
    is_untied = types.isdisjoint(ALWAYS_TIED_FAMILIES) and any(
        _has_own_head(checkpoint.tensors, configs[model]) for model, checkpoint in models.items()
    )
    if is_untied and any(is_tied(configs[model]) for model in models):
        # The tied model may hold no copy, and the untied one may be of a time when loaders made copies all the same.
        layers = [name for checkpoint in models.values() for name in checkpoint.tensors if layer(name)]
        for name, copies in names_of_copies.items():
            if not _SHARED.fullmatch(name):
                continue
            prefixes = [f"{name.removesuffix('shared.weight')}{part}." for part in ("encoder", "decoder")]
            copies |= {f"{p}embed_tokens.weight": None for p in prefixes if any(n.startswith(p) for n in layers)}
    unified, notes = dict(models), list[str]()
    for model, checkpoint in models.items():
        tensors = checkpoint.tensors
        for name, copies in names_of_copies.items():
            held = [copy for copy in copies if copy in tensors]
            if name not in tensors and not held:
                continue
            # A model may hold the embedding of its decoder alone.
            holder = name if name in tensors else held[0]
            equal = [copy for copy in held if copy == holder or is_tied_copy(tensors[holder], tensors[copy])]
            if holder != name and len(equal) < len(held):
                continue
            lacking = [copy for copy in copies if copy not in held] if is_untied else []
            shown = f"{' and '.join(equal)} {'are copies' if len(equal) > 1 else 'is a copy'}"
            if holder != name:
                notes.append(f"model '{model}' holds {name} only as {' and '.join(equal)}, which counts as {name}")
            elif equal and not is_untied:
                notes.append(f"model '{model}': {shown} of {name} that loaders restore: left out")
            if lacking:
                notes.append(f"model '{model}' lacks {' and '.join(lacking)}: its {name} stands there, too")
            # Copies that are kept get what an adapter adds to the tensor.
            new = dict.fromkeys([name, *equal, *lacking] if is_untied else [name], tensors[holder])
            changed: dict[str, TensorInfo] = {}
            for key, info in tensors.items():
                changed |= new if key == holder else {} if key in new or key in equal else {key: info}
            tensors = changed
        unified[model] = replace(checkpoint, tensors=tensors)
    return unified, notes


def _names_of_copies(models: Iterable[Checkpoint]) -> dict[str, dict[str, None]]:
    """Return the names that copies of a shared tensor have in some model, by that tensor's own."""
    names = dict.fromkeys(name for model in models for name in model.tensors)
    copies: dict[str, dict[str, None]] = {}
    for name in filter(_SHARED.fullmatch, names):
        of_stack = re.compile(re.escape(name.removesuffix("shared.weight")) + _OF_STACK)
        copies[name] = {copy: None for copy in names if of_stack.fullmatch(copy)}
    for copy in names:
        name = f"{copy.removesuffix('decoder.bias')}bias"
        if copy.endswith(".decoder.bias") and is_head(copy) and name in names:
            copies[name] = {copy: None}
    return copies


def _has_own_head(tensors: Mapping[str, TensorInfo], config: Config) -> bool:
    """Return whether a model's head is another matrix than its embedding."""
    heads = [name for name in tensors if is_head(name) and name.endswith(".weight")]
    names = [name for name in tensors if _SHARED.fullmatch(name)] or [tied_embedding(tensors) or ""]
    return bool(heads) and not (
        len(heads) == 1 and is_tied(config) and is_tied_copy(tensors.get(names[0]), tensors[heads[0]])
    )
