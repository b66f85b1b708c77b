"""Quantized inputs of a merge: FP8 times its scales is dequantized as it is read, other schemes are refused by name.

A scale may be a block's, a row's or the whole tensor's. A recipe that only copies (passthrough, without scale, models
of one scheme) takes every scheme as it is stored.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from bmjax.config import UserError
from bmjax.io.model_files import quantization
from bmjax.io.safetensors import Checkpoint, TensorInfo, listing
from bmjax.io.tensor_forms import BlockScaledTensor
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.recipe.step import Step

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_INNER_KEYS = QUANTIZATION_KEYS[:2]  # MLX's word may mean something else inside of a block
BLOCK_SCALES, SCALES = "_scale_inv", "_scale"  # what a weight's name gets, for the scales that it is multiplied by
_OF_ALL = ((), (1,), (1, 1))  # shapes of a scale for the whole matrix
_FP8 = ("F8_E4M3", "F8_E5M2")
_POWERS = "F8_E8M0"  # of scales: 2^(n - 127) for a byte n, which float32 holds exactly (ue8m0 of DeepSeek-V3.1)
PLAIN = ("F32", "BF16", "F16", "F64")
_WHOLE_NUMBERS = ("BOOL", "I64", "I32", "I16", "U64", "U32", "U16", "U8", "C64")  # of masks and positions, too
# By these methods, FP8 weights are multiplied by `weight_scale`, with nothing added. None: of no config.json.
_MULTIPLIED = (None, "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
# What only other arithmetic has: packed numbers, zero points, scales of scales.
_OTHER_PARTS = re.compile(r"weight_packed$|zero_point$|_scale_2$|g_idx$|bitmask$|qweight$|_blocks$")
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|act|q|k|v|kv|prob)_scale(_ub|_inv)?$|\.(input|weight)_amax$")


class Grid(NamedTuple):
    """The scales of a matrix: for every `block` of rows and columns one."""

    scales: TensorInfo  # [rows / block rows, columns / block columns], rounded up
    block: tuple[int, int]


def dequantized(
    recipe: Recipe, models: Mapping[str, Checkpoint], configs: Mapping[str, Mapping[str, Any]], *, always: bool = False
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the models with float tensors where they are quantized in a known way, and a note for each such model.

    always: also where the recipe only copies. Raises UserError for a model that is quantized in another way.
    """
    schemes = {name: scheme(model, configs[name]) for name, model in models.items()}
    settings = [_settings(configs[name]) for name in models]
    copied = not always and _only_copies(recipe) and all(s == settings[0] for s in settings)
    if copied or not any(schemes.values()):
        return dict(models), []
    plain, notes = dict(models), []
    for name, model in models.items():
        if (found := schemes[name]) is None:
            continue
        grids = _grids(name, model, configs[name])
        if not grids:
            raise _refusal(name, model, found)
        plain[name], dropped = _with_scales(model, grids)
        also = f"; {listing(dropped)} of activations are left out" if dropped else ""
        notes.append(
            f"model '{name}' is quantized ({found}): it is dequantized as it is read, and counts as BF16{also}"
        )
    return plain, notes


def scheme(model: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """Return by what scheme a model is quantized; None for one of floating-point weights."""
    # The scales of whole numbers have the same names as those of FP8.
    has_fp8 = any(info.dtype in _FP8 for info in model.tensors.values())
    names = [name for name in model.tensors if has_fp8 or not name.endswith(f".weight{SCALES}")]
    two_scales = any(name.endswith(f".weight{SCALES}_2") for name in names)
    if named := quantization(_settings(config), () if two_scales else names):
        return "fp8 blockwise" if named == "FP8 blockwise" else named
    if two_scales:
        return "NVFP4"
    for name, info in model.tensors.items():
        if info.dtype in _FP8:
            return f"{info.dtype} without scales"
        is_weight = name.endswith(".weight") or (info.dtype not in _WHOLE_NUMBERS and re.search(r"proj$|experts", name))
        if info.dtype not in PLAIN and is_weight:
            return f"{info.dtype} weights"
    return None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a quantized model's config that change when it is dequantized: None for a key that goes.

    Some models keep their settings in a file of its own, hf_quant_config.json, which goes where quantization_config
    does, so that key is always among them.
    """
    keys = [key for key in QUANTIZATION_KEYS if key in config]
    nested = {key: _stripped(value) for key, value in config.items() if isinstance(value, Mapping) and key not in keys}
    changed = {key: value for key, value in nested.items() if value != config[key]}
    return {**changed, **dict.fromkeys(("quantization_config", *keys))}


def _stripped(block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _stripped(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if key not in _INNER_KEYS
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of quantization: its own keys, else those of a model inside it, `text_config` say."""
    said = {key: config[key] for key in QUANTIZATION_KEYS if config.get(key)}
    return said or next(_inner_settings(config), {})


def _inner_settings(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for block in (value for value in config.values() if isinstance(value, Mapping)):
        if said := {key: block[key] for key in _INNER_KEYS if block.get(key)}:
            yield said
        yield from _inner_settings(block)


def _refusal(name: str, model: Checkpoint, found: str) -> UserError:
    if all(info.dtype in PLAIN for info in model.tensors.values()):
        return UserError(
            f"model '{name}': its weights are quantized ({found}) by its config.json, but plain in its files; remove "
            "what config.json says of quantization if the files are right"
        )
    return UserError(
        f"model '{name}': its weights are quantized ({found}); only FP8 times its scales is dequantized on the way: "
        "name the model that it was made from, or dequantize it first (transformers: dequantize, save_pretrained)"
    )


def _only_copies(recipe: Recipe) -> bool:
    return all(
        step.method.name == "passthrough" and step.arguments["scale"] == (1.0,)
        for whole in recipe.steps
        for step in _parts(whole)
    )


def _parts(step: Step) -> Iterator[Step]:
    yield from (part.step for part in step.slices) if step.slices else (step,)


def _grids(name: str, model: Checkpoint, config: Mapping[str, Any]) -> dict[str, Grid]:
    """Return the scales of every FP8 weight; {} where the weights are not FP8, or their arithmetic is not known.

    Raises UserError for FP8 weights without scales, and for scales of another size.
    """
    said = _settings(config)
    settings = said.get("quantization_config") or said.get("compression_config") or {}
    if "quantization" in said or settings.get("quant_method") not in _MULTIPLIED:
        return {}
    tensors, grids = model.tensors, dict[str, Grid]()
    for key, info in tensors.items():
        is_number = info.dtype in PLAIN or (info.dtype in _WHOLE_NUMBERS and not key.endswith(".weight"))
        is_number = is_number or (info.dtype == _POWERS and key.endswith((BLOCK_SCALES, SCALES)))
        if _OTHER_PARTS.search(key) or not (is_number or info.dtype in _FP8):
            if str(settings.get("quant_method")).endswith("fp8") and any(i.dtype in _FP8 for i in tensors.values()):
                problem = f"{key} is {info.dtype} {list(info.shape)}, which is neither FP8 nor a scale that is known"
                raise _refusal(name, model, f"{scheme(model, config)}, but {problem}")
            return {}
        if info.dtype not in _FP8:
            continue
        by_block, scales = tensors.get(key + BLOCK_SCALES), tensors.get(key + SCALES)
        if len(info.shape) != 2 or (by_block is None and scales is None):
            what = "no matrix" if len(info.shape) != 2 else "without scales"
            problem = f"{key} is {info.dtype} {list(info.shape)} {what}"
            raise _refusal(name, model, f"{scheme(model, config)}, but {problem}")
        # What is called inverse is multiplied by, too. Without blocks it is a scale for all or for each row.
        has_no_blocks = "weight_block_size" in settings and not settings["weight_block_size"]
        if by_block is None or has_no_blocks or by_block.shape in _OF_ALL:
            grids[key] = _by_row(name, info, by_block or scales)
        else:
            grids[key] = _by_block(name, info, by_block, settings)
    return grids


def _by_block(name: str, info: TensorInfo, scales: TensorInfo, settings: Mapping[str, Any]) -> Grid:
    height, width = settings.get("weight_block_size") or (128, 128)
    expected = [-(-size // part) for size, part in zip(info.shape, (height, width), strict=True)]
    if list(scales.shape) != expected:
        raise UserError(
            f"model '{name}': {scales.name} is {list(scales.shape)}, expected {expected}: a scale for every {height} x "
            f"{width} entries of {list(info.shape)}"
        )
    return Grid(scales, (height, width))


def _by_row(name: str, info: TensorInfo, scales: TensorInfo | None) -> Grid:
    """Return the grid of a scale for the whole matrix, or one for each row."""
    assert scales is not None
    rows, columns = info.shape
    if scales.shape in _OF_ALL:
        return Grid(replace(scales, shape=(1, 1)), (max(rows, 1), max(columns, 1)))
    if scales.shape in ((rows,), (rows, 1)):
        return Grid(replace(scales, shape=(rows, 1)), (1, max(columns, 1)))
    raise UserError(
        f"model '{name}': {scales.name} is {list(scales.shape)}, expected [1] or [{rows}, 1]: a scale for all or for "
        f"every row of {list(info.shape)}; other scales are not known: dequantize the model first"
    )


def _with_scales(model: Checkpoint, grids: Mapping[str, Grid]) -> tuple[Checkpoint, list[str]]:
    """Return the model with float tensors for what is scaled, without the scales; and the scales of activations."""
    dropped = [key for key in model.tensors if _OF_ACTIVATIONS.search(key)]
    scales = {grid.scales.name for grid in grids.values()}
    tensors: dict[str, TensorInfo] = {}
    for key, info in model.tensors.items():
        if key in scales or key in dropped:
            continue
        grid = grids.get(key)
        tensors[key] = info if grid is None else BlockScaledTensor(
            key, info.file, "F32", info.shape, info.start, info.nbytes, info, *grid
        )  # fmt: skip
    return replace(model, tensors=tensors), dropped
