"""Names of modules in quantization settings follow their layers, wherever the settings have them."""

import json

import ml_dtypes
import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.merge.plan.quantized_names import follow_names
from tests.merge.plan_helpers import planned, tensors
from tests.merge.reference import SMALL, hf_dir, hf_tensors

LAYERS = [("a", number) for number in (2, 3, 0, 2)]  # of a model of 4
MOVED = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": part}]}
                                                   for part in ([2, 4], [0, 1], [2, 3])]}  # fmt: skip
NAMES = {
    "model.layers.2.mlp.up_proj": ["model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"],
    "model.layers.1.mlp.up_proj": [],
    "transformer.h.3": ["transformer.h.1"],
    "model.layers.0.mlp.experts.2.w1": ["model.layers.2.mlp.experts.2.w1"],
    "*.layers.3.*": ["*.layers.1.*"],
    "model.layers.0*": ["model.layers.2.*"],
    r"re:.*layers\.3\..*": [r"re:.*layers\.1\..*"],
    r"-:model\.layers\.0\.mlp\.(up|down)_proj": [r"-:model\.layers\.2\.mlp\.(up|down)_proj"],
    "re:model.layers.3.mlp.*": ["re:model.layers.1.mlp.*"],
    "model.layers.4.eh_proj": ["model.layers.4.eh_proj"],  # behind the last layer, as before
}
OTHERS = [
    "lm_head", "Linear", "visual.blocks.2.w", "mtp.layers.0.x", r"re:.*layers\.\d+\.mlp.*", "re:.*layers.[0-9]+.x",
    "re:.*layers.*q_proj", "model.layers.*.self_attn", "mlp.experts.3.w1", "re:.*experts.3.*",
]  # fmt: skip
UNCLEAR = [
    r"re:.*layers\.(0|3)\..*", r"re:.*layers\.[0-1]\..*", r"re:(?!.*layers\.0\.).*mlp.*",
    r"re:lm_head|.*layers\.0\..*", "re:.*layers.1.*", r"+:.*layers\.\d\..*", "model.layers.[02].mlp",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["list", "keys", "nested"])
def test_a_name_of_a_layer_follows_it(name, form):
    settings, expected = {
        "list": ({"ignore": ["lm_head", name]}, {"ignore": ["lm_head", *NAMES[name]]}),
        "keys": ({name: {"bits": 8}, "bits": 4}, {**{new: {"bits": 8} for new in NAMES[name]}, "bits": 4}),
        "nested": ({"config_groups": {"g": {"targets": [name]}}}, {"config_groups": {"g": {"targets": NAMES[name]}}}),
    }[form]
    assert follow_names(settings, LAYERS, 4, "x") == (expected, [])


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_things_and_of_all_layers_stay(name):
    settings = {"ignore": [name], "dynamic": {name: {"bits": 8}}}
    assert follow_names(settings, LAYERS, 4, "x") == (settings, [])


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_pattern_that_cannot_be_renamed_stays_and_is_told(name):
    moved, (note,) = follow_names({"ignore": [name]}, LAYERS, 4, "config.json: quantization_config")
    assert moved == {"ignore": [name]}
    assert note.startswith(f"config.json: quantization_config.ignore: '{name}' names layers by number")


def test_a_glob_of_the_first_digit_names_all_layers_that_begin_so():
    layers = [("a", number) for number in (9, 10, 1, 11)]
    assert follow_names(["layers.1*"], layers, 12, "x") == (["layers.1.*", "layers.2.*", "layers.3.*"], [])


@pytest.mark.parametrize("key", ["extra_config", "dynamic", "quantized_layers", "layer_quant_config"])
def test_settings_by_name_in_config_json(save, key):
    settings = {"quant_method": "auto-round", "bits": 4, key: {"model.layers.3.mlp": {"bits": 8}}}
    a = save("a", tensors(), num_hidden_layers=4, quantization_config=settings)
    result = planned(MOVED, a=a)
    assert result.config_changes["quantization_config"][key] == {"model.layers.1.mlp": {"bits": 8}} and not result.notes


def test_a_pattern_without_end_is_told_in_a_moment():
    for name in ("(" * 20_000, "layers." * 5_000, "(" * 4_000 + "layers.1" + ")" * 4_000):
        moved, notes = follow_names([name], LAYERS, 4, "x")
        assert moved == [name] and len(notes) == 1


def test_a_model_that_is_dequantized_has_no_settings_to_follow(save):
    block = {"quant_method": "fp8", "weight_block_size": [2, 2], "ignore": [r"re:.*layers\.(0|3)\..*"]}
    values = tensors() | {
        "model.layers.0.mlp.up_proj.weight": np.ones((8, 4), ml_dtypes.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": np.ones((4, 2), np.float32),
    }
    a = save("a", values, num_hidden_layers=4, quantization_config=block)
    recipe = {**MOVED, "merge_method": "linear"}
    result = planned(recipe, a=a)
    assert result.config_changes["quantization_config"] is None and not any("names layers" in n for n in result.notes)


def test_settings_beside_config_json_follow_the_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_dir(tmp_path / "a", hf_tensors(SMALL, 0), num_hidden_layers=3)
    settings = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.2*"]}}
    (tmp_path / "a" / "hf_quant_config.json").write_text(json.dumps(settings))
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [n, 3]}]} for n in (1, 2)],
    }
    merge(recipe, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    expected = ["lm_head", "model.layers.1.*", "model.layers.2.*"]
    assert written == {"quantization": {"quant_algo": "NVFP4", "exclude_modules": expected}}
    assert json.loads((tmp_path / "a" / "hf_quant_config.json").read_text()) == settings
