"""Slices of one model, and slices that hold no layer."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import EMBED, HEAD, NORM, tensors

X, Y = tensors(seed=1), tensors(seed=2)


def part(*sources, **more):
    return {"sources": [{"model": name, "layer_range": [low, high]} for name, low, high in sources], **more}


def layers(values, low, high):
    return {name: value for name, value in values.items() if any(f".{i}." in name for i in range(low, high))}


@pytest.fixture
def models(save):
    save("x", X)
    save("y", Y)


BOTH = part(("x", 0, 2), ("y", 0, 2))
WITH_BASE = ("slerp", "ties", "task_arithmetic", "dare_ties", "model_stock", "nearswap", "arcee_fusion", "multislerp")


@pytest.mark.parametrize("method", WITH_BASE)
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_slice_of_one_model_is_its_layers(models, method, name):
    merged = part(("x", 0, 2)) if method == "model_stock" else BOTH
    notes = []
    recipe = {"merge_method": method, "base_model": "x", "slices": [merged, part((name, 2, 4))]}
    merge(recipe, "out", log=notes.append)
    written, source = load_file("out/model.safetensors"), {"x": X, "y": Y}[name]
    for key in [*layers(source, 2, 4), NORM, HEAD]:
        np.testing.assert_array_equal(written[key], source[key])
    told = [note for note in notes if "lists 'y' alone" in note]
    assert len(told) == (name == "y") and all("to merge them list 'x' there, too" in note for note in told)
    assert method in Path("out/README.md").read_text()


def test_the_merged_slice_beside_it_is_merged_as_ever(models):
    recipe = {"merge_method": "slerp", "base_model": "x", "parameters": {"t": 0.25}}
    merge({**recipe, "slices": [BOTH, part(("y", 2, 4))]}, "out")
    merge({**recipe, "slices": [BOTH, part(("x", 2, 4), ("y", 2, 4))]}, "whole")
    one, both = load_file("out/model.safetensors"), load_file("whole/model.safetensors")
    for key in [*layers(X, 0, 2), EMBED]:
        np.testing.assert_array_equal(one[key], both[key])
    assert not np.array_equal(one[HEAD], both[HEAD])


def test_a_method_without_a_base_has_its_own_way_with_one_model(models):
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5, "normalize": False}}
    merge({**recipe, "slices": [part(("x", 0, 4))]}, "out")
    np.testing.assert_array_equal(load_file("out/model.safetensors")[NORM], X[NORM] / 2)
    merge({"merge_method": "passthrough", "slices": [part(("x", 0, 4), parameters={"scale": 2})]}, "out2")
    np.testing.assert_array_equal(load_file("out2/model.safetensors")[NORM], X[NORM] * 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parameters": {"tt": 1}}, r"unknown parameter 'tt' of slerp; did you mean 't'"),
        ({"base_model": None}, "slerp needs 'base_model'"),
    ],
)
def test_mistakes_beside_a_slice_of_one_model(change, message):
    recipe = {"merge_method": "slerp", "base_model": "x", "slices": [part(("y", 0, 2))], **change}
    with pytest.raises(UserError, match=message):
        read_recipe({key: value for key, value in recipe.items() if value is not None})


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_slice_without_layers_gives_what_stands_around_them(models, at):
    """As in mergekit: the first slice gives the embedding, the last one the norm behind the layers and the head."""
    slices = [part(("y", 0, 0)), part(("x", 0, 4))] if at == "first" else [part(("x", 0, 4)), part(("y", 4, 4))]
    merge({"merge_method": "passthrough", "slices": slices}, "out")
    written = load_file("out/model.safetensors")
    for key, value in written.items():
        source = Y if key in ([EMBED] if at == "first" else [NORM, HEAD]) else X
        np.testing.assert_array_equal(value, source[key])
    assert written.keys() == X.keys()


def test_the_head_alone_of_a_merge(models):
    slices = [part(("x", 0, 4), ("y", 0, 4)), part(("y", 4, 4))]
    merge({"merge_method": "slerp", "base_model": "x", "slices": slices}, "out")
    written = load_file("out/model.safetensors")
    np.testing.assert_array_equal(written[HEAD], Y[HEAD])
    assert not np.array_equal(written[EMBED], Y[EMBED])


@pytest.mark.parametrize(
    "slices, index",
    [
        ([part(("x", 0, 2)), part(("y", 2, 2)), part(("x", 2, 4))], 1),
        ([part(("x", 0, 0))], 0),
        ([part(("x", 0, 0)), part(("y", 4, 4))], 0),
    ],
)
def test_a_slice_without_layers_that_gives_nothing(slices, index):
    with pytest.raises(UserError) as error:
        read_recipe({"merge_method": "passthrough", "slices": slices})
    assert str(error.value).startswith(f"recipe: slices[{index}]: its layer_range holds no layer, so nothing is taken")
