"""What zeros tell of broken files and of values too small for a type."""

import json
from pathlib import Path

import numpy as np
import pytest

from bmjax.calibrate.dispatch import check, merge
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import HEAD, NORM, soup, tensors

UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
COPY = {"merge_method": "passthrough", "models": ["a"]}
RECIPES = {
    "passthrough": COPY,
    "linear": soup("a", "b"),
    "ties": {"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 0.5}},
}


def notes_of(recipe, out="out"):
    notes = []
    merge(recipe, out, overwrite=True, log=notes.append)
    return notes


LOST = "hold nothing but zeros, those of the other models do not"
METHODS = {
    "linear": soup("a", "b", "c"),
    "ties": {"merge_method": "ties", "base_model": "a", "models": ["b", "c"], "parameters": {"density": 0.5}},
    "two steps": {"steps": [{"name": "mid", **soup("a", "b")}, soup("mid", "c")]},
    "task arithmetic": {"merge_method": "task_arithmetic", "base_model": "a", "models": ["b", "c"]},
}


@pytest.mark.parametrize("zero", ["a", "b", "c"])
@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("name", [UP, NORM])
def test_a_tensor_of_zeros_in_one_model_alone_is_named(save, recipe, zero, name):
    for i, model in enumerate("abc"):
        values = tensors(seed=i)
        if model == zero:
            values[name] = np.zeros_like(values[name])
        save(model, values)
    lines = [note for note in notes_of(METHODS[recipe]) if LOST in note]
    assert lines == [f"model '{zero}': 1 tensor ({name}) {LOST}: was its download or its saving cut off?"]
    assert json.loads(Path("out/merge_report.json").read_text())["remarks"] == lines


def test_zeros_that_are_in_order_are_not_named(save):
    """Those that all models have, biases, and changes that happen to be as large as their base."""
    bias = "model.layers.1.mlp.up_proj.bias"
    for i, model in enumerate("abc"):
        values = tensors(seed=0) | {Q: np.zeros((4, 4), np.float32), bias: np.full(8, i, np.float32)}
        values[UP] = values[UP] * (1 + 2 * (i == 1))
        save(model, values | {NORM: np.full(4, i + 1, np.float32)})
    for recipe in METHODS.values():
        assert notes_of(recipe) == []


def test_a_file_that_ends_in_zeros_is_named_before_anything_is_merged(save):
    long = {f"model.layers.{i}.w.weight": np.ones((64, 64), np.float32) * (i + 1) for i in range(3)}
    for i, model in enumerate("ab"):
        save(model, {name: value * (i + 1) for name, value in long.items()})
    for cut, whole in (("b", False), ("b", True)):
        path = Path(cut, "model.safetensors")
        data = bytearray(path.read_bytes())
        data[-(40000 if whole else 5000) :] = bytes(40000 if whole else 5000)
        path.write_bytes(data)
        lines = list(check(read_recipe(soup("a", "b")), "out", overwrite=True))
        line = (
            "note: model 'b': model.safetensors ends in zeros, in tensor 'model.layers.2.w.weight': was its download "
            "cut off? Compare it with the original"
        )
        assert line in lines
        # What is zero as a whole is named, too.
        notes = notes_of(soup("a", "b"))
        assert any("2 tensors" in note or "1 tensor " in note for note in notes if LOST in note) == whole
    assert any("ends in zeros" in note for note in notes_of({**COPY, "models": ["b"]}))


@pytest.mark.parametrize("rows", [2, 5])
def test_padding_at_the_end_of_a_table_of_tokens_is_no_cut(save, rows):
    for i, model in enumerate("ab"):
        values = tensors(seed=i, vocabulary=8, hidden=512)
        if model == "b":
            values[HEAD][-rows:] = 0
        save(model, {name: value for name, value in values.items() if name != HEAD} | {HEAD: values[HEAD]})
    assert any("ends in zeros" in note for note in notes_of(soup("a", "b"))) == (rows > 4)


SMALL_NUMBERS = {"all": (lambda t: t * 1e-12, True), "most": (lambda t: np.where(np.arange(t.size).reshape(t.shape) % 4,
                 1e-12, t), True), "few": (lambda t: np.where(np.arange(t.size).reshape(t.shape) % 4, t, 1e-12), False),
                 "zeros": (lambda t: np.where(np.arange(t.size).reshape(t.shape) % 4, 0, t), False)}  # fmt: skip


@pytest.mark.parametrize("case", SMALL_NUMBERS)
@pytest.mark.parametrize("recipe", ["passthrough", "linear", "ties"])
def test_values_too_small_for_float16_are_named(save, case, recipe):
    change, told = SMALL_NUMBERS[case]
    for i, model in enumerate("ab"):
        values = tensors(seed=i)
        save(model, values | {UP: change(values[UP]).astype(np.float32)})
    notes = notes_of({**RECIPES[recipe], "dtype": "float16"})
    line = f"1 tensor ({UP}): most values are too small for float16 and became 0; write another out_dtype to keep them"
    assert (line in notes) == told and len(notes) == told
    assert notes_of({**RECIPES[recipe], "dtype": "bfloat16"}) == []
