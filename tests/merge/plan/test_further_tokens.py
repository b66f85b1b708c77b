"""What predicts further tokens (MTP) goes with the last layers, is no layer to count, and may be lacking."""

import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.heads import TIED
from tests.merge.plan.test_heads import stacked
from tests.merge.plan_helpers import EMBED, names, planned, soup, tensors

PARTS = {"eh_proj.weight": (4, 8), "enorm.weight": (4,), "self_attn.q_proj.weight": (4, 4),
         "embed_tokens.weight": (6, 4), "shared_head.head.weight": (6, 4)}  # fmt: skip
# As DeepSeek-V3 and GLM-4.5 number them, and as Qwen3-Next, MiMo and Ernie name them.
FORMS = {
    "numbered": [f"model.layers.4.{part}" for part in PARTS],
    "numbered twice": [f"model.layers.{i}.{part}" for i in (4, 5) for part in PARTS],
    "mtp": ["mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight"],
    "mtp_layers": ["model.mtp_layers.0.input_proj.weight"],
    "mtp_block": [
        "model.mtp_block.0.mlp.up_proj.weight",
        "model.mtp_emb_norm.0.weight",
        "model.mtp_linear_proj.0.weight",
    ],
}


def predicting(form, seed=0, vocabulary=6):
    rng = np.random.default_rng(seed + 100)
    values = tensors(seed=seed, vocabulary=vocabulary)
    for name in FORMS[form]:
        shape = next((shape for part, shape in PARTS.items() if name.endswith(part)), (4, 4))
        shape = (vocabulary, 4) if shape == (6, 4) else shape
        values[name] = rng.standard_normal(shape).astype(np.float32)
    return values


CONFIG = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "model_type": "glm4_moe", TIED: False}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", [True, False], ids=["counted", "not counted"])
def test_a_fine_tune_without_it_leaves_it_to_the_model_that_has_it(save, form, said):
    config = CONFIG if said else {"num_hidden_layers": 4}
    values = predicting(form)
    models = {"a": save("a", values, **config), "tuned": save("tuned", tensors(seed=1), **config)}
    models |= {"other": save("other", predicting(form, 2), **config)}
    for recipe in (soup("a", "tuned"), {**soup("tuned", base_model="a"), "merge_method": "task_arithmetic"}):
        result = planned(recipe, **models)
        files = {node.name: node.files() for node in result.nodes}
        assert files.keys() == values.keys() and result.config_changes == {}
        assert all(files[name] == [("a", name)] for name in FORMS[form])
        (note,) = result.notes
        assert note == "what predicts further tokens (MTP): 'tuned' has none, so that of 'a' is copied"
    result = planned(soup("a", "tuned", "other"), **models)
    files = {node.name: node.files() for node in result.nodes}
    assert all(files[name] == [("a", name), ("other", name)] for name in FORMS[form])
    merge(soup("a", "tuned", parameters={"weight": 0.5, "normalize": False}), "out")
    for name in FORMS[form]:
        np.testing.assert_array_equal(open_checkpoint("out").read(name), values[name])


@pytest.mark.parametrize("form", FORMS)
def test_it_stands_behind_the_layers_of_a_stack_and_is_the_last_models(save, form):
    models = {name: save(name, predicting(form, i), **CONFIG) for i, name in enumerate("ab")}
    slices = [{"sources": [{"model": m, "layer_range": part}]} for m, part in (("a", [0, 4]), ("b", [2, 4]))]
    result = planned({"merge_method": "passthrough", "slices": slices}, **models)
    files = {node.name: node.files() for node in result.nodes}
    moved = {name: name.replace("layers.5.", "layers.7.").replace("layers.4.", "layers.6.") for name in FORMS[form]}
    assert {moved[name]: [("b", name)] for name in FORMS[form]}.items() <= files.items()
    assert sum(name.endswith("mlp.up_proj.weight") and "mtp" not in name for name in files) == 6
    assert result.config_changes["num_hidden_layers"] == 6 and "num_nextn_predict_layers" not in result.config_changes
    assert not any("no key holds" in note for note in result.notes)
    assert files[EMBED] == [("a", EMBED)]


def test_layers_of_it_cannot_be_stacked_as_layers(save):
    a = save("a", predicting("numbered"), **CONFIG)
    slices = [{"sources": [{"model": "a", "layer_range": [0, 5]}]}]
    with pytest.raises(UserError, match=r"model\.layers has 4 layers, and what predicts further tokens, which follows"):
        planned({"merge_method": "passthrough", "slices": slices}, a=a)


@pytest.mark.parametrize("form", ["numbered", "mtp"])
def test_a_stack_that_ends_in_a_model_without_it_has_none(save, form):
    models = {"a": save("a", predicting(form), **CONFIG), "b": save("b", tensors(seed=1), **CONFIG)}
    result = planned(stacked("a", "b"), **models)
    assert set(names(result)) == set(tensors()) and result.config_changes["num_nextn_predict_layers"] == 0
    assert any("is left out: the last layers' model has none" in note for note in result.notes)
    result = planned(stacked("b", "a"), **models)
    assert len(result.nodes) == len(tensors()) + len(FORMS[form])


@pytest.mark.parametrize("form", ["numbered", "mtp"])
def test_lists_of_layers_have_entries_for_it_where_the_result_has_it(save, form):
    kinds = {"a": ["full", "full", "sliding", "full", "tail of a"], "b": ["sliding", "full", "full", "sliding"]}
    models = {
        "a": save("a", predicting(form), **CONFIG, layer_types=kinds["a"]),
        "b": save("b", tensors(seed=1), **{**CONFIG, "num_nextn_predict_layers": 0}, layer_types=kinds["b"]),
    }
    changes = planned(stacked("a", "b"), **models).config_changes
    assert changes["layer_types"] == [*kinds["a"][:2], *kinds["b"][:2]] and changes["num_nextn_predict_layers"] == 0
    result = planned(stacked("b", "a"), **models)
    assert result.config_changes["layer_types"] == [*kinds["b"][:2], *kinds["a"][:2], "tail of a"]
    assert result.config_changes["num_nextn_predict_layers"] == 1
    assert any("(MTP) is that of 'a'" in note for note in result.notes)


def test_its_rows_of_tokens_follow_the_donors(save):
    models = {"a": save("a", predicting("numbered"), **CONFIG)}
    models["wide"] = save("wide", predicting("numbered", 1, vocabulary=9), **CONFIG)
    for recipe in (soup("a", "wide"), soup("wide", base_model="a")):
        result = planned(recipe, **models)
        shapes = {node.name: node.shape for node in result.nodes}
        assert {shapes[f"model.layers.4.{part}"] for part in list(PARTS)[3:]} == {(6, 4)}


def test_layers_beyond_the_config_without_a_sign_of_it_are_layers(save):
    a = save("a", tensors(5), num_hidden_layers=4)
    slices = [{"sources": [{"model": "a", "layer_range": [3, 5]}]}]
    assert len(planned({"merge_method": "passthrough", "slices": slices}, a=a).nodes) == 2 * 2 + 3
