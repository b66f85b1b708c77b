"""Overrides of one model's keys, by the entry's number or by its model, and of entries of other lists."""

import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe

RECIPE = {"merge_method": "linear", "models": ["x", "./y.z/a", {"model": "./y.z"}, {"model": {"path": "org/m"}}]}
STEPS = {
    "steps": [
        {"name": "mid", "merge_method": "linear", "models": ["a", "b"]},
        {"merge_method": "linear", "models": ["mid", "c"]},
    ]
}


def weights(overrides, recipe=RECIPE, step=0):
    return read_recipe(recipe, overrides).steps[step].arguments["weight"]


@pytest.mark.parametrize(
    "override, expected",
    [
        ("models.0.parameters.weight=2", (2, 1, 1, 1)),
        ("models.x.parameters.weight=2", (2, 1, 1, 1)),
        ("models../y.z/a.parameters.weight=2", (1, 2, 1, 1)),
        ("models../y.z.parameters.weight=2", (1, 1, 2, 1)),
        ("models.org/m.parameters.weight=2", (1, 1, 1, 2)),
        ("models.3.parameters={weight: 2}", (1, 1, 1, 2)),
    ],
)
def test_one_models_parameter(override, expected):
    assert weights([override]) == expected


def test_in_order():
    assert weights(["models=[a, b]", "models.b.parameters.weight=2", "models.1.parameters.weight=3"]) == (1, 3)
    assert read_recipe(RECIPE, ["models.0=w"]).inputs[0] == "w"


def test_in_a_step():
    assert weights(["steps.mid.models.b.parameters.weight=4"], STEPS) == (1, 4)
    assert weights(["steps.merged.models.0.parameters.weight=4"], STEPS, 1) == (4, 1)


def test_a_slices_layers():
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "x", "layer_range": [0, 2]}]}]}
    step = read_recipe(recipe, ["slices.0.sources.0.layer_range=[1, 3]"]).steps[0]
    assert step.slices[0].ranges == {"x": (1, 3)}
    for override, entry, count in (("slices.0.sources.1.model=x", "1", 1), ("slices.first.sources=[]", "first", 1)):
        with pytest.raises(UserError) as error:
            read_recipe(recipe, [override])
        assert str(error.value) == (
            f"recipe: override '{override}': '{entry}' is no entry of a list of {count}; name an entry by its number, "
            "0 to 0"
        )


@pytest.mark.parametrize("name", ["4", "-1", "00", "weight", "y"])
def test_no_such_entry(name):
    with pytest.raises(UserError) as error:
        read_recipe(RECIPE, [f"models.{name}.parameters.weight=2"])
    assert str(error.value) == (
        f"recipe: override 'models.{name}.parameters.weight=2': no entry of 'models' is called '{name}'; name it by "
        "its model or its number: 0 (x), 1 (./y.z/a), 2 (./y.z), 3 (org/m)"
    )
