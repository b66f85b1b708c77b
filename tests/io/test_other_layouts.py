"""Directories without model.safetensors: the line says where the weights are, or what they are, and what to do."""

import pytest

from bmjax.config import UserError
from bmjax.io.model_files import check_files
from bmjax.io.safetensors import open_checkpoint

FSDP = "the weights are in shards of FSDP"
DEEPSPEED = (
    "the weights are in shards of DeepSpeed (global_step1000); `python zero_to_fp32.py . OUT --safe_serialization`"
)
DIRECTORIES = {
    "a trainer's": (
        ["checkpoint-90/model.safetensors", "checkpoint-100/model.safetensors", "training_args.bin", "config.json"],
        "a trainer's directory without a final model; name one of its checkpoints: {0}/checkpoint-100 (the last of 2)",
    ),
    "a trainer's with one checkpoint": (
        ["checkpoint-100/model-00001-of-00002.safetensors", "trainer_state.json"],
        "name one of its checkpoints: {0}/checkpoint-100",
    ),
    "fsdp": (["__0_0.distcp", ".metadata", "config.json"], FSDP + " ({0}); `accelerate merge-weights {0} OUT`"),
    "fsdp in a folder": (
        ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "rng_state_0.pth"],
        FSDP + " ({0}/pytorch_model_fsdp_0)",
    ),
    "deepspeed": (["global_step200/a.pt", "global_step1000/a.pt", "latest", "rng_state_0.pth"], DEEPSPEED),
    "sentence-transformers": (
        ["0_Transformer/model.safetensors", "1_Pooling/config.json", "modules.json"],
        "its weights are in a folder of it; name that: {0}/0_Transformer",
    ),
    "a pipeline": (
        ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/x.safetensors", "scheduler/a.json"],
        "a pipeline of diffusers, whose parts are models of their own; name one of them: {0}/unet; {0}/vae",
    ),
    "a pipeline beside its weights in one file": (
        ["model_index.json", "unet/x.safetensors", "v1-5.safetensors"],
        "a pipeline of diffusers, whose parts are models of their own; name one of them: {0}/unet",
    ),
    "a unet": (
        ["diffusion_pytorch_model.safetensors", "config.json"],
        "whose weights are called diffusion_pytorch_model.safetensors; name a copy of the directory in which that file "
        "is called model.safetensors",
    ),
    "a transformer in shards": (
        ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
        "that file is called model.safetensors.index.json",
    ),
    "pickles beside checkpoints": (
        ["pytorch_model.bin", "checkpoint-1/model.safetensors"],
        "pickle weights are refused",
    ),
    "a trainer's state alone": (["training_args.bin", "optimizer.pt", "config.json"], "no weights, expected model."),
    "nothing": (["config.json", "logs/x.txt"], "no weights, expected model.safetensors or"),
    "a shard without an index": (["model-00001-of-00002.safetensors"], "but neither model.safetensors nor"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_is_there_and_what_to_do(tmp_path, name):
    files, message = DIRECTORIES[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    expected = f"{tmp_path}: "
    with pytest.raises(UserError) as error:
        check_files(tmp_path)
        open_checkpoint(tmp_path)
    assert str(error.value).startswith(expected) and message.format(tmp_path) in str(error.value)
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path)
    assert message.format(tmp_path) in str(error.value)


def test_what_has_its_weights_is_read_whatever_lies_beside_them(tmp_path):
    for file in ("model.safetensors", "checkpoint-1/model.safetensors", "global_step1/a.pt", "training_args.bin"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    check_files(tmp_path)
    with pytest.raises(UserError, match="too short for a safetensors file"):
        open_checkpoint(tmp_path)
