"""Numbers of layers in a config: keys of dicts, single numbers, values of lists and counts follow a stack of layers."""

import itertools

import pytest

from tests.merge.plan_helpers import planned, tensors

ORDER = [0, 1, 2, 3, 2, 3, 4, 5]  # of the layers of a model of 6


def stack(*ranges, models=None):
    models = models or "a" * len(ranges)
    slices = [
        {"sources": [{"model": model, "layer_range": list(part)}]} for model, part in zip(models, ranges, strict=True)
    ]
    return {"merge_method": "passthrough", "slices": slices}


MOVED = stack((0, 4), (2, 6))


FOLDERS = itertools.count()


def result_of(save, recipe=MOVED, **config):
    return planned(recipe, a=save(f"a{next(FOLDERS)}", tensors(6), **{"num_hidden_layers": 6, **config}))


@pytest.mark.parametrize("nested", [False, True])
def test_a_dict_keyed_by_layers_follows_them(save, nested):
    entries = {"per_layer_config": {"2": {"head_dim": 16}, "5": {"head_dim": 8}}}
    result = result_of(save, **({"text_config": {"num_hidden_layers": 6, **entries}} if nested else entries))
    changes = result.config_changes["text_config"] if nested else result.config_changes
    assert changes["per_layer_config"] == {"2": {"head_dim": 16}, "4": {"head_dim": 16}, "7": {"head_dim": 8}}
    assert result.notes == ()


def test_keys_with_zeros_before_them_keep_their_width(save):
    entries = {f"{n:02}": {"n": n} for n in range(6)}
    changes = result_of(save, stack((0, 6), (0, 6)), per_layer_config=entries).config_changes
    assert changes["per_layer_config"] == {f"{n:02}": {"n": n % 6} for n in range(12)}


def test_a_dict_keyed_by_layers_of_two_models_takes_each_ones(save):
    models = {
        name: save(name, tensors(6, seed=i), num_hidden_layers=6, pruned_heads={"1": [i], "4": [i + 2]})
        for i, name in enumerate("ab")
    }
    result = planned(stack((0, 3), (3, 6), models="ab"), **models)
    assert result.config_changes["pruned_heads"] == {"1": [0], "4": [3]}


def test_a_dict_keyed_by_numbers_of_a_name_that_is_not_known_follows_and_is_told(save):
    result = result_of(save, overrides={"3": 1})
    assert result.config_changes["overrides"] == {"3": 1, "5": 1}
    assert "the keys of overrides are numbers that layers have" in result.notes[0]


@pytest.mark.parametrize("key", ["id2label", "token_weights", "expert_bias", "vision_overrides"])
def test_a_dict_keyed_by_other_numbers_stays(save, key):
    result = result_of(save, **{key: {"0": "a", "1": "b"}})
    assert key not in result.config_changes and not result.notes


@pytest.mark.parametrize("ranges, start, end, expected", [
    ([(0, 4), (2, 6)], 1, 5, (1, 7)), ([(0, 4), (2, 6)], 1, -1, (1, -1)), ([(0, 4), (2, 6)], 1, 3, (1, 5)),
    ([(0, 3), (4, 6)], 1, 5, (1, 4)), ([(2, 6), (0, 1)], 1, -1, (0, 3)), ([(3, 6)], 2, 4, (0, 1)),
], ids=str)  # fmt: skip
def test_a_row_of_layers_with_experts_keeps_its_first_and_last(save, ranges, start, end, expected):
    result = result_of(save, stack(*ranges), moe_layer_start_index=start, moe_layer_end_index=end)
    after = {"moe_layer_start_index": start, "moe_layer_end_index": end, **result.config_changes}
    assert (after["moe_layer_start_index"], after["moe_layer_end_index"]) == expected and not result.notes


def test_a_row_of_layers_that_is_interrupted_is_told(save):
    (note,) = result_of(save, moe_layer_start_index=3, moe_layer_end_index=5).notes
    assert "moe_layer_start_index and moe_layer_end_index name one row" in note and "now 3, 5, 6, 7" in note


def test_an_end_that_is_behind_the_last_looped_layer(save):
    changes = result_of(save, stack((1, 6)), loop_layer_index_start=2, loop_layer_index_end=4).config_changes
    assert (changes["loop_layer_index_start"], changes["loop_layer_index_end"]) == (1, 3)


@pytest.mark.parametrize("key", ["exit_layer", "skip_layer_index", "memory_layer_id"])
def test_a_single_number_of_a_layer_follows_it_or_is_told(save, key):
    assert result_of(save, **{key: 4}).config_changes[key] == 6
    (note,) = result_of(save, **{key: 3}).notes
    assert f"{key} 3 is the number of a layer, and the result has it as 3 and 5" in note
    (note,) = result_of(save, stack((0, 3)), **{key: 3}).notes
    assert f"{key} 3" in note and "does not have it" in note


@pytest.mark.parametrize("key", ["vision_layer_index", "num_layer_groups", "layer_norm_id", "layerdrop"])
def test_a_number_of_something_else_stays(save, key):
    result = result_of(save, **{key: 4})
    assert key not in result.config_changes and not result.notes


def test_a_list_of_the_layers_that_others_take_from_is_of_the_results_numbers(save):
    result = result_of(save, kv_source_layers=[0, 0, 2, 2, 4, 4])
    assert result.config_changes["kv_source_layers"] == [0, 0, 2, 2, 4, 4, 6, 6] and not result.notes
    result = result_of(save, stack((4, 6), (2, 4), (2, 4)), kv_source_layers=[0, 0, 2, 2, 2, 4])
    assert result.config_changes["kv_source_layers"] == [0, 0, 2, 2, 4, 4] and len(result.notes) == 1


def test_a_layer_that_takes_from_one_that_is_left_out_is_told(save):
    (note,) = result_of(save, stack((1, 6)), kv_source_layers=[0, 0, 2, 2, 4, 4]).notes
    assert "kv_source_layers: layer 0 (was 1 of 'a') takes from layer 0" in note


@pytest.mark.parametrize("key", ["num_blocks", "num_transformer_layers"])
def test_counts_of_layers_of_other_names(save, key):
    result = planned(MOVED, a=save("alone", tensors(6), **{key: 6}))
    assert result.config_changes == {key: 8} and not result.notes
    result = result_of(save, **{key: 6})
    assert result.config_changes == {key: 8, "num_hidden_layers": 8} and not result.notes


def test_a_count_of_another_name_goes_before_one_that_is_wrong(save):
    result = result_of(save, num_hidden_layers=32, num_blocks=6)
    assert result.config_changes == {"num_hidden_layers": 8, "num_blocks": 8} and not result.notes


def test_a_count_of_something_else_beside_that_of_layers_stays(save):
    result = planned(MOVED, a=save("a", tensors(6), num_hidden_layers=6, num_blocks=4))
    assert result.config_changes == {"num_hidden_layers": 8} and not result.notes


@pytest.mark.parametrize("config", [
    {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M"},
    {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba"],
     "mtp_layers_block_type": ["attention", "moe"]},
    {"model_type": "new", "hybrid_override_pattern": "M-M*-M"},
], ids=str)  # fmt: skip
def test_a_list_of_kinds_that_gives_the_number_of_layers(save, config):
    result = planned(MOVED, a=save("a", tensors(6), **config))
    key = next(key for key in config if key != "model_type")
    moved = [config[key][number] for number in ORDER]
    assert list(result.config_changes[key]) == moved and not result.notes


def test_a_pattern_of_kinds_that_begins_again_is_written_out(save):
    pattern = ["recurrent", "recurrent", "attention"]
    result = result_of(save, model_type="recurrent_gemma", block_types=pattern)
    assert result.config_changes["block_types"] == [pattern[number % 3] for number in ORDER] and not result.notes
    result = result_of(save, stack((0, 3), (0, 6)), model_type="recurrent_gemma", block_types=pattern)
    assert "block_types" not in result.config_changes and not result.notes


def test_a_pattern_of_kinds_that_the_config_leaves_to_its_class_is_written_out(save):
    pattern = ["recurrent", "recurrent", "attention"]
    result = result_of(save, model_type="recurrent_gemma")
    assert result.config_changes["block_types"] == [pattern[number % 3] for number in ORDER]


def test_layers_numbered_from_one(save):
    assert result_of(save, ple_layer_ids=[1, 3]).config_changes["ple_layer_ids"] == [1, 3, 5]


def test_a_whole_model_keeps_its_numbers(save):
    config = {"exit_layer": 4, "kv_source_layers": [0, 0, 2, 2, 4, 4], "per_layer_config": {"3": {}}}
    result = result_of(save, {"merge_method": "linear", "models": ["a"]}, **config)
    assert result.config_changes == {} and result.notes == ()
