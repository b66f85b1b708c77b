"""LoRA adapters of a merge's inputs, `model+adapter`: which tensors an adapter changes, and by what.

Nothing is computed here: a changed tensor becomes an `AdaptedTensor`, which is computed in chunks as it is read.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError, read_text
from bmjax.io.hub import is_hub_id, split_adapter, split_revision
from bmjax.io.safetensors import Checkpoint, TensorInfo, listing, read_header
from bmjax.io.tensor_forms import AdaptedTensor, ReplacementTensor
from bmjax.merge.plan import prefixes
from bmjax.merge.plan.quantized import PLAIN
from bmjax.merge.plan.tensor_names import is_embedding, is_head
from bmjax.merge.plan.tokenizer_text import tokenizer_difference
from bmjax.weights.tokenizer import stored_template

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CHARACTERS = 2**20
_FACTOR = re.compile(
    r"(?P<module>.+?)(\.base_layer)?\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?"
)
_WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
# Ways to start an adapter that change the model's own weights, which the adapter's files do not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of adapters that add something else than a product of two matrices to the weights of one model.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "arrow_config": "Arrow", "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "LoRA on replicated layers", "trainable_token_indices": "LoRA with trained tokens",
    "target_parameters": "LoRA on parameters of experts",
}  # fmt: skip


def adapted(models: Mapping[str, Checkpoint], adapters: Mapping[str, Path]) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with their adapters' changes, and a note for each.

    adapters: directory of a model's adapter. Raises UserError for adapters that are no plain LoRA or of another model.
    """
    changed, notes = dict(models), []
    for name, folder in adapters.items():
        try:
            tensors, note, base = _apply(models[name], folder)
        except UserError as error:
            raise UserError(f"model '{name}': {error}") from None
        changed[name] = replace(models[name], tensors=tensors)
        notes.append(f"model '{name}': {note}")
        model = split_revision(split_adapter(name)[0])[0]
        if is_hub_id(model) and is_hub_id(base) and model.lower() != base.lower():
            notes.append(f"model '{name}': its adapter was made for {base}, not for {model}")
        notes += [f"model '{name}': {line}" for line in _other_side_files(models[name].directory, folder)]
    return changed, notes


def _other_side_files(model: Path, adapter: Path) -> Iterator[str]:
    """Yield a line where an adapter was saved with another tokenizer or chat template than its model has."""
    take = f"it is not used; `tokenizer_source: {adapter}` takes it"
    if difference := tokenizer_difference(model, adapter):
        yield f"its adapter has another tokenizer, {difference}; {take}"
    elif (template := stored_template(adapter)) is not None and template != stored_template(model):
        yield f"its adapter has another chat template; {take}"


def _apply(model: Checkpoint, folder: Path) -> tuple[dict[str, TensorInfo], str, str]:
    """Return the model's tensors with an adapter's changes, what it changes in words, and the model it was made for."""
    config = _config(folder)
    # What the adapter holds: pairs of factors by the tensor that they change, and whole tensors.
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for key, info in read_header(folder / WEIGHTS).items():
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(f"{match['module']}.weight", {})[f"{match['embedding'] or ''}{match['part']}"] = info
        elif "lora_" in key:
            raise UserError(f"{folder / WEIGHTS}: {key}: only matrices A and B of a LoRA adapter are merged")
        else:
            whole[_WHOLE.sub("", key)] = info
    # The model's names of them, which have no `base_model.model.` before them.
    names = prefixes.donor_names(model.tensors, [*factors, *whole], heads_only_too=True)
    lacking = [name for name in (names.get(key, key) for key in [*factors, *whole]) if name not in model.tensors]
    if lacking := [name for name in lacking if not is_head(name)]:
        base = config.get("base_model_name_or_path") or "a model that it does not name"
        raise UserError(
            f"{folder}: the adapter changes {listing(lacking)} that the model lacks; it was made for {base}"
        )
    # An embedding is often saved whole beside its factors: they change what was saved.
    replaced = {names.get(key, key): _in_place_of(model, names.get(key, key), info) for key, info in whole.items()}
    tensors = {**model.tensors, **replaced}
    for key, parts in factors.items():
        name = names.get(key, key)
        tensors[name] = _adapted(folder, config, name, tensors[name], parts)
    ranks = sorted({parts[part].shape[0] for parts in factors.values() for part in parts if part.endswith("A")})
    also = f" and replaces {listing(list(replaced))}" if replaced else ""
    count = f"{len(factors)} tensor{'s' * (len(factors) != 1)}"
    return (
        tensors,
        f"a LoRA adapter of rank {', '.join(map(str, ranks))} changes {count} as it is read{also}",
        (str(config.get("base_model_name_or_path") or "")),
    )


def _in_place_of(model: Checkpoint, name: str, info: TensorInfo) -> TensorInfo:
    """Return a tensor that an adapter holds whole, with the type of the model's own, a tied model's embedding."""
    own = model.tensors.get(name)
    if own is None and is_head(name):
        own = next((tensor for key, tensor in model.tensors.items() if is_embedding(key)), None)
    if own is None or not {own.kept_dtype, info.dtype} <= set(PLAIN):
        return info
    return ReplacementTensor(name, info.file, info.dtype, info.shape, info.start, info.nbytes, own)


def _config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises UserError unless it describes a plain LoRA adapter."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG}, so it is no adapter")
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder}: no {WEIGHTS}; pickled adapters are refused: load it with peft and save_pretrained it"
        )
    try:
        config = json.loads(read_text(path, _MAX_CHARACTERS))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    kind, start = str(config.get("peft_type")), str(config.get("init_lora_weights")).lower()
    advice = "merge it into its model with peft first (merge_and_unload, save_pretrained)"
    if kind != "LORA":
        raise UserError(f"{folder}: an adapter of kind {kind}; only LoRA is merged on the way: {advice}")
    if variant := next((name for key, name in _VARIANTS.items() if config.get(key)), None):
        raise UserError(f"{folder}: an adapter of kind {variant}; only plain LoRA is merged on the way: {advice}")
    if start.startswith(_CHANGED_BASE):
        raise UserError(f"{path}: init_lora_weights: {start} changed the model's own weights, too; {advice}")
    return config


def _adapted(
    folder: Path, config: Mapping[str, Any], name: str, info: TensorInfo, parts: Mapping[str, TensorInfo]
) -> TensorInfo:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    if parts.keys() != {f"{prefix}A", f"{prefix}B"}:
        there, missing = sorted(parts)[0], "B" if sorted(parts)[0].endswith("A") else "A"
        raise UserError(f"{folder / WEIGHTS}: {name}: lora_{there} without lora_{prefix}{missing}")
    a, b = parts[f"{prefix}A"], parts[f"{prefix}B"]
    transposed = bool(prefix) or (bool(config.get("fan_in_fan_out")) and not is_head(name))
    if len(a.shape) != 2 or len(b.shape) != 2 or len(info.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{folder / WEIGHTS}: {name}: A is {list(a.shape)}, B {list(b.shape)}, the model's tensor "
            f"{list(info.shape)}; only matrices are merged"
        )
    shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
    if shape != info.shape:
        raise UserError(
            f"{folder / WEIGHTS}: {name}: the adapter makes {list(shape)}, the model has {list(info.shape)}"
        )
    # Settings of single modules are patterns of the ends of their names.
    module, alpha = name.removesuffix(".weight"), config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _fits(str(pattern), module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserError(f"{folder / CONFIG}: lora_alpha: expected a number, found {alpha!r}")
    rank = max(1, a.shape[0])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return AdaptedTensor(
        name, info.file, "F32", info.shape, info.start, info.nbytes, info, a, b, scale, transposed,
    )  # fmt: skip


def _fits(pattern: str, module: str) -> bool:
    """Return whether a pattern of adapter_config.json is a module's name or the end of it."""
    if len(pattern) > 200 or re.search(r"[*+{].*[*+{].*[*+{]|\)[*+{]", pattern):
        raise UserError(f"{CONFIG}: alpha_pattern: '{pattern[:60]}' could take for ever")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise UserError(f"{CONFIG}: alpha_pattern: '{pattern}' is no pattern: {error}") from None
