"""Coefficients learned layer by layer: nearer to the branches' own states, and to a combination that is known."""

import numpy as np
import pytest
import torch
import transformers

from bmjax.calibrate import dispatch, walk
from bmjax.calibrate.judge import Loss
from bmjax.config import UserError
from tests.calibrate.tiny_models import batches, documents, recipe, tensors


@pytest.fixture
def kept(monkeypatch):
    """Whatever is learned is kept: the loss of random models need not follow their states."""
    nats = iter(range(9, 0, -1))

    def losses(self, params):
        loss = Loss(np.full(4, float(next(nats))), np.ones(4))
        return [loss] * len(self._streams)

    monkeypatch.setattr(walk.Judged, "losses", losses)


def states(directory, tokens):
    """The states after every layer but the last, and the final ones, by torch: [layers, tokens, D]."""
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        hidden = [network(torch.tensor(t[None]).long(), output_hidden_states=True).hidden_states[1:] for t in tokens]
    return [np.concatenate([states[layer][0].numpy() for states in hidden]) for layer in range(2)]


@pytest.mark.parametrize("per", ["entry", "row"])
def test_states_come_nearer_to_the_branches_own(models, tmp_path, kept, per):
    settings = {"along": "changes", "start": 1.0, "rows": 4, "learning_rate": 0.05}
    report = dispatch.merge(recipe(models, "layerwise", **settings, steps=12, per=per), tmp_path / "learned")
    dispatch.merge(recipe(models, "layerwise", **settings, steps=0), tmp_path / "mean")
    assert report["kept"] == "learned"
    share = {"entry": 0.9, "row": 1.0}[per]
    assert all(d["learned"] < share * d["start"] for d in report["layer_distance"].values())
    distances = {}
    tokens = {name: [t for batch in batches(models, name)[1] for t, _ in documents(batch)] for name in ("a", "b")}
    own = {name: states(models / name, tokens[name]) for name in tokens}
    for out in ("learned", "mean"):
        merged = {name: states(tmp_path / out, tokens[name]) for name in tokens}
        distances[out] = [
            sum(np.sum((merged[name][i] - own[name][i]) ** 2) for name in tokens) for i in range(2)
        ]  # fmt: skip
    assert all(a < share * b for a, b in zip(distances["learned"], distances["mean"], strict=True))
    # The first layer's inputs are the same in both, so the report's distance is torch's.
    first = report["layer_distance"]["layer 0"]
    assert first["start"] == pytest.approx(distances["mean"][0], rel=1e-3)
    assert first["learned"] == pytest.approx(distances["learned"][0], rel=1e-3)


def test_one_branch_is_recovered(models, tmp_path, kept):
    """With one branch the coefficients that give its own outputs are 1."""
    one = recipe(models, "layerwise", start=0.4, steps=120, learning_rate=0.1, per="tensor")
    one["models"] = one["models"][:1]
    dispatch.merge(one, tmp_path / "out")
    base, branch, merged = tensors(models / "base"), tensors(models / "a"), tensors(tmp_path / "out")
    for key in base:
        if "proj.weight" in key:
            change, wanted = (x[key].astype(np.float64) - base[key] for x in (merged, branch))
            assert np.sum(change * wanted) / np.sum(wanted**2) == pytest.approx(1, abs=0.02), key
    head = "lm_head.weight"  # not learned
    np.testing.assert_allclose(merged[head], base[head] + 0.4 * (branch[head] - base[head]), atol=1e-6)


def test_a_rate_that_is_too_large_changes_nothing(models, tmp_path):
    far = dispatch.merge(recipe(models, "layerwise", steps=3, learning_rate=1e4), tmp_path / "far")
    dispatch.merge(recipe(models, "layerwise", steps=0), tmp_path / "start")
    assert all(d["learned"] == d["start"] for d in far["layer_distance"].values())
    assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "start/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"per": "entri"}, "per: expected"),
        ({"steps": -1}, "steps: expected"),
        ({"epochs": 3}, "unknown parameter 'epochs' of layerwise"),
        ({"along": "fishr"}, "along: expected"),
    ],
)
def test_bad_settings_are_one_line(models, tmp_path, parameters, message):
    with pytest.raises(UserError) as caught:
        dispatch.merge(recipe(models, "layerwise", **parameters), tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
