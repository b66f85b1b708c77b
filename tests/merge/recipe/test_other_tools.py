"""Recipes as other tools and model cards write them: what is read, what is noted, what is refused."""

import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe

SOUP = {"merge_method": "linear", "models": ["a", "b"]}
SLERP = {"merge_method": "slerp", "base_model": "a", "models": ["b"], "parameters": {"t": 0.5}}


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_types_as_torch_prints_them(key, name):
    assert read_recipe({**SOUP, key: f"torch.{name}"}).dtype == name
    steps = {"steps": [{**SOUP, "name": "mid"}, {"merge_method": "linear", "models": ["mid", "c"]}]}
    assert read_recipe({**steps, key: f"torch.{name}"}).dtype == name


def test_a_type_that_is_the_donors():
    assert read_recipe({**SOUP, "dtype": "auto"}).dtype is None
    assert read_recipe({**SOUP, "dtype": "float32", "out_dtype": "auto"}).dtype is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "is empty; expected a recipe, with `merge_method:` and `models:`"),
        ({**SOUP, "merge_method": "TIES"}, "unknown merge_method 'TIES'; did you mean 'ties'?"),
        ({"base_model": "a", "gate_mode": "hidden", "experts": []}, "'gate_mode' stands in recipes of mergekit-moe"),
        ({**SOUP, "models": [{"model": ""}]}, "model: expected text that is not empty"),
        ({"merge_method": "linear", "slices": []}, "slices: expected at least one entry"),
        ({"genome": {"models": ["a"]}}, "'genome' stands in recipes of mergekit-evolve"),
        ({**SOUP, "models": [{"model": "a", "weight": 0.5}]}, "models: 'weight' is a parameter: move it under `param"),
        ({**SLERP, "t": 0.5}, "'t' is a parameter: move it under `parameters:`"),
        ({**SOUP, "models": ["a", "a"]}, "model 'a' is listed twice; list it once"),
        ({"merge_method": "passthrough", "models": ["a", "b"]}, "passthrough needs 1 model, found 2"),
        ({**SLERP, "models": ["a"]}, "found 0 ('a', which is listed, is the base itself)"),
    ],
)
def test_what_is_meant_is_named(recipe, message):
    with pytest.raises(UserError) as error:
        read_recipe(recipe)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_keys_without_a_value_say_nothing():
    keys = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "base_model", "out_dtype", "steps")
    models = [{"model": "a", "parameters": None}, {"model": "b", "parameters": {"weight": 2}}]
    recipe = read_recipe({**SOUP, "models": models, "parameters": None, **dict.fromkeys(keys)})
    assert recipe.steps[0].arguments["weight"] == (1.0, 2.0)


@pytest.mark.parametrize("layers", [[2, None], [2], None, [1, 2, 3]])
def test_a_range_without_an_end(layers):
    source = {"model": "a", "layer_range": layers}
    with pytest.raises(UserError, match=r"layer_range: expected"):
        read_recipe({"merge_method": "passthrough", "slices": [{"sources": [source]}]})


def test_a_type_that_a_merge_does_not_write():
    with pytest.raises(UserError, match="dtype: expected 'float32', 'bfloat16', 'float16' or 'auto'"):
        read_recipe({**SOUP, "dtype": "torch.int8"})


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("model:org/a", "org/a"),
        ("https://huggingface.co/org/a", "org/a"),
        ("https://hf.co/org/a/tree/refs/pr/2/", "org/a@refs/pr/2"),
        ({"model": {"path": "org/a"}}, "org/a"),
        ({"path": "org/a"}, "org/a"),
        ({"model": {"path": "org/a", "revision": "v2"}}, "org/a@v2"),
        ({"model": {"path": "org/a", "revision": None}, "lora": None, "override_architecture": None}, "org/a"),
        ({"model": {"path": "org/a"}, "lora": {"path": "org/lora", "revision": "v3"}}, "org/a+org/lora@v3"),
    ],
)
def test_models_as_blocks_and_with_their_kind(written, name):
    whole = read_recipe({**SLERP, "base_model": written, "models": [{"model": written}, "b"]})
    (step,) = whole.steps
    assert (step.base, step.branches) == (name, ("b",))
    sources = [{"model": written, "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]
    sliced = {"merge_method": "linear", "slices": [{"sources": sources, "base_model": written}]}
    assert read_recipe(sliced).inputs == (name, "b")


def test_a_revision_beside_a_model():
    recipe = read_recipe({**SOUP, "models": [{"model": "org/a", "revision": "v2"}, "b"]})
    assert recipe.inputs == ("org/a@v2", "b") and recipe.revision("org/a@v2") == "v2"
    source = {"model": "org/a", "layer_range": [0, 2], "revision": "v2"}
    assert read_recipe({"merge_method": "passthrough", "slices": [{"sources": [source]}]}).inputs == ("org/a@v2",)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"modle": {"path": "a"}}, "a model's block: unknown key 'modle'; did you mean 'model'"),
        ({"lora": {"path": "a"}}, "expected a model's name, or a block with 'path'"),
        (["a"], "base_model: expected text, found a list"),
    ],
)
def test_blocks_that_are_no_models(written, message):
    with pytest.raises(UserError) as error:
        read_recipe({**SLERP, "base_model": written})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_scheme_of_no_bucket_is_refused_wherever_it_stands():
    for models in (["nfs4://x/y"], [{"model": "nfs4://x/y"}]):
        with pytest.raises(UserError, match="models: model: 'nfs4://x/y': no file system has the scheme 'nfs4'"):
            read_recipe({**SOUP, "models": models})


ANCHORED = """\
defaults: &defaults {density: 0.5, weight: 0.25}
models_used:
  - &math org/math
merge_method: ties
base_model: org/base
models:
  - {model: *math, parameters: *defaults}
  - model: b
    parameters: {<<: *defaults, weight: 1}
"""


def test_anchors_under_keys_of_their_own(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(ANCHORED)
    recipe = read_recipe(path)
    (step,) = recipe.steps
    assert step.branches == ("org/math", "b")
    assert (step.arguments["weight"], step.arguments["density"]) == ((0.25, 1.0), (0.5, 0.5))
    assert [note.split(": ", 1)[1] for note in recipe.notes] == [
        f"key '{key}' is read only where its anchors are named" for key in ("defaults", "models_used")
    ]


def test_anchors_in_documents_and_beside_steps(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(ANCHORED + "name: mid\n---\nmerge_method: linear\nmodels: [mid, c]\n")
    assert read_recipe(path).inputs == ("org/base", "org/math", "b", "c")
    path.write_text("all: &all [a, b]\nsteps:\n  - {merge_method: linear, models: *all}\n")
    assert read_recipe(path).inputs == ("a", "b")


def test_keys_that_are_marked_as_private():
    recipe = read_recipe({**SOUP, "x-notes": "tried on Monday", "_old": 1, ".hidden": [2]})
    assert [note.split("'")[1] for note in recipe.notes] == ["x-notes", "_old", ".hidden"]


def test_a_misspelt_key_with_an_idle_anchor_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base_modle: &base org/base\nmerge_method: linear\nmodels: [a]\n")
    with pytest.raises(UserError, match="unknown key 'base_modle'; did you mean 'base_model'"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"embed_slerp": True}, "embed_slerp has no effect"),
        ({"weight": 0.5}, "weight has no effect: it is no parameter of slerp, but of "),
        ({"density": 0.5, "int8_mask": True}, "density has no effect: it is no parameter of slerp, but of "),
    ],
)
def test_parameters_of_other_methods_are_noted(change, note):
    recipe = read_recipe({**SLERP, "parameters": {"t": 0.5, **change}})
    assert note in recipe.notes[0] and recipe.steps[0].arguments == {"t": 0.5}
    models = [{"model": "b", "parameters": change}]
    assert note in read_recipe({**SLERP, "models": models}).notes[0]
    base = [{"model": "a", "parameters": change}, "b"]
    assert any("base model 'a' have no effect" in line for line in read_recipe({**SLERP, "models": base}).notes)


def test_parameters_of_other_methods_beside_rows():
    entries = [{"model": "b", "data": "b.jsonl", "parameters": {"weight": 0.5}}]
    block = {"merge_method": "regmean", "base_model": "a", "models": entries, "parameters": {"density": 0.5}}
    recipe = read_recipe(block)
    assert ["density has no effect" in recipe.notes[0], "weight has no effect" in recipe.notes[1]] == [True, True]
    assert recipe.steps[0].calibration.start == 1.0


@pytest.mark.parametrize("name", ["weigth", "densty", "t_"])
def test_parameters_of_no_method_are_refused(name):
    with pytest.raises(UserError, match=f"unknown parameter '{name}' of slerp"):
        read_recipe({**SLERP, "parameters": {name: 0.5}})


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_weights_of_ours_have_no_effect_as_mergekit(method):
    entries = [{"model": "b", "parameters": {"weight": 0.1}}, "c", "d"]
    block = {"merge_method": method, "base_model": "a", "models": entries, "parameters": {"weight": 3}}
    assert read_recipe(block).steps[0].arguments["weight"] == (0.1, 3.0, 3.0)
    recipe = read_recipe({**block, "compat": "mergekit"})
    assert len(set(recipe.steps[0].arguments["weight"])) == 1
    assert any("weight has no effect with `compat: mergekit`" in note for note in recipe.notes)


def test_slerp_without_t_says_which_it_takes():
    for block in (SLERP, {**SLERP, "models": [{"model": "b", "parameters": {"t": 0.2}}], "parameters": {}}):
        assert read_recipe(block).notes == ()
    recipe = read_recipe({**SLERP, "parameters": {}})
    assert "slerp has no `t`: it takes 0.5" in recipe.notes[0] and recipe.steps[0].arguments["t"] == 0.5
    sources = [{"model": m, "layer_range": [0, 2]} for m in ("a", "b")]
    sliced = {"merge_method": "slerp", "base_model": "a", "slices": [{"sources": sources}]}
    assert "slerp has no `t`" in read_recipe(sliced).notes[0]
    assert read_recipe({**sliced, "parameters": {"t": [0, 1]}}).notes == ()


def test_other_layers_of_the_same_model_need_an_alias():
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]
    with pytest.raises(UserError, match=r"'a' is listed twice; .*give it a second name under 'sources'"):
        read_recipe({"merge_method": "linear", "slices": [{"sources": sources}]})
    sources[1]["model"] = "again"
    recipe = read_recipe({"merge_method": "linear", "slices": [{"sources": sources}], "sources": {"again": "a"}})
    assert recipe.steps[0].slices[0].ranges == {"a": (0, 2), "again": (2, 4)}


@pytest.mark.parametrize("spelt", ["a", "model:a", {"path": "a"}, {"model": {"path": "a"}}])
def test_models_are_spelt_alike_wherever_a_recipe_names_one(spelt):
    fusion = {"merge_method": "arcee_fusion", "base_model": "b", "models": ["c"], "parameters": {"rebase": spelt}}
    assert read_recipe(fusion).inputs == ("b", "c", "a")
    assert read_recipe({"merge_method": "linear", "models": ["x"], "sources": {"x": spelt}}).sources == {"x": "a"}


def test_a_seed_as_mergekits_command_calls_it():
    recipe = read_recipe({**SOUP, "random_seed": 0})
    assert recipe.seed == 0 and recipe.notes == ("recipe: random_seed is read as seed",)
    steps = {"steps": [{**SOUP, "name": "mid"}, {"merge_method": "linear", "models": ["mid", "c"]}]}
    for block in (SOUP, steps):
        assert read_recipe({**block, "random_seed": 7}).seed == 7
        assert read_recipe({**block, "random_seed": 7}, ["seed=8"]).seed == 8
        with pytest.raises(UserError, match="random_seed 7 and seed 8 both stand; keep seed"):
            read_recipe({**block, "random_seed": 7, "seed": 8})


@pytest.mark.parametrize(("written", "value"), [(1.0, True), (0.0, False), (1, True), (0, False), (True, True)])
def test_numbers_that_stand_for_true_and_false(written, value):
    block = {"merge_method": "ties", "base_model": "a", "models": ["b", "c"]}
    recipe = read_recipe({**block, "parameters": {"normalize": written, "int8_mask": written}})
    assert recipe.steps[0].arguments["normalize"] is value
    assert recipe.notes == ("recipe: int8_mask has no effect: masks are never kept in memory whole",)
    lines = [{"filter": "mlp", "value": written}, {"value": [written, False]}]
    of_tensors = read_recipe({**block, "parameters": {"normalize": lines}}).steps[0].at("mlp", 0.0, {})
    assert of_tensors["normalize"] is value


@pytest.mark.parametrize("written", [2, 0.5, -1, "1", "true"])
def test_other_numbers_do_not_stand_for_true_and_false(written):
    block = {"merge_method": "ties", "base_model": "a", "models": ["b", "c"]}
    with pytest.raises(UserError, match=f"normalize: expected true or false, found {written!r}"):
        read_recipe({**block, "parameters": {"normalize": written}})


@pytest.mark.parametrize("written", ["!!python/tuple [0, 3]", "!!python/tuple\n    - 0\n    - 3"])
def test_layer_ranges_that_python_wrote(tmp_path, written):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: {written}\n")
    assert read_recipe(path).steps[0].slices[0].ranges == {"a": (0, 3)}


@pytest.mark.parametrize("part", [{"model": "a", "layer_range": [0, 3]}, {"model": "a"}, {"layer_range": [0, 3]}])
def test_slices_without_sources_are_told_so(part):
    with pytest.raises(UserError, match=r"slices.0: `sources:` is missing; write `- sources: \["):
        read_recipe({"merge_method": "passthrough", "slices": [part]})


@pytest.mark.parametrize(
    "key", ["allow_negative_weights", "cuda", "allow_crimes", "trust_remote_code", "out_shard_size", "copy_tokenizer"]
)
def test_options_of_mergekits_command_are_noted(key):
    recipe = read_recipe({**SOUP, key: True})
    assert recipe.notes == (f"recipe: key '{key}' has no effect: it is an option of mergekit's command",)
