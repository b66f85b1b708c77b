"""Models in other forms than plain safetensors: FP8 is dequantized, others are named before any tensor is listed."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bmjax
from bmjax.config import UserError
from bmjax.io.model_files import quantization
from bmjax.weights import student as students
from tests.conftest import write_student

LORA = {"base_model_name_or_path": "Qwen/Qwen2.5-7B", "peft_type": "LORA"}


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": json.dumps(LORA), "adapter_model.safetensors": ""},
         r"an adapter \(LoRA\) of Qwen/Qwen2.5-7B, no model of its own; merge it into"),
        ({"adapter_config.json": "{", "adapter_model.bin": ""}, "an adapter .* of a model it does not name"),
        ({"model-Q4_K_M.gguf": "GGUF", "config.json": "{}"}, r"the weights are GGUF \(model-Q4_K_M.gguf\)"),
        ({"pytorch_model.bin": "PK", "config.json": "{}"}, r"the weights are pickled \(pytorch_model.bin\)"),
        ({"consolidated.00.pth": "PK"}, r"the weights are pickled \(consolidated.00.pth\)"),
    ],
)  # fmt: skip
def test_other_forms_of_weights_are_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for opened in (lambda: students.open(tmp_path), lambda: bmjax.load(tmp_path)):
        with pytest.raises(UserError, match=message) as error:
            opened()
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4 bit"),
        ({"quant_method": "awq", "bits": 4}, "awq 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes 8 bit"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
    ],
)
def test_quantized_models_are_refused_by_their_scheme(tmp_path, settings, scheme):
    directory = write_student(tmp_path / "student")
    change_config(directory, quantization_config=settings)
    with pytest.raises(UserError, match=rf"the weights are quantized \({scheme}\), which cannot be trained"):
        students.open(directory)


def test_quantized_tensors_are_named_without_a_config(tmp_path):
    directory = write_student(tmp_path / "student")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    save_file(tensors | {f"{name}.qweight": np.zeros((2, 2), np.int32)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights are quantized \(GPTQ or AWQ\)"):
        bmjax.load(directory)
    assert quantization({}, ["a.weight", "a.weight.absmax"]) == "bitsandbytes"


def write_fp8_student(folder: Path) -> tuple[Path, Path]:
    """A student with blockwise FP8 weights, and one with the values that those stand for."""
    directory = write_student(folder / "student", hidden_size=192, intermediate_size=320, head_dim=64)
    tensors = load_file(directory / "model.safetensors")
    quantized, rng = {}, np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "proj.weight" not in name:
            quantized[name] = tensor
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = rng.uniform(1e-3, 1e-2, (rows, columns)).astype(np.float32)
        spread = scales.repeat(128, 0).repeat(128, 1)[: tensor.shape[0], : tensor.shape[1]]
        codes = (tensor / spread).astype(ml_dtypes.float8_e4m3fn)
        quantized |= {name: codes, name + "_scale_inv": scales}
        tensors[name] = (codes.astype(np.float64) * spread.astype(np.float64)).astype(np.float32)
    fp8 = write_student(folder / "fp8", hidden_size=192, intermediate_size=320, head_dim=64)
    save_file(quantized, fp8 / "model.safetensors")
    change_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    save_file(tensors, directory / "model.safetensors")
    return fp8, directory


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
def test_blockwise_fp8_is_dequantized_on_reading(tmp_path, mesh):
    fp8, directory = write_fp8_student(tmp_path)
    expected = bmjax.load(write_student(tmp_path / "plain", hidden_size=192, intermediate_size=320, head_dim=64))
    tokens = np.arange(40)[None] % 300
    model = bmjax.load(fp8, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(model.logits(tokens), bmjax.load(directory).logits(tokens), atol=1e-5)
    assert not np.allclose(model.logits(tokens), expected.logits(tokens), atol=1e-5)
    bmjax.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_allclose(bmjax.load(tmp_path / "out").logits(tokens), model.logits(tokens), atol=1e-5)
