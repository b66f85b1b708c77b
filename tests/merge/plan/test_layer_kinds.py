"""Kinds of layers follow their layers when layers are stacked, also where a class decides them by position."""

import pytest

from bmjax.merge.plan.layer_kinds import KIND_LISTS, UNIFORM_FAMILIES
from tests.merge.plan_helpers import planned, tensors

ORDER = [0, 1, 2, 3, 2, 3, 6, 7, 4, 5]  # of the layers of a model of 8
BY_POSITION = {
    "gemma2": {}, "gpt_oss": {}, "gemma3_text": {}, "gemma3_text every third": {"sliding_window_pattern": 3},
    "cohere2": {"sliding_window_pattern": 4}, "qwen3_next": {"full_attention_interval": 4}, "exaone4": {}, "olmo3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 16}, "smollm3": {},
    "smollm3 every second": {"no_rope_layer_interval": 2}, "minimax": {},
}  # fmt: skip


def computed(config):
    """What transformers' own class says of every layer."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    full = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    return {key: full[key] for key in KIND_LISTS if isinstance(full.get(key), list)}


def stack(*ranges, models=("a",)):
    slices = [
        {"sources": [{"model": model, "layer_range": list(part)}]} for model, part in zip(models, ranges, strict=True)
    ]
    return {"merge_method": "passthrough", "slices": slices}


MOVED = stack((0, 4), (2, 4), (6, 8), (4, 6), models="aaaa")


@pytest.mark.parametrize("name", BY_POSITION)
def test_kinds_by_position_follow_their_layers(save, name):
    config = {"model_type": name.split()[0], "num_hidden_layers": 8, **BY_POSITION[name]}
    before = computed(config)
    assert any(len(set(kinds)) > 1 for kinds in before.values())
    result = planned(MOVED, a=save("a", tensors(8), **config))
    after = computed({**config, **result.config_changes})
    assert after == {key: [kinds[number] for number in ORDER] for key, kinds in before.items()}
    assert result.config_changes["num_hidden_layers"] == len(ORDER) and not result.notes


def test_a_config_that_its_class_refuses_is_told(save):
    a = save("a", tensors(8), model_type="gemma2", num_hidden_layers=8, hidden_size=4)
    assert any("the class of 'gemma2' refuses this config" in note for note in planned(MOVED, a=a).notes)


def test_kinds_inside_another_models_config(save):
    text = {"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window_pattern": 3}
    result = planned(MOVED, a=save("a", tensors(8), model_type="gemma3", text_config=text))
    kinds = computed(text)["layer_types"]
    assert result.config_changes["text_config"]["layer_types"] == [kinds[number] for number in ORDER]


def test_layers_of_two_models_keep_the_kinds_of_each(save):
    config = {"model_type": "gemma3_text", "num_hidden_layers": 8}
    models = {name: save(name, tensors(8), **config, sliding_window_pattern=n) for name, n in (("a", 2), ("b", 4))}
    result = planned(stack((0, 4), (2, 8), models="ab"), **models)
    of = {name: computed({**config, "sliding_window_pattern": n})["layer_types"] for name, n in (("a", 2), ("b", 4))}
    assert result.config_changes["layer_types"] == of["a"][:4] + of["b"][2:]


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "qwen2", "use_sliding_window": False,
                                    "max_window_layers": 3}, {"model_type": "gemma2"}], ids=str)  # fmt: skip
def test_nothing_is_written_where_position_gives_the_same(save, config):
    a = save("a", tensors(8), num_hidden_layers=8, **config)
    result = planned(stack((0, 4), (2, 8), models="aa"), a=a)
    assert result.config_changes.keys() - {"tie_word_embeddings"} == {"num_hidden_layers"} and not result.notes


def test_lists_that_name_layers_by_number_are_renumbered(save):
    config = {"num_hidden_layers": 8, "mlp_only_layers": [0, 3, 6], "model_type": "qwen3"}
    changes = planned(MOVED, a=save("a", tensors(8), **config)).config_changes
    assert changes["mlp_only_layers"] == [n for n, number in enumerate(ORDER) if number in (0, 3, 6)]


@pytest.mark.parametrize("ranges, expected", [([(0, 4), (1, 8)], None), ([(0, 2), (1, 8)], 4), ([(3, 8)], 0)], ids=str)
@pytest.mark.parametrize("key", ["first_k_dense_replace", "num_dense_layers"])
def test_the_count_of_first_dense_layers(save, key, ranges, expected):
    a = save("a", tensors(8), model_type="deepseek_v3", num_hidden_layers=8, **{key: 3})
    result = planned(stack(*ranges, models="a" * len(ranges)), a=a)
    if expected is None:
        assert any(f"{key} cannot say" in note for note in result.notes)
    else:
        assert result.config_changes[key] == expected and not result.notes


def test_layers_that_share_keys_by_position_are_told(save):
    a = save("a", tensors(8), model_type="gemma3n_text", num_hidden_layers=8, num_kv_shared_layers=2)
    assert any("num_kv_shared_layers 2 says by position" in note for note in planned(MOVED, a=a).notes)


def test_periods_that_do_not_fit_the_stack_are_noted(save):
    config = {
        "model_type": "jamba",
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    }
    a = save("a", tensors(8), **config)
    assert not [note for note in planned(stack((0, 4), (0, 8), models="aa"), a=a).notes if "period" in note]
    notes = planned(stack((0, 6), (4, 8), models="aa"), a=a).notes
    assert [("attn_layer_period 4" in note, "layer 4 is now 6" in note) for note in notes] == [(True, True)]


def test_a_class_that_is_not_known_is_said(save):
    a = save("a", tensors(8), model_type="new", num_hidden_layers=8, attention_pattern=4)
    (note,) = planned(MOVED, a=a).notes
    assert "attention_pattern may give layers their kind by position" in note


def test_uniform_families_have_no_kinds():
    assert not any(computed({"model_type": family}) for family in UNIFORM_FAMILIES)


@pytest.mark.parametrize("family", ["falcon_h1", "bamba", "mamba2"])
def test_numbers_that_json_lacks_are_read_as_transformers_5_writes_them(save, family):
    limit = [0.0, {"__float__": "Infinity"}]
    keys = {"time_step_limit": limit, "hidden_size": 64, "mamba_n_heads": 8, "num_heads": 8, "head_dim": 16}
    keys |= {"attn_layer_indices": [1, 6], "mamba_d_head": 16, "mamba_d_ssm": 128}
    a = save("a", tensors(8), model_type=family, num_hidden_layers=8, **keys)
    assert not [note for note in planned(MOVED, a=a).notes if "class of" in note]


def test_a_config_that_its_class_takes_of_the_model_and_not_of_the_result_is_told(save):
    kinds = {"attention_types": [[["global", "local"], 4]]}
    a = save("a", tensors(8), model_type="gpt_neo", num_layers=8, **kinds)
    assert any("takes the models' configs and refuses the result's" in note for note in planned(MOVED, a=a).notes)
    assert not planned(stack((0, 4), (4, 8), models="aa"), a=a).notes


def test_a_kind_that_its_class_gives_whatever_is_written_is_told(save):
    config = {"model_type": "gemma4_text", "num_hidden_layers": 8, "num_kv_shared_layers": 0}
    a = save("a", tensors(8), **config, layer_types=["sliding_attention", "full_attention"] * 4)
    (note,) = planned(stack((0, 4), (2, 7), models="aa"), a=a).notes
    assert "the class of 'gemma4_text' gives layer 8 another kind in layer_types" in note
