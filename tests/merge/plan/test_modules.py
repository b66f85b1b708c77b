"""Models of several modules, and tensors that are left to the donor: slices, `modules:` and `keep:`."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan.test_prefixes import LLAVA_NEW, LLAVA_OLD, NEW, renamed, vision_model
from tests.merge.plan_helpers import names, planned, soup, tensors

CONFIG = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 1}}
FRANKEN = [{"sources": [{"model": "a", "layer_range": [0, 3]}]}, {"sources": [{"model": "b", "layer_range": [1, 4]}]}]


@pytest.mark.parametrize("form", [(), NEW, LLAVA_OLD, LLAVA_NEW])
def test_slices_are_of_the_language_models_layers(save, form):
    models = {name: save(name, renamed(vision_model(i), *form), **CONFIG) for i, name in enumerate("ab")}
    result = planned({"merge_method": "passthrough", "slices": FRANKEN}, **models)
    read = {node.name: node.files() for node in result.nodes}
    ups = {name: files for name, files in read.items() if "up_proj" in name}
    assert [(model, int(tensor.split("layers.")[1][0])) for files in ups.values() for model, tensor in files] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3),
    ]  # fmt: skip
    towers = [files for name, files in read.items() if "vis" in name]
    assert [len(files) for files in towers] == [1, 1] and {model for ((model, _),) in towers} == {"a"}
    assert result.config_changes == {"text_config": {"num_hidden_layers": 6}}


def test_the_config_tells_stacks_apart(save):
    values = {f"{stack}.{i}.w": np.ones((2, 2), np.float32) for stack, n in (("mtp.layers", 1), ("model.layers", 4))
              for i in range(n)}  # fmt: skip
    a = save("a", values, num_hidden_layers=4)
    result = planned({"merge_method": "passthrough", "slices": FRANKEN[:1]}, a=a)
    assert names(result) == ["mtp.layers.0.w", "model.layers.0.w", "model.layers.1.w", "model.layers.2.w"]
    assert result.config_changes == {"num_hidden_layers": 3}


def test_stacks_that_nothing_tells_apart(save):
    values = {f"{stack}.block.{i}.w": np.ones((2, 2), np.float32) for stack in ("encoder", "decoder") for i in range(4)}
    with pytest.raises(UserError, match=r"slices need one stack of layers; .* encoder\.block, decoder\.block"):
        planned({"merge_method": "passthrough", "slices": FRANKEN[:1]}, a=save("a", values, num_layers=4))


TIES = {"merge_method": "task_arithmetic", "base_model": "a", "models": [{"model": "b", "parameters": {"weight": 0.5}}]}


def test_the_text_module_is_merged_and_the_rest_is_the_donors(save):
    a, b = vision_model(), vision_model(1)
    save("a", a), save("b", b)
    for modules in (
        {"text_decoder": {"models": TIES["models"]}},
        {"language_model": {"models": TIES["models"]}, "vision_tower": {"models": [{"model": "a"}]}},
    ):
        block = {key: value for key, value in TIES.items() if key != "models"}
        merge({**block, "modules": modules}, "out", overwrite=True)
        merged = load_file("out/model.safetensors")
        for name in a:
            expected = a[name] if "visual" in name else a[name] + 0.5 * (b[name].astype(np.float64) - a[name])
            np.testing.assert_allclose(merged[name], expected, atol=1e-7, err_msg=name)


def test_modules_of_a_step(save):
    models = {name: save(name, vision_model(i)) for i, name in enumerate("ab")}
    steps = [{"name": "mid", "merge_method": "linear", "base_model": "a", "modules": {"text": {"models": ["a", "b"]}}},
             {"merge_method": "linear", "models": ["mid", "b"]}]  # fmt: skip
    result = planned({"steps": steps}, **models)
    read = {node.name: list(node.inputs["mid"].node.inputs) for node in result.nodes}
    assert all(models == (["a"] if "visual" in name else ["a", "b"]) for name, models in read.items())


def test_all_modules_of_the_same_models_are_whole_models(save):
    models = {name: save(name, vision_model(i)) for i, name in enumerate("ab")}
    same = {"models": ["a", "b"]}
    result = planned({"merge_method": "linear", "modules": {"text_decoder": same, "vision_tower": same}}, **models)
    assert all(len(node.inputs) == 2 for node in result.nodes)


def test_slices_of_the_text_module(save):
    models = {name: save(name, vision_model(i), **CONFIG) for i, name in enumerate("ab")}
    modules = {"text_decoder": {"slices": FRANKEN}, "vision_tower": {"models": [{"model": "a"}]}}
    result = planned({"merge_method": "passthrough", "modules": modules}, **models)
    assert sum("up_proj" in name for name in names(result)) == 6
    assert result.config_changes == {"text_config": {"num_hidden_layers": 6}}


@pytest.mark.parametrize("text", [{"models": ["a", "b"]}, {"slices": FRANKEN}])
@pytest.mark.parametrize("base", [{}, {"base_model": "a"}])
@pytest.mark.parametrize("name", ["b", {"model": "b", "parameters": {}}, {"model": {"path": "b"}}])
def test_a_module_of_another_model_than_the_donor_is_refused(save, text, base, name):
    """The tensors that are not merged are the donor's; its own name, however spelt, is accepted."""
    modules = {"text_decoder": text, "vision_tower": {"models": [name]}}
    block = {"merge_method": "passthrough" if "slices" in text else "linear", **base}
    for recipe in ({**block, "modules": modules}, {"steps": [{**block, "modules": modules}]}):
        with pytest.raises(UserError, match=r"'vision_tower' keeps the tensors of 'b', but .* taken from 'a'"):
            read_recipe(recipe)
    (Path("a")).mkdir()
    for same in ("a", "./a", "a/", "model:a", "alias", {"path": "a"}):
        recipe = {**block, "sources": {"alias": "a"}, "modules": modules | {"vision_tower": {"models": [same]}}}
        assert read_recipe(recipe).donor == "a"


def test_modules_some_merged_and_some_kept_are_refused():
    same = {"models": ["a", "b"]}
    modules = {"text_decoder": same, "vision_tower": same, "audio_tower": {"models": ["a"]}}
    with pytest.raises(UserError, match=r"'vision_tower' is merged and 'audio_tower' is kept, .* under `keep:`"):
        read_recipe({"merge_method": "linear", "modules": modules})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"modules": {}}, "modules: expected a block for each module"),
        ({"modules": {"vision_tower": {"models": ["a"]}}}, "modules: which of vision_tower is the language model"),
        ({"modules": {"text_decoder": {"models": ["a", "b"]}, "vision_tower": {"models": ["b", "c"]}}},
         "modules: 'vision_tower' is merged otherwise than 'text_decoder'"),
        ({"modules": {"text_decoder": {"models": ["a"], "slices": FRANKEN}}}, "'models' and 'slices' both stand"),
        ({"modules": {"text_decoder": {}}}, "modules.text_decoder: expected 'models' or 'slices'"),
        ({"modules": {"text_decoder": {"modles": []}}}, "modules.text_decoder: unknown key 'modles'; did you mean"),
        ({"modules": {"text_decoder": {"models": ["a"]}}, "models": ["a"]}, "'models' stands beside 'modules'"),
        ({"models": ["a"], "keep": "visual"}, "keep: expected a list"),
        ({"models": ["a"], "keep": [3]}, "keep: filter: expected a part of tensor names, found 3"),
        ({"models": ["a"], "keep": [{"regex": "("}]}, "keep: regex '(' is not one"),
    ],
)  # fmt: skip
def test_bad_modules_and_keep(recipe, message):
    with pytest.raises(UserError) as error:
        read_recipe({"merge_method": "linear", **recipe})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_kept_tensors_are_the_donors(save):
    a, b = tensors(), tensors(seed=1)
    del b["model.layers.1.mlp.up_proj.weight"]
    save("a", a), save("b", b)
    lines = []
    keep = ["embed", {"regex": r"layers\.1\.mlp"}, {"filter": "nothing"}]
    save("full", tensors(seed=2))
    assert planned(soup("a", "full", keep=["embed"]), a=open_checkpoint("a"), full=open_checkpoint("full")).notes == ()
    report = merge({**soup("b", base_model="a"), "merge_method": "task_arithmetic", "keep": keep}, "out",
                   log=lines.append)  # fmt: skip
    merged = load_file("out/model.safetensors")
    for name in a:
        kept = "embed" in name or "layers.1.mlp" in name
        np.testing.assert_allclose(merged[name], a[name] if kept else b[name], atol=1e-6, err_msg=name)
    assert any("keep: 'nothing' fits no tensor" in line for line in lines)
    assert report["total"]["merged"]["models"].keys() == {"b"}


def test_keep_of_a_step_and_of_methods_with_rows(save):
    steps = [{**TIES, "name": "mid", "keep": ["norm"]}, {"merge_method": "linear", "models": ["mid", "b"]}]
    models = {name: save(name, tensors(seed=i)) for i, name in enumerate("ab")}
    mid = next(node for node in planned({"steps": steps}, **models).nodes if "norm" in node.name).inputs["mid"].node
    assert list(mid.inputs) == ["a"]
    rows = [{"model": "b", "data": "b.jsonl"}]
    with pytest.raises(UserError, match="regmean merges all tensors: remove 'keep'"):
        read_recipe({"merge_method": "regmean", "base_model": "a", "models": rows, "keep": ["norm"]})
