import numpy as np
import pytest

from tests.merge.plan_helpers import planned, soup, tensors


def test_the_text_model_inside_a_config(save):
    inner = {"num_hidden_layers": 4, "tie_word_embeddings": True, "layer_types": ["a", "b", "c", "d"]}
    tied = save("tied", tensors(head=False), text_config=inner)
    untied = save("untied", tensors(seed=1))
    sources = [{"model": m, "layer_range": [1, 3]} for m in ("tied", "untied")]
    result = planned({"merge_method": "linear", "slices": [{"sources": sources}]}, tied=tied, untied=untied)
    assert result.config_changes == {
        "text_config": {"num_hidden_layers": 2, "tie_word_embeddings": False, "layer_types": ["b", "c"]}
    }


V4 = {"rope_theta": 1e6, "rope_scaling": None}
V5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
YARN = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (V4, V5, None),
        ({"text_config": V4}, {"text_config": V5}, None),
        (YARN, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, None),
        (V4, {"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters, rope_scaling, rope_theta"),
        (V4, YARN, "rope_scaling, rope_theta"),
    ],
)  # fmt: skip
def test_rope_in_two_spellings_is_compared_by_what_it_says(save, first, second, told):
    result = planned(soup("a", "b"), a=save("a", tensors(), **first), b=save("b", tensors(seed=1), **second))
    note = f"config.json of 'b' differs from 'a' in {told}; it is not used"
    assert result.notes == (() if told is None else (note,))


def test_a_vocabulary_size_that_the_donors_embedding_never_had_is_told(save):
    result = planned(soup("a"), a=save("a", tensors(), vocab_size=9))
    assert result.config_changes == {} and "says vocab_size 9, its embedding has 6 rows" in result.notes[0]


PER_LAYER = {
    "block_configs": ([{"n": n} for n in range(4)], [{"n": 2}, {"n": 3}, {"n": 0}]),
    "num_kv_heads": ([1, 2, 3, 4], [3, 4, 1]), "ffn_multipliers": ([0.5, 1, 2, 4], [2, 4, 0.5]),
    "intermediate_size": ([8, 16, 24, 32], [24, 32, 8]), "activation_sparsity_pattern": ([0.9, 0.8, 0, 0], [0, 0, 0.9]),
    "hybrid_override_pattern": ("M-*E", "*EM"), "attn_type_list": ([0, 0, 0, 1], [0, 1, 0]),
    "linear_attn_config": (
        {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "head_dim": 8, "short_conv_kernel_size": 4},
        {"kda_layers": [1, 3], "full_attn_layers": [2], "head_dim": 8, "short_conv_kernel_size": 4},
    ),
    "mixer": ({"layers": [0, 2], "attn_layers": [1, 3]}, {"layers": [0, 2], "attn_layers": [1]}),
    "hybrid_layer_ids": ([0, 3], [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("key", PER_LAYER)
def test_what_a_config_says_of_every_layer_follows_the_layers(save, key):
    before, after = PER_LAYER[key]
    a = save("a", tensors(), num_hidden_layers=4, **{key: before})
    slices = [{"sources": [{"model": "a", "layer_range": part}]} for part in ([2, 4], [0, 1])]
    result = planned({"merge_method": "passthrough", "slices": slices}, a=a)
    assert result.config_changes == {"num_hidden_layers": 3, key: after} and result.notes == ()


MOVED = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": part}]}
                                                   for part in ([2, 4], [0, 1])]}  # fmt: skip
UNTOUCHED = {
    "vision_feature_layer": [1, 3], "mm_vision_select_layers": [0, 1, 2, 3], "eos_token_id": [1, 2, 3, 4],
    "rope_scaling": {"long_factor": [1.0, 1.1, 1.2, 1.3]}, "vision_config": {"layers": [0, 3]},
    "audio_config": {"layer_types": ["a", "b", "c", "d"]}, "languages": ["a", "b", "c", "d"], "block_sizes": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("key", UNTOUCHED)
def test_lists_of_other_things_than_layers_stay(save, key):
    a = save("a", tensors(), num_hidden_layers=4, **{key: UNTOUCHED[key]})
    result = planned(MOVED, a=a)
    assert result.config_changes == {"num_hidden_layers": 3} and result.notes == ()


@pytest.mark.parametrize("nested", [False, True])
def test_a_list_as_long_as_the_layers_follows_them_and_is_told(save, nested):
    limits = {"swiglu_limits": [1.0, 2.0, 3.0, 4.0]}
    a = save("a", tensors(), num_hidden_layers=4, **({"moe": limits} if nested else limits))
    result = planned(MOVED, a=a)
    changes = result.config_changes["moe"] if nested else result.config_changes
    assert changes["swiglu_limits"] == [3.0, 4.0, 1.0]
    (note,) = result.notes
    assert f"{'moe.' * nested}swiglu_limits has as many entries as there were layers" in note


def test_a_nested_list_that_another_model_lacks_is_told(save):
    models = {"a": save("a", tensors(), num_hidden_layers=4, mixer={"layer_kinds": [0, 0, 1, 1]})}
    models["b"] = save("b", tensors(seed=1), num_hidden_layers=4)
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in "ab"]
    notes = planned({"merge_method": "passthrough", "slices": slices}, **models).notes
    assert any("mixer.layer_kinds has an entry for every layer, and not every model has it" in note for note in notes)


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert", "ignore"])
def test_modules_that_are_not_quantized_follow_their_layers(save, key):
    others = ["lm_head", "re:.*layers.*x", "visual.blocks.3.w"]
    settings = {"quant_method": "fp8", "bits": 8}
    listed = {**settings, key: ["model.layers.3.mlp.up_proj", *others, "model.layers.0.self_attn"]}
    result = planned(MOVED, a=save("a", tensors(), num_hidden_layers=4, quantization_config=listed))
    moved = [*others, "model.layers.1.mlp.up_proj", "model.layers.2.self_attn"]
    assert result.config_changes["quantization_config"] == {**settings, key: moved}


def test_a_list_that_goes_on_to_the_layers_for_further_tokens(save):
    values = tensors() | {"model.layers.4.eh_proj.weight": np.ones((4, 8), np.float32)}
    a = save("a", values, num_hidden_layers=4, num_nextn_predict_layers=1, layer_types=["x", "y", "z", "w", "m"])
    result = planned(MOVED, a=a)
    assert result.config_changes == {"num_hidden_layers": 3, "layer_types": ["z", "w", "x", "m"]} and not result.notes


def test_differing_configs_are_told(save):
    a, b = save("a", tensors(), rope_theta=1.0, vocab_size=6), save("b", tensors(), rope_theta=2.0, vocab_size=7)
    assert planned(soup("a", "b"), a=a, b=b).notes == (
        "config.json of 'b' differs from 'a' in rope_theta; it is not used",
    )
