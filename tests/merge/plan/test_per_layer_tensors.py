"""Tensors outside of the layers with a part for each layer: parts follow the layers of a stack, or it is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from tests.merge.plan_helpers import planned, soup, tensors

EMBED, PROJECTION = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"
LAYERS, SIZE, ROWS = 4, 3, 6
ORDER = [2, 3, 0, 1, 2]


def values_of(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {
        EMBED: (ROWS, LAYERS * SIZE),
        PROJECTION: (LAYERS * SIZE, 4),
        "model.per_layer_projection_norm.weight": (SIZE,),
    }
    return tensors(LAYERS, seed=seed, dtype=dtype) | {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()
    }


def stack(*ranges, models=("a",)):
    slices = [{"sources": [{"model": model, "layer_range": list(part)} for model in models]} for part in ranges]
    return {"merge_method": "passthrough" if len(models) == 1 else "linear", "slices": slices}


def write(folder, values):
    folder.mkdir()
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"num_hidden_layers": LAYERS, "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def parts(values, order):
    """The parts of the layers `order` of both tensors."""
    embed = values[EMBED].reshape(ROWS, LAYERS, SIZE)[:, order].reshape(ROWS, -1)
    return embed, values[PROJECTION].reshape(LAYERS, SIZE, 4)[order].reshape(-1, 4)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
def test_parts_follow_the_layers_of_a_stack(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", values := values_of(0, dtype))
    merge(stack((2, 4), (0, 3)), "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in zip((EMBED, PROJECTION), parts(values, ORDER), strict=True):
        assert out[name].dtype == dtype and np.array_equal(out[name], expected)


def test_parts_of_models_that_are_merged_in_every_slice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {name: values_of(seed) for seed, name in enumerate("ab")}
    for name, values in models.items():
        write(tmp_path / name, values)
    merge(stack((2, 4), (0, 3), models="ab"), "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    expected = [np.mean(both, 0) for both in zip(*(parts(values, ORDER) for values in models.values()), strict=True)]
    for name, value in zip((EMBED, PROJECTION), expected, strict=True):
        np.testing.assert_allclose(out[name], value, rtol=1e-6)


def test_a_stack_of_two_models_is_refused(save):
    models = {name: save(name, values_of(seed), num_hidden_layers=LAYERS) for seed, name in enumerate("ab")}
    slices = [{"sources": [{"model": name, "layer_range": [0, 3]}]} for name in "ab"]
    with pytest.raises(UserError, match=r"embed_tokens_per_layer.* hold a part for each of its layers.*several models"):
        planned({"merge_method": "passthrough", "slices": slices}, **models)


def test_a_tensor_whose_parts_are_not_known_is_refused(save):
    values = tensors(LAYERS) | {"model.per_layer_gains": np.ones((8, 4), np.float32)}
    a = save("a", values, num_hidden_layers=LAYERS)
    with pytest.raises(UserError, match=r"per_layer_gains.*where the parts are is not known: merge the whole models"):
        planned(stack((0, 4), (2, 4)), a=a)
    assert planned(soup("a"), a=a).notes == ()


def test_whole_models_are_merged_as_they_are(save):
    models = {name: save(name, values_of(seed), num_hidden_layers=LAYERS) for seed, name in enumerate("ab")}
    result = planned(soup("a", "b"), **models)
    assert result.notes == () and {node.name for node in result.nodes} >= {EMBED, PROJECTION}
