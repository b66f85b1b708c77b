"""Types of what is written: what the donor keeps wider, the config's spellings, hollow tensors."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.model.config import read_hf_config
from tests.merge.plan_helpers import EMBED, HEAD, planned, soup, tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
WIDE = {BIAS: np.linspace(6.82, 7.06, 8, dtype=np.float32), "model.layers.1.mixer.A_log": np.ones(3, np.float32)}


def with_wide(seed, dtype=BF16):
    return {**tensors(dtype=dtype, seed=seed), **{name: value + seed for name, value in WIDE.items()}}


@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_what_the_donor_keeps_wider_than_its_weights_stays_as_stored(save, asked):
    save("a", with_wide(0), torch_dtype="bfloat16")
    save("b", with_wide(1), torch_dtype="bfloat16")
    notes = []
    merge(soup("a", "b", dtype=asked), "out", log=notes.append)
    written = open_checkpoint("out")
    for name, value in WIDE.items():
        np.testing.assert_allclose(written.read(name), value + np.float32(0.5), rtol=1e-6)
    assert {info.numpy_dtype.name for name, info in written.tensors.items() if name not in WIDE} == {asked}
    assert any("2 tensors" in note and BIAS in note and "wider than its bfloat16 weights" in note for note in notes)
    assert read_hf_config("out")["torch_dtype"] == asked


def test_the_type_of_weights_that_are_computed_as_they_are_read_is_the_stored_one(save, tmp_path):
    save("a", with_wide(0))
    wide = np.ones((2, 4), np.float32), np.ones((8, 2), np.float32)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    modules = [name.removesuffix(".weight") for name in tensors() if "up_proj" in name]
    factors = {f"{m}.lora_{part}.weight": value for m in modules for part, value in zip("AB", wide, strict=True)}
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    merge(soup("a+lora", dtype="float16"), "out")
    types = {name: info.numpy_dtype.name for name, info in open_checkpoint("out").tensors.items()}
    assert {name for name, kind in types.items() if kind == "float32"} == WIDE.keys()


def test_weights_of_one_wide_type_are_rounded_as_asked(save):
    result = planned(soup("a", dtype="bfloat16"), a=save("a", with_wide(0, np.float32)))
    assert {node.dtype.name for node in result.nodes} == {"bfloat16"} and not result.notes
    result = planned(soup("b", dtype="float32"), b=save("b", with_wide(0)))
    assert {node.dtype.name for node in result.nodes} == {"float32"} and not result.notes


@pytest.mark.parametrize("config, expected", [
    ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
    ({}, {"dtype": "bfloat16"}),
    ({"dtype": "bfloat16", "text_config": {"torch_dtype": "float32", "n": 1}, "vision_config": {"dtype": "float32"}},
     {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}, "vision_config": {"dtype": "bfloat16"}}),
], ids=str)  # fmt: skip
def test_every_spelling_of_the_type_is_the_written_one(save, config, expected):
    save("a", tensors(), **config)
    merge(soup("a", dtype="bfloat16"), "out")
    assert read_hf_config("out") == {"model_type": "llama", **expected}


@pytest.mark.parametrize("shape", [(0,), (0, 4)], ids=str)
@pytest.mark.parametrize("name", [EMBED, HEAD, "model.layers.2.mlp.up_proj.weight"])
@pytest.mark.parametrize("hollow", [("a",), ("b",), ("a", "b")], ids=str)
def test_hollow_tensors_are_refused(save, shape, name, hollow):
    models = {
        model: save(model, {**tensors(seed=i), **({name: np.zeros(shape, np.float32)} if model in hollow else {})})
        for i, model in enumerate("ab")
    }
    with pytest.raises(UserError, match=rf"model '{hollow[0]}': tensor '{name}' .*without gathering its shards"):
        planned(soup("a", "b"), **models)


def test_empty_tensors_of_whole_numbers_are_copied(save):
    a = save("a", {**tensors(), "tokens": np.zeros((0, 4), np.int64)})
    assert (0, 4) in {node.shape for node in planned(soup("a"), a=a).nodes}


MASK = "h.0.attn.bias"


@pytest.mark.parametrize("donor", [np.uint8, np.bool_])
@pytest.mark.parametrize("other", [np.uint8, np.bool_])
def test_masks_of_another_type_are_the_same_masks(save, donor, other):
    mask = np.tril(np.ones((1, 1, 4, 4), np.uint8))
    save("a", {**tensors(), MASK: mask.astype(donor)}), save("b", {**tensors(seed=1), MASK: mask.astype(other)})
    merge(soup("a", "b"), "out")
    written = open_checkpoint("out").read(MASK)
    assert written.dtype == donor and np.array_equal(written, mask)
    save("c", {**tensors(seed=1), MASK: (1 - mask).astype(other)})
    with pytest.raises(UserError, match=rf"tensor '{MASK}' .* differs between models"):
        merge(soup("a", "c"), "out", overwrite=True)
