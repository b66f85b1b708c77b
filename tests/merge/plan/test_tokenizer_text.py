"""Tokenizers with more tokens than the embedding has rows, and models without config or tokenizer."""

import json

import pytest

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.merge.plan.tokenizer_text import largest_id
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import soup, tensors

WORDS = {"a": 0, "b": 1, "c": 2}
FORMS = {
    "words": ({"tokenizer.json": {"model": {"vocab": WORDS}, "added_tokens": []}}, 2),
    "added tokens": ({"tokenizer.json": {"model": {"vocab": WORDS}, "added_tokens": [{"id": 9, "content": "<x>"}]}}, 9),
    "scores": ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}}, 1),
    "slow": ({"vocab.json": WORDS, "added_tokens.json": {"<x>": 7}}, 7),
    "none": ({}, None),
    "broken": ({"tokenizer.json": ["a"], "vocab.json": {"a": "b"}}, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_largest_id(tmp_path, form):
    files, expected = FORMS[form]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert largest_id(tmp_path) == expected


def test_tokens_without_a_row_are_told(save, tmp_path):
    save("a", tensors(vocabulary=6)), save("b", tensors(vocabulary=6, seed=1))
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(FORMS["added tokens"][0]["tokenizer.json"]))
    lines = list(check(read_recipe(soup("a", "b")), "out"))
    assert any("model 'a': its tokenizer has ids up to 9, its embedding 6 rows" in line for line in lines)
    assert not any("ids up to" in line for line in check(read_recipe(soup("b", "a")), "out"))


def test_models_without_a_config(save, tmp_path):
    for i, name in enumerate("ab"):
        save(name, tensors(seed=i))
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(UserError, match=r"model 'a' gives .* and has no config\.json"):
        list(check(read_recipe(soup("a", "b")), "out"))
    merge(soup("b", "a"), "out")
    assert (tmp_path / "out/config.json").is_file()
