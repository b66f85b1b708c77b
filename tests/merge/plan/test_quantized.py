"""Quantized inputs: FP8 in blocks is dequantized as it is read, copies stay, all else is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import EMBED, soup

BF16, F8, POWERS = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SHAPES = {"model.layers.0.mlp.up_proj.weight": (200, 160), "model.layers.1.mlp.up_proj.weight": (200, 160)}


def plain(seed=0):
    rng = np.random.default_rng(seed)
    rows = {EMBED: (6, 160), **SHAPES, "model.norm.weight": (160,)}
    return {name: rng.standard_normal(shape).astype(BF16) for name, shape in rows.items()}


def quantized(values, block=(128, 128), scale_dtype=np.float32):
    """The same with matrices of the layers in FP8, and what they stand for in float32."""
    stored, meant = {}, {}
    for name, value in values.items():
        meant[name] = value.astype(np.float32)
        if name not in SHAPES:
            stored[name] = value
            continue
        grid = [-(-size // width) for size, width in zip(value.shape, block, strict=True)]
        scales = (2.0 ** np.random.default_rng(len(name)).integers(-6, -3, grid)).astype(scale_dtype)
        wide = np.kron(scales.astype(np.float32), np.ones(block, np.float32))[: value.shape[0], : value.shape[1]]
        stored[name] = (value.astype(np.float32) / wide).astype(F8)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = stored[name].astype(np.float32) * wide
    return stored, meant


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("donor", ["fp8", "plain"])
def test_fp8_in_blocks_is_dequantized(save, tmp_path, method, donor):
    stored, meant = quantized(plain())
    other = plain(1)
    save("fp8", stored, quantization_config=FP8), save("plain", other)
    branch = "plain" if donor == "fp8" else "fp8"
    recipe = {
        "merge_method": method,
        "base_model": donor,
        "models": ["fp8", "plain"] if method == "linear" else [branch],
    }
    lines = []
    merge(recipe, "out", log=lines.append)
    merged = load_file("out/model.safetensors")
    assert merged.keys() == other.keys() and {value.dtype for value in merged.values()} == {np.dtype(BF16)}
    for name in other:
        a, b = meant[name].astype(np.float64), other[name].astype(np.float64)
        expected = (a + b) / 2 if method == "linear" else a if branch == "fp8" else b
        np.testing.assert_allclose(merged[name].astype(np.float64), expected, rtol=2**-8, atol=1e-6, err_msg=name)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert any("model 'fp8' is quantized (fp8 blockwise): it is dequantized as it is read" in line for line in lines)


@pytest.mark.parametrize(("block", "kind"), [((64, 32), np.float32), ((128, 128), BF16), ((128, 128), POWERS)])
def test_other_blocks_and_types_of_scales(save, block, kind):
    stored, meant = quantized(plain(), block, kind)
    save("a", stored, quantization_config={**FP8, "weight_block_size": list(block)})
    merge({**soup("a"), "dtype": "float32"}, "out")
    merged = load_file("out/model.safetensors")
    for name in SHAPES:
        np.testing.assert_array_equal(merged[name], meant[name])


def test_fp8_in_chunks(save, monkeypatch):
    from bmjax.merge.engine import chunks

    monkeypatch.setattr(chunks, "CHUNK", 1000)
    test_other_blocks_and_types_of_scales(save, (64, 32), np.float32)


def test_a_stack_of_quantized_layers_is_copied(save, tmp_path):
    stored, _ = quantized(plain())
    save("a", stored, quantization_config=FP8, num_hidden_layers=2)
    parts = [{"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "a", "layer_range": [1, 2]}]}]
    merge({"merge_method": "passthrough", "slices": parts}, "out")
    merged = open_checkpoint("out")
    for suffix in ("", "_scale_inv"):
        copy = merged.read(f"model.layers.2.mlp.up_proj.weight{suffix}")
        np.testing.assert_array_equal(
            copy.view(np.uint8), stored[f"model.layers.1.mlp.up_proj.weight{suffix}"].view(np.uint8)
        )
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == FP8


def test_a_stack_of_fp8_and_plain_layers_is_dequantized(save, tmp_path):
    stored, meant = quantized(plain())
    save("a", stored, quantization_config=FP8, num_hidden_layers=2), save("b", plain(1), num_hidden_layers=2)
    parts = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in "ab"]
    merge({"merge_method": "passthrough", "slices": parts}, "out")
    merged = load_file("out/model.safetensors")
    assert not any("scale_inv" in name for name in merged)
    np.testing.assert_allclose(
        merged["model.layers.0.mlp.up_proj.weight"].astype(np.float32),
        meant["model.layers.0.mlp.up_proj.weight"], rtol=2**-8,
    )  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


UP = "model.layers.0.mlp.up_proj"
BY_SHAPE = {"tensor": (), "tensor, one": (1,), "tensor, a matrix": (1, 1), "rows": (200,), "rows, a column": (200, 1)}
METHODS = {
    "no config": {}, "fbgemm": {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
}  # fmt: skip


@pytest.mark.parametrize("shape", BY_SHAPE)
@pytest.mark.parametrize("method", METHODS)
def test_fp8_with_a_scale_for_all_or_a_row_is_multiplied(save, tmp_path, shape, method):
    rng, values = np.random.default_rng(3), plain()
    scales = rng.uniform(0.01, 0.02, BY_SHAPE[shape]).astype(np.float32)
    weight = rng.standard_normal((200, 160)).astype(F8)
    values |= {f"{UP}.weight": weight, f"{UP}.weight_scale": scales, f"{UP}.input_scale": np.ones(1, np.float32)}
    folder = save("a", values, **METHODS[method]).directory
    (folder / "hf_quant_config.json").write_text("{}")
    lines = []
    merge({**soup("a"), "dtype": "float32"}, "out", log=lines.append)
    merged = load_file("out/model.safetensors")
    np.testing.assert_array_equal(merged[f"{UP}.weight"], weight.astype(np.float32) * scales.reshape(-1, 1))
    assert merged.keys() == plain().keys()
    assert any("input_scale) of activations are left out" in line for line in lines)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out/hf_quant_config.json").exists()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("path", [("text_config",), ("thinker_config", "text_config")])
@pytest.mark.parametrize("at_top", [False, True])
def test_what_a_config_says_inside_of_a_model_goes_too(save, tmp_path, key, path, at_top):
    """The settings of a language model inside another one: its blocks count, and no loader is told of them after."""
    stored, meant = quantized(plain(), (64, 32))
    settings = {key: {**FP8, "weight_block_size": [64, 32]}}
    block = {"hidden_size": 160, **settings}
    for part in reversed(path):
        block = {part: block}
    save("a", stored, **block, **(settings if at_top else {}), vision_config={"depth": 1})
    merge({**soup("a"), "dtype": "float32"}, "out")
    np.testing.assert_array_equal(load_file("out/model.safetensors")[f"{UP}.weight"], meant[f"{UP}.weight"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"] == {"depth": 1} and key not in config
    for part in path:
        config = config[part]
    assert config == {"hidden_size": 160}


@pytest.mark.parametrize("shape", BY_SHAPE)
@pytest.mark.parametrize("activations", ["activation_scale", "input_scale_inv", "kv_scale"])
def test_scales_called_inverse_without_blocks_are_for_all_or_a_row(save, shape, activations):
    """As Ministral 3 and Devstral 2 are saved: weight_block_size null, a static scale of activations beside."""
    rng, values = np.random.default_rng(5), plain()
    scales = rng.uniform(0.01, 0.02, BY_SHAPE[shape]).astype(BF16)
    weight = rng.standard_normal((200, 160)).astype(F8)
    values |= {f"{UP}.weight": weight, f"{UP}.weight_scale_inv": scales, f"{UP}.{activations}": np.ones((), BF16)}
    save("a", values, quantization_config={**FP8, "activation_scheme": "static", "weight_block_size": None})
    merge({**soup("a"), "dtype": "float32"}, "out")
    merged = load_file("out/model.safetensors")
    expected = weight.astype(np.float32) * scales.astype(np.float32).reshape(-1, 1)
    np.testing.assert_array_equal(merged[f"{UP}.weight"], expected)
    assert merged.keys() == plain().keys()


def test_one_scale_is_for_all_whatever_the_blocks(save):
    """A scale of shape [] fits no grid of blocks, so it cannot mean one of them."""
    values = {**plain(), f"{UP}.weight": np.ones((200, 160), F8), f"{UP}.weight_scale_inv": np.array(0.5, np.float32)}
    save("a", values, quantization_config=FP8)
    merge({**soup("a"), "dtype": "float32"}, "out")
    assert (load_file("out/model.safetensors")[f"{UP}.weight"] == 0.5).all()


def test_scales_of_groups_are_not_guessed(save):
    values = {**plain(), f"{UP}.weight": np.ones((200, 160), F8), f"{UP}.weight_scale": np.ones((200, 5), np.float32)}
    save("a", values)
    with pytest.raises(UserError, match=r"up_proj.weight_scale is \[200, 5\], expected \[1\] or \[200, 1\]"):
        merge(soup("a"), "out")


WITHOUT = f"F8_E4M3 without scales, but {UP}.weight is F8_E4M3 [200, 160] without scales"
SCHEMES = {
    "gptq": ({f"{UP}.qweight": np.ones((20, 200), np.int32)}, {"quant_method": "gptq", "bits": 4}, "gptq 4 bit"),
    "awq": ({f"{UP}.qweight": np.ones((20, 200), np.int32)}, {"quant_method": "awq", "bits": 4}, "awq 4 bit"),
    "bitsandbytes": ({f"{UP}.weight": np.ones((200, 160), np.uint8), f"{UP}.weight.absmax": np.ones(9, np.float32)},
                     {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit"),
    "fp8 by a method not known": (
        {f"{UP}.weight": np.ones((200, 160), F8), f"{UP}.weight_scale": np.ones(1, np.float32)},
        {"quant_method": "quark"}, "quark"),
    "int8": ({f"{UP}.weight": np.ones((200, 160), np.int8), f"{UP}.weight_scale": np.ones((200, 1), BF16)}, None,
             "I8 weights"),
    "nvfp4": ({f"{UP}.weight": np.ones((200, 80), np.uint8), f"{UP}.weight_scale": np.ones((200, 10), F8),
               f"{UP}.weight_scale_2": np.ones((), np.float32)}, None, "NVFP4"),
    "mxfp4": ({"model.layers.0.mlp.experts.up_proj_blocks": np.ones((2, 200, 5, 16), np.uint8),
               "model.layers.0.mlp.experts.up_proj_scales": np.ones((2, 200, 5), np.uint8)}, None, "MXFP4"),
    "compressed-tensors": ({f"{UP}.weight_packed": np.ones((200, 20), np.int32)},
                           {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "mlx": ({f"{UP}.weight": np.ones((200, 20), np.uint32), f"{UP}.scales": np.ones((200, 4), BF16)},
            None, "mlx 4 bit"),
    "without a word": ({f"{UP}.weight": np.ones((200, 160), F8)}, None, WITHOUT),
    "whole numbers": ({f"{UP}.weight": np.ones((200, 160), np.int8)}, None, "I8 weights"),
    "in config.json alone": ({}, {"quant_method": "gptq", "bits": 4}, "gptq 4 bit"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("other", ["same", "plain"])
def test_other_schemes_are_refused_by_name(save, name, other):
    tensors, settings, scheme = SCHEMES[name]
    values = {key: value for key, value in plain().items() if not tensors or not key.startswith(UP)} | tensors
    config = {} if settings is None else {"quantization_config": settings}
    if name == "mlx":
        config["quantization"] = {"group_size": 64, "bits": 4}
    (
        save("a", values, **config),
        save("b", values if other == "same" else plain(), **(config if other == "same" else {})),
    )
    for models in (["a", "b"], ["b", "a"]):
        for do in (lambda recipe: list(check(recipe, "out")), lambda recipe: merge(recipe, "out")):
            with pytest.raises(UserError) as error:
                do(read_recipe(soup(*models)))
            assert f"are quantized ({scheme})" in str(error.value) and "\n" not in str(error.value)
    copied = merge({"merge_method": "passthrough", "models": ["a"]}, "out", overwrite=True)
    assert copied["checksums"].keys() == values.keys()
    with pytest.raises(UserError, match="are quantized"):
        merge({"merge_method": "passthrough", "models": ["a"], "parameters": {"scale": 0.5}}, "out", overwrite=True)


def test_scales_that_do_not_fit(save):
    stored, _ = quantized(plain())
    stored[f"{UP}.weight_scale_inv"] = np.ones((1, 2), np.float32)
    save("a", stored, quantization_config=FP8)
    with pytest.raises(UserError, match=r"model 'a': .*up_proj.weight_scale_inv is \[1, 2\], expected \[2, 2\]"):
        merge(soup("a"), "out")


def test_what_is_neither_fp8_nor_its_scale_is_named(save):
    stored, _ = quantized(plain())
    stored["model.layers.0.mlp.other"] = np.ones((2, 2), POWERS)
    save("a", stored, quantization_config=FP8)
    with pytest.raises(UserError, match=r"\(fp8 blockwise, but model.layers.0.mlp.other is F8_E8M0 \[2, 2\], which is"):
        merge(soup("a"), "out")


def test_masks_and_positions_are_no_quantized_weights(save):
    values = {**plain(), "model.rotary.positions": np.arange(8), "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}
    save("a", values), save("b", values)
    assert merge(soup("a", "b"), "out")["checksums"].keys() == values.keys()


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3FNUZ"])
def test_opaque_types_are_copied(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shape, bits = [4, 16], {"F4": 4, "F6_E2M3": 6}.get(kind, 8)
    data = np.random.default_rng(0).integers(0, 256, 64 * bits // 8).astype(np.uint8).tobytes()
    norm = np.ones(16, np.float32).tobytes()
    size = len(data)
    entries = {
        "w": {"dtype": kind, "shape": shape, "data_offsets": [0, size]},
        "model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [size, size + 64]},
    }
    header = json.dumps(entries).encode()
    (tmp_path / "a").mkdir()
    content = len(header).to_bytes(8, "little") + header + data + norm
    (tmp_path / "a/model.safetensors").write_bytes(content)
    (tmp_path / "a/config.json").write_text("{}")
    assert any(
        "read a: 2 tensors" in line
        for line in check(read_recipe({"merge_method": "passthrough", "models": ["a"]}), "out")
    )
    merge({"merge_method": "passthrough", "models": ["a"]}, "out")
    info = open_checkpoint("out").tensors["w"]
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    assert (info.dtype, list(info.shape)) == (kind, shape) and raw[info.start : info.start + info.nbytes] == data
    if kind in ("F8_E8M0", "F4"):
        with safe_open("out/model.safetensors", "np") as file:
            assert set(file.keys()) == {"w", "model.norm.weight"}
