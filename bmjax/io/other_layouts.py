"""Directories whose weights lie where no reader of models looks: in subfolders, under other names, in trainers' shards.

`model_files.check_files` and `safetensors.open_checkpoint` ask it what to say of a directory without model.safetensors.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

_STATE = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "random_states*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt")
_OF_DIFFUSERS = "diffusion_pytorch_model*.safetensors*"
_SHARDS_OF_FSDP = "*.distcp"


def is_trainer_state(name: str) -> bool:
    """Return whether a file, by its name, holds a trainer's state and no weights."""
    return _is(name, _STATE)


def layout_problem(directory: Path) -> str | None:
    """Return where a directory without model.safetensors has its weights, and what to do; None where it has none.

    Only names are looked at, no file is read.
    """
    entries = sorted(directory.glob("*"))
    files = [path.name for path in entries if not path.is_dir()]
    folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    with_weights = [folder for folder in folders if any(map(_is_weights, _names_in(folder)))]
    # Diffusers' pipelines and models.
    if "model_index.json" in files:
        parts = "; ".join(map(str, with_weights)) or "none of which holds weights here"
        return f"a pipeline of diffusers, whose parts are models of their own; name one of them: {parts}"
    if ours := [name for name in files if fnmatchcase(name, _OF_DIFFUSERS)]:
        name = next((name for name in ours if name.endswith(".index.json")), ours[0])
        wanted = "model.safetensors.index.json" if name.endswith(".index.json") else "model.safetensors"
        return (
            f"a model of diffusers, whose weights are called {name}; name a copy of the directory in which that file "
            f"is called {wanted}"
        )
    if any(map(_is_weights, files)):
        return None
    # Shards that trainers write.
    for folder in (directory, *(folder for folder in folders if not is_trainer_state(folder.name))):
        if any(fnmatchcase(name, _SHARDS_OF_FSDP) for name in _names_in(folder)):
            return (
                f"the weights are in shards of FSDP ({folder}); `accelerate merge-weights {folder} OUT` makes "
                "safetensors of them, beside which config and tokenizer have to be copied"
            )
    if steps := _numbered(folders, "global_step"):
        return (
            f"the weights are in shards of DeepSpeed ({steps[-1].name}); `python zero_to_fp32.py . OUT "
            "--safe_serialization` in the directory makes safetensors of them, beside which config and tokenizer have "
            "to be copied"
        )
    # Subfolders that are models.
    if checkpoints := _numbered(folders, "checkpoint-"):
        count = f" (the last of {len(checkpoints)})" if len(checkpoints) > 1 else ""
        return f"a trainer's directory without a final model; name one of its checkpoints: {checkpoints[-1]}{count}"
    if with_weights:
        return f"its weights are in a folder of it; name that: {'; '.join(map(str, with_weights[:4]))}"
    return None


def _numbered(folders: Iterable[Path], start: str) -> list[Path]:
    """Return the folders that are called `start` and a number, in the order of the numbers."""
    matches = [(re.fullmatch(rf"{start}(\d+)", folder.name), folder) for folder in folders]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in matches if match)]


def _is_weights(name: str) -> bool:
    return _is(name, _WEIGHTS) and not is_trainer_state(name)


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:  # closed to this process
        return []
