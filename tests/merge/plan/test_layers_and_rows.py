"""Merges whose tensors do not simply stand for each other: slices, depths, other vocabularies."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.merge.engine import chunks
from tests.merge.reference import SMALL, hf_dir, hf_tensors

BACKBONE = hf_tensors(SMALL, 0)
MATH, CODE = hf_tensors(SMALL, 1, BACKBONE), hf_tensors(SMALL, 2, BACKBONE)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tensors in {"backbone": BACKBONE, "math": MATH, "code": CODE}.items():
        hf_dir(tmp_path / name, tensors, num_hidden_layers=3)
    return tmp_path


def layer(tensors, number):
    prefix = f"model.layers.{number}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_a_frankenmerge_stacks_layers(models):
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "math", "layer_range": [0, 3]}]},
            {"sources": [{"model": "code", "layer_range": [1, 3]}]},
        ],
    }
    report = merge(recipe, "out")
    merged = load_file("out/model.safetensors")
    for number, (model, source) in enumerate([(MATH, 0), (MATH, 1), (MATH, 2), (CODE, 1), (CODE, 2)]):
        for key, value in layer(model, source).items():
            np.testing.assert_array_equal(merged[f"model.layers.{number}.{key}"], value)
    np.testing.assert_array_equal(merged[EMBED], MATH[EMBED])
    np.testing.assert_array_equal(merged["model.norm.weight"], CODE["model.norm.weight"])
    assert json.loads((models / "out/config.json").read_text())["num_hidden_layers"] == 5
    assert report["total"]["merged"]["models"].keys() == {"math", "code"}
    assert "passthrough" in (models / "out/README.md").read_text()


def test_slices_of_two_models_with_a_gradient(models):
    recipe = {
        "merge_method": "slerp",
        "base_model": "math",
        "slices": [{"sources": [{"model": "math", "layer_range": [0, 3]}, {"model": "code", "layer_range": [0, 3]}]}],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0}]},
    }
    merge(recipe, "out")
    merged = load_file("out/model.safetensors")
    for number in range(3):
        for key, value in layer(merged, number).items():
            expected = (MATH, None, CODE)[number] if "mlp" in key else MATH
            if expected is not None:
                np.testing.assert_allclose(value, layer(expected, number)[key], atol=1e-7, err_msg=key)


def test_a_step_between_slices_is_not_written(models):
    recipe = {
        "steps": [
            {"name": "mean", "merge_method": "linear", "models": ["math", "code"]},
            {"name": "out", "merge_method": "passthrough", "slices": [
                {"sources": [{"model": "mean", "layer_range": [2, 3]}]},
                {"sources": [{"model": "backbone", "layer_range": [0, 2]}]},
            ]},
        ]
    }  # fmt: skip
    report = merge(recipe, "out")
    merged = load_file("out/model.safetensors")
    for key in layer(MATH, 2):
        mean = (layer(MATH, 2)[key] + layer(CODE, 2)[key].astype(np.float64)) / 2
        np.testing.assert_allclose(layer(merged, 0)[key], mean, atol=1e-8)
        np.testing.assert_array_equal(layer(merged, 1)[key], layer(BACKBONE, 0)[key])
    assert set(report["total"]) == {"size", "mean", "out"}
    assert [p.name for p in models.iterdir() if p.is_dir()].count("mean") == 0


@pytest.mark.parametrize("rows", [40, 56])
def test_other_vocabulary_sizes(models, rows):
    """The result has the base's rows; a model with fewer changes none of the others, more are left out."""
    rng = np.random.default_rng(3)
    other = dict(MATH)
    for key in (EMBED, HEAD):
        other[key] = np.concatenate([MATH[key], rng.standard_normal((8, 32)).astype(np.float32)])[:rows]
    hf_dir(models / "other", other, num_hidden_layers=3, vocab_size=rows)
    lines = []
    recipe = {"merge_method": "task_arithmetic", "base_model": "backbone", "models": ["other", "code"]}
    merge(recipe, "out", log=lines.append)
    merged = load_file("out/model.safetensors")
    for key in (EMBED, HEAD):
        base = BACKBONE[key].astype(np.float64)
        change = np.zeros_like(base)
        shared = min(rows, len(base))
        change[:shared] = other[key][:shared] - base[:shared]
        np.testing.assert_allclose(merged[key], base + change + (CODE[key] - base), atol=1e-7)
    assert any("rows" in line and "other" in line for line in lines), lines


def test_chunks_of_rows_that_a_model_lacks(models, monkeypatch):
    """The same in several chunks."""
    monkeypatch.setattr(chunks, "CHUNK", 256)
    monkeypatch.setattr(chunks, "COLUMNS", 64)
    test_other_vocabulary_sizes(models, 40)
