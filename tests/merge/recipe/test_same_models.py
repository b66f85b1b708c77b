"""One directory by two names is one model."""

import os
import re

import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    os.symlink("base", tmp_path / "link")
    os.symlink("a", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spellings(root):
    return ["base/", "./base", "a/../base", str(root / "base"), "link", "alias"]


@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("turned", [False, True])
def test_the_base_among_the_models_is_the_base_however_it_is_spelt(folders, i, turned):
    name, other = spellings(folders)[i], "base"
    if turned:
        name, other = other, name
    models = [{"model": name, "parameters": {}}, "a", "b"]
    recipe = {"sources": {"alias": "base"}, "merge_method": "model_stock", "base_model": other, "models": models}
    step = read_recipe(recipe).steps[0]
    assert (step.base, step.branches) == (other, ("a", "b"))
    slerp = {**recipe, "merge_method": "slerp", "models": [name, "a"], "parameters": {"t": 0.5}}
    assert read_recipe(slerp).steps[0].branches == ("a",)
    part = {"sources": [{"model": m, "layer_range": [0, 2]} for m in (name, "a")]}
    sliced = {"sources": recipe["sources"], "merge_method": "slerp", "base_model": other, "slices": [part],
              "parameters": {"t": 0.5}}  # fmt: skip
    assert read_recipe(sliced).steps[0].branches == ("a",)


@pytest.mark.parametrize("other", ["./a", "a/", "other", "alias"])
@pytest.mark.parametrize("method", ["linear", "ties", "karcher"])
def test_a_directory_listed_by_two_names_is_refused(folders, other, method):
    base = {"base_model": "base"} if method == "ties" else {}
    recipe = {"sources": {"alias": "a"}, "merge_method": method, "models": ["a", "b", other], **base}
    with pytest.raises(UserError, match=rf"models 'a' and '{other}' are one directory.*list it once"):
        read_recipe(recipe)


def test_other_layers_of_the_base_may_have_a_second_name(folders):
    part = {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "alias", "layer_range": [2, 4]}]}
    recipe = {"sources": {"alias": "base"}, "merge_method": "slerp", "base_model": "base", "slices": [part],
              "parameters": {"t": 0.5}}  # fmt: skip
    assert read_recipe(recipe).steps[0].branches == ("alias",)


@pytest.mark.parametrize("other", ["./base+./a", "base/+a", "link+other", "alias+a", "base+lora", "both"])
def test_a_model_with_an_adapter_is_one_model_however_it_is_spelt(folders, other):
    sources = {"alias": "base", "lora": "a", "both": "./base+a"}
    recipe = {"sources": sources, "merge_method": "ties", "base_model": "b", "models": ["base+a", other]}
    with pytest.raises(UserError, match=rf"models 'base\+a' and '{re.escape(other)}' are one directory"):
        read_recipe(recipe)
    recipe = {**recipe, "base_model": other, "models": ["base+a", "base", "b"]}
    assert read_recipe(recipe).steps[0].branches == ("base", "b")


def test_a_step_is_not_the_directory_of_its_name(folders):
    steps = [{"name": "a", "merge_method": "linear", "models": ["b", "base"]},
             {"merge_method": "linear", "models": ["a", "./a"]}]  # fmt: skip
    assert read_recipe({"steps": steps}).steps[1].branches == ("a", "./a")


def test_names_of_nothing_here_are_left_to_their_reader(folders):
    recipe = {"merge_method": "linear", "models": ["org/name", "gs://bucket/m", "~nobody/x", "x" * 5000]}
    assert read_recipe(recipe).steps[0].branches == tuple(recipe["models"])


def test_an_alias_or_a_step_that_hides_a_directory_is_told(folders):
    recipe = read_recipe({"sources": {"a": "base"}, "merge_method": "linear", "models": ["a", "b"]})
    assert recipe.notes == ("'a' is an alias of sources here, not the directory of that name; write ./a for that",)
    steps = [{"name": "a", "merge_method": "linear", "models": ["b", "base"]},
             {"merge_method": "linear", "models": ["a", "b"]}]  # fmt: skip
    assert "'a' is a step here" in read_recipe({"steps": steps}).notes[0]
    same = {"sources": {"a": "a"}, "merge_method": "linear", "models": ["a", "b"]}
    assert read_recipe(same).notes == ()


def test_an_alias_of_an_alias_is_refused(folders):
    recipe = {"sources": {"x": "y", "y": "a"}, "merge_method": "linear", "models": ["x", "b"]}
    with pytest.raises(UserError, match="sources: 'x' stands for 'y', an alias itself"):
        read_recipe(recipe)
