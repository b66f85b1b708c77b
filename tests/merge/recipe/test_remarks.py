"""Recipes that can be carried out and may mean something else than their author thinks: a note says so."""

import pytest

from bmjax.merge.recipe.recipe import read_recipe

FILTER, ALL = {"filter": "mlp", "value": 0}, {"value": 1}


def notes(recipe):
    return [note.removeprefix("recipe: ") for note in read_recipe(recipe).notes]


@pytest.mark.parametrize(
    "weight, behind",
    [
        ([ALL, FILTER], "filter 'mlp'"),
        ([{"filter": "*", "value": 1}, FILTER, {"regex": "norm$", "value": 0}], "filter 'mlp', filter 'norm$'"),
        ([FILTER, ALL, {"filter": "attn", "value": 2}], "filter 'attn'"),
        ([ALL, {"value": 2}], "`value` alone"),
        ([FILTER, ALL], None),
        ([FILTER], None),
        ([0.5, 1], None),
        (1, None),
    ],
)
@pytest.mark.parametrize("is_a_models", [True, False])
def test_an_entry_for_all_tensors_before_others(weight, behind, is_a_models):
    entry = {"model": "a", "parameters": {"weight": weight}} if is_a_models else "a"
    recipe = {"merge_method": "linear", "models": [entry, "b"], "parameters": {} if is_a_models else {"weight": weight}}
    told = [note for note in notes(recipe) if "stands before" in note]
    of = " of model 'a'" if is_a_models else ""
    assert told == ([] if behind is None else [
        f"weight{of}: the entry that fits every tensor stands before {behind}, which decides for none: the first that "
        "fits is taken; put it last"
    ])  # fmt: skip


def test_an_entry_for_all_tensors_of_a_steps_own_parameter():
    recipe = {"merge_method": "slerp", "base_model": "a", "models": ["b"], "parameters": {"t": [ALL, FILTER]}}
    assert [note for note in notes(recipe) if note.startswith("t: the entry that fits every tensor stands before")]


LINEAR = {"merge_method": "linear", "base_model": "base", "models": ["a", "b"]}


@pytest.mark.parametrize(
    "changes, branches, said",
    [
        ({"parameters": {"weight": 1}}, ("a", "b"), "list it under 'models' to merge it, too, or write `compat:"),
        ({}, ("a", "b"), "list it under 'models' to merge it, too"),
        ({"merge_method": "karcher"}, ("a", "b"), "or write `compat: mergekit`"),
        ({"parameters": {"weight": 1}, "compat": "mergekit"}, ("base", "a", "b"), "is merged, too, with `compat:"),
        ({"merge_method": "karcher", "compat": "mergekit"}, ("base", "a", "b"), "is merged, too, with `compat:"),
        # It refuses these for want of the base's weight, so there is nothing to be compatible with.
        ({"compat": "mergekit"}, ("a", "b"), "list it under 'models' to merge it, too"),
        ({"models": ["base", "a"]}, ("base", "a"), None),
        ({"models": ["./base/", "a"], "compat": "mergekit", "parameters": {"weight": 1}}, ("base", "a"), None),
        ({"merge_method": "passthrough", "models": ["a"]}, ("a",), None),
        ({"merge_method": "multislerp"}, ("a", "b"), None),
    ],
)
def test_a_base_that_is_not_among_the_models(tmp_path, monkeypatch, changes, branches, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    recipe = LINEAR | changes
    assert read_recipe(recipe).steps[0].branches == branches
    told = [note for note in notes(recipe) if note.startswith("base_model 'base' is")]
    assert len(told) == (said is not None) and (said is None or said in told[0])


def test_mergekit_does_not_add_the_base_to_slices():
    sources = [{"model": name, "layer_range": [0, 2]} for name in "ab"]
    recipe = {"merge_method": "linear", "base_model": "base", "slices": [{"sources": sources}], "compat": "mergekit"}
    assert read_recipe(recipe | {"parameters": {"weight": 1}}).steps[0].branches == ("a", "b")
