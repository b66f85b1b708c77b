"""Names of models that are none: what YAML reads as numbers or dates, and misspelt words of the tokenizer's source."""

import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe

PLACES = {
    "models": "models: [{0}]",
    "models, as a block": "models: [{{model: {0}}}]",
    "base_model": "models: [a]\nbase_model: {0}",
    "tokenizer_source": "models: [a]\ntokenizer_source: {0}",
    "sources.alias": "models: [alias]\nsources: {{alias: {0}}}",
    "slices.0.sources.0": "slices: [{{sources: [{{model: {0}, layer_range: [0, 1]}}]}}]",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "written, shown, kind",
    [
        ("123", "123", "a number"),
        ("1.5", "1.5", "a number"),
        ("on", "true", "true or false"),
        ("No", "false", "true or false"),
        ("2024-01-01", "2024-01-01", "a date"),
    ],
)
def test_what_yaml_takes_for_something_else(tmp_path, place, written, shown, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: linear\n{PLACES[place].format(written)}\n")
    with pytest.raises(UserError) as error:
        read_recipe(path)
    assert str(error.value) == (
        f"{path}: {place.partition(',')[0]}: expected a model's name, found {shown}, which YAML reads as {kind}; write "
        "the name in quotes"
    )
    path.write_text(f"merge_method: linear\n{PLACES[place].format(repr(written))}\n")
    read_recipe(path)


@pytest.mark.parametrize("word, meant", [("unoin", "union"), ("Union", "union"), ("BASE", "base"), ("bases", "base")])
@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_a_misspelt_source_of_the_tokenizer(tmp_path, monkeypatch, word, meant, key):
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "linear", "models": ["a", "b"], key: word if key != "tokenizer" else {"source": word}}
    with pytest.raises(UserError) as error:
        read_recipe(recipe)
    assert str(error.value) == (
        f"recipe: {key}: '{word}' is no model here, nor one of base, union; did you mean '{meant}'?"
    )
    # What there is by that name is meant.
    assert read_recipe({**recipe, "models": [word, "b"]}).tokenizer.source == word
    assert read_recipe({**recipe, "sources": {word: "org/x"}}).tokenizer.source == word
    (tmp_path / word).mkdir()
    assert read_recipe(recipe).tokenizer.source == word


def test_other_names_may_be_the_hubs():
    for name in ("gpt2", "org/unoin", "./unoin"):
        assert read_recipe({"merge_method": "linear", "models": ["a"], "tokenizer_source": name}).tokenizer.source
