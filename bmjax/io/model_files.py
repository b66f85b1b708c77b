"""What a model's directory holds, before any tensor is listed: adapters, GGUF, pickles and quantized weights by name.

`bmjax.io.hub` calls `check_files` for every directory that a name means; readers of weights call `quantization`.
"""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.other_layouts import is_trainer_state, layout_problem

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
# Ends of tensor names that only a quantized model has.
QUANTIZED_TENSORS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".absmax": "bitsandbytes", ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors", ".weight_scale": "FP8 with a scale a tensor or row",
    ".weight_scale_inv": "FP8 blockwise", "proj_blocks": "MXFP4",
}  # fmt: skip


def check_files(directory: Path, label: str = "") -> None:
    """Raise UserError for a directory whose weights are in another form than safetensors, naming the form.

    Arguments:
        directory: of a model; one without any weights passes, its reader says what is missing.
        label: what the error begins with.
    """
    if any(directory.glob("*.safetensors")) and not _is_adapter(directory):
        return
    if _is_adapter(directory):
        try:
            base = json.loads((directory / "adapter_config.json").read_text("utf-8-sig")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        raise UserError(
            f"{label}{directory}: an adapter (LoRA) of {base or 'a model it does not name'}, no model of its own; "
            f"merge it into that model first (in a recipe, write MODEL+{directory}) and name the result"
        )
    if problem := layout_problem(directory):
        raise UserError(f"{label}{directory}: {problem}")
    check_names([path.name for path in directory.glob("*")], str(directory), label)


def check_names(names: Iterable[str], shown: str, label: str = "") -> None:
    """Raise UserError where a model's files, by their names, are weights in another form than safetensors.

    Arguments:
        names: of its files, none of which is safetensors.
        shown: the model's name or directory, for the error.
        label: what the error begins with.
    """
    names = sorted(name for name in names if not is_trainer_state(name))
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise UserError(
            f"{label}{shown}: the weights are GGUF ({ggufs[0]}), which llama.cpp reads; expected safetensors: name the "
            "model that it was made from"
        )
    if pickles := [name for name in names if any(fnmatchcase(name, pattern) for pattern in PICKLES)]:
        raise UserError(
            f"{label}{shown}: the weights are pickled ({pickles[0]}): pickle weights are refused, they can run code "
            "when they are read; expected safetensors: load the model with transformers and save_pretrained it"
        )


def _is_adapter(directory: Path) -> bool:
    if not (directory / "adapter_config.json").is_file():
        return False
    return all(path.name.startswith("adapter") for path in directory.glob("*.safetensors"))


def quantization(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> str | None:
    """Return the scheme that a model's weights are quantized by, such as `gptq 4 bit`; None where they are not.

    Arguments:
        config: the content of config.json.
        tensors: the names of its tensors, which show a scheme that config.json does not name.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if isinstance(settings, Mapping):
        method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
        if method == "fp8" and (block := settings.get("weight_block_size")):
            return "fp8 blockwise" if list(block) == [128, 128] else f"fp8 in blocks of {block}"
        if method == "bitsandbytes" and not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
            return None
        bits = settings.get("bits") or (
            4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
        )
        return f"{method} {bits} bit" if bits else method
    if isinstance(settings := config.get("quantization"), Mapping) and "bits" in settings:  # of MLX
        return f"mlx {settings['bits']} bit"
    return next((scheme for name in tensors for end, scheme in QUANTIZED_TENSORS.items() if name.endswith(end)), None)
