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
# Parts of the names of a model that was saved with an adapter inside: the factors, what they change, and whole modules.
_INSIDE = re.compile(
    r"(^|\.)lora_(embedding_)?[AB](\.|$)|\.lora_magnitude_vector(\.|$)|\.modules_to_save\.|\.base_layer\.(?!\d)"
)
# Settings of classes that have such factors of their own (Phi-4-multimodal); ranks of compressed keys are no such.
_OWN_FACTORS = re.compile(r"(^|_)lora(_(?!rank)|$)")
# PEFT looks at a module's class: the factors of `Conv1D` are always transposed, those of `nn.Linear` never, and it sets
# fan_in_fan_out so. It is then saved as the last module left it. These classes of transformers are built of Conv1D.
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
# Ways to start an adapter that change the model's own weights, which the adapter's files do not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of adapters that add something else than a product of two matrices to the weights of one model.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "arrow_config": "Arrow", "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "LoRA on replicated layers", "trainable_token_indices": "LoRA with trained tokens",
    "target_parameters": "LoRA on parameters of experts",
}  # fmt: skip


def adapted(
    models: Mapping[str, Checkpoint], adapters: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with their adapters' changes, and a note for each.

    adapters: directory of a model's adapter. configs: the models' config.json. Raises UserError for adapters that are
    no plain LoRA or of another model, and for models that were saved with an adapter inside.
    """
    changed, notes = dict(models), list(_inside(models, configs))
    for name, folder in adapters.items():
        try:
            tensors, note, base = _apply(models[name], folder, configs[name])
        except UserError as error:
            raise UserError(f"model '{name}': {error}") from None
        changed[name] = replace(models[name], tensors=tensors)
        notes.append(f"model '{name}': {note}")
        model = split_revision(split_adapter(name)[0])[0]
        if is_hub_id(model) and is_hub_id(base) and model.lower() != base.lower():
            notes.append(f"model '{name}': its adapter was made for {base}, not for {model}")
        notes += [f"model '{name}': {line}" for line in _other_side_files(models[name].directory, folder)]
    return changed, notes


def _inside(models: Mapping[str, Checkpoint], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for every model whose class has low-rank factors. Raises UserError where PEFT has added them.

    The product of averaged factors is not the average of the products, so merging them would be wrong.
    """
    for model, checkpoint in models.items():
        if (name := next(filter(_INSIDE.search, checkpoint.tensors), None)) is None:
            continue
        name = checkpoint.tensors[name].name  # as it is stored
        if not any(_OWN_FACTORS.search(key) for key in configs[model]):
            raise UserError(
                f"model '{model}': was saved with its adapter inside ('{name}'), so its weights are not what it "
                "computes with; load it with peft, merge_and_unload, save_pretrained, and merge that"
            )
        yield (
            f"model '{model}': its class has LoRA matrices of its own ('{name}'); each is merged by itself, which is "
            "not a merge of their products"
        )


def _other_side_files(model: Path, adapter: Path) -> Iterator[str]:
    """Yield a line where an adapter was saved with another tokenizer or chat template than its model has."""
    take = f"it is not used; `tokenizer_source: {adapter}` takes it"
    if difference := tokenizer_difference(model, adapter):
        yield f"its adapter has another tokenizer, {difference}; {take}"
    elif (template := stored_template(adapter)) is not None and template != stored_template(model):
        yield f"its adapter has another chat template; {take}"


def _apply(model: Checkpoint, folder: Path, model_config: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], str, str]:
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
    if not factors and not whole:
        raise UserError(f"{folder / WEIGHTS}: holds no LoRA matrices, so the adapter changes nothing; save it again")
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
        tensors[name] = _adapted(folder, config, model_config, name, tensors[name], parts)
    ranks = sorted({parts[part].shape[0] for parts in factors.values() for part in parts if part.endswith("A")})
    count = f"{len(factors)} tensor{'s' * (len(factors) != 1)}"
    done = [f"of rank {', '.join(map(str, ranks))} changes {count} as it is read"] if factors else []
    done += [f"replaces {listing(list(replaced))}"] if replaced else []
    return tensors, f"a LoRA adapter {' and '.join(done)}", str(config.get("base_model_name_or_path") or "")


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
    folder: Path,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    name: str,
    info: TensorInfo,
    parts: Mapping[str, TensorInfo],
) -> TensorInfo:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    if parts.keys() != {f"{prefix}A", f"{prefix}B"}:
        there, missing = sorted(parts)[0], "B" if sorted(parts)[0].endswith("A") else "A"
        raise UserError(f"{folder / WEIGHTS}: {name}: lora_{there} without lora_{prefix}{missing}")
    a, b = parts[f"{prefix}A"], parts[f"{prefix}B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or len(info.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{folder / WEIGHTS}: {name}: A is {list(a.shape)}, B {list(b.shape)}, the model's tensor "
            f"{list(info.shape)}; only matrices are merged"
        )
    product = (b.shape[0], a.shape[1])
    transposed = bool(prefix) or _is_stored_transposed(name, info.shape, product, model_config, config)
    shape = product[::-1] if transposed else product
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


def _is_stored_transposed(
    name: str,
    stored: tuple[int, ...],
    product: tuple[int, ...],
    model_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> bool:
    """Return whether a matrix of shape `stored` is [inputs, outputs], where B A is `product` [outputs, inputs].

    The model's class decides. Of a class that transformers does not have, the shapes tell, and the adapter's
    fan_in_fan_out where the matrix is square.
    """
    types = set(_model_types(model_config))
    if types.intersection(_CONV1D_FAMILIES):
        return name.removesuffix(".weight").rpartition(".")[2] in _CONV1D_MODULES
    says_so = bool(config.get("fan_in_fan_out")) and not is_head(name)
    fits, fits_transposed = stored == product, stored == product[::-1]
    if types and "auto_map" not in model_config:
        return says_so and fits_transposed and not fits
    return says_so if fits == fits_transposed else fits_transposed


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the model types of a config and of the models inside it, as an encoder with a decoder has them."""
    if isinstance(kind := config.get("model_type"), str):
        yield kind
    for block in config.values():
        if isinstance(block, Mapping):
            yield from _model_types(block)


def _fits(pattern: str, module: str) -> bool:
    """Return whether a pattern of adapter_config.json is a module's name or the end of it."""
    if len(pattern) > 200 or re.search(r"[*+{].*[*+{].*[*+{]|\)[*+{]", pattern):
        raise UserError(f"{CONFIG}: alpha_pattern: '{pattern[:60]}' could take for ever")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise UserError(f"{CONFIG}: alpha_pattern: '{pattern}' is no pattern: {error}") from None
