"""RegMean is the closed form over torch's activations, with many and with few tokens."""

import jax
import numpy as np
import pytest
import torch
import transformers

from bmjax.calibrate import dispatch, regmean
from bmjax.config import UserError
from tests.calibrate.tiny_models import batches, documents, recipe, tensors


def inputs(directory, batch):
    """Inputs of every linear layer by torch, document by document: {module name: [tokens, in]}."""
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0][0].detach()))
    for tokens, _ in documents(batch):
        network(torch.tensor(tokens[None]).long())
    return {name: torch.cat(rows).double().numpy() for name, rows in seen.items()}


def closed_form(changes, grams, off_diagonal, ridge):
    """The closed form of arXiv 2212.09849 for matrices [out, in], float64."""
    scaled = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    total = sum(scaled) + ridge * np.trace(sum(scaled)) / len(scaled[0]) * np.eye(len(scaled[0]))
    return (np.linalg.inv(total) @ sum(g @ c.T for g, c in zip(scaled, changes, strict=True))).T


def test_regmean_is_the_closed_form_over_torchs_activations(models, tmp_path):
    report = dispatch.merge(recipe(models, "regmean", ridge=0.01, steps=0), tmp_path / "out")
    base, merged = tensors(models / "base"), tensors(tmp_path / "out")
    branches = {name: tensors(models / name) for name in ("a", "b")}
    read = {name: jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches(models, name)[1]) for name in branches}
    seen = {name: inputs(models / name, read[name]) for name in branches}
    for key, start in base.items():
        changes = [branches[name][key].astype(np.float64) - start for name in branches]
        module = key.removesuffix(".weight")
        if key.startswith("model.layers") and module in seen["a"]:
            grams = [seen[name][module].T @ seen[name][module] / len(seen[name][module]) for name in branches]
            expected = start + closed_form(changes, grams, 0.9, 0.01)
        else:
            expected = start + sum(changes) / 2
        # Two float32 passes through the model stand between the activations.
        assert np.abs(merged[key] - expected).max() <= 2e-5, key
    assert report["kept"] == "start" and set(report["tokens"]) == {"grams", "held_out"}
    assert report["tokens"]["grams"] == sum(batch.real_tokens for batch in read.values())


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("form", ["rows", "grams", "both"])
def test_each_form_of_the_inputs_gives_the_closed_form(off_diagonal, form):
    rng = np.random.default_rng(0)
    width, counts = 24, (5, 7)
    inputs = [rng.normal(size=(count, width)).astype(np.float32) * rng.uniform(0.1, 2, width) for count in counts]
    changes = [rng.normal(size=(3, width)) for _ in counts]
    as_rows = [form == "rows" or (form == "both" and i == 0) for i in range(2)]
    measured = [
        regmean.Inputs(len(x), rows_TD=x.astype(np.float32)) if rows
        else regmean.Inputs(len(x), gram_DD=(x.T @ x).astype(np.float32))
        for x, rows in zip(inputs, as_rows, strict=True)
    ]  # fmt: skip
    system = regmean.System(measured, off_diagonal, 0.01, "x")
    parts = [system.solve(m.times(c.T, off_diagonal)) for m, c in zip(measured, changes, strict=True)]
    expected = closed_form(changes, [x.T @ x / len(x) for x in inputs], off_diagonal, 0.01)
    np.testing.assert_allclose(sum(parts).T, expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_fix_nothing_are_one_line():
    zeros = regmean.Inputs(4, gram_DD=np.zeros((3, 3), np.float32))
    with pytest.raises(UserError, match="layer 1 down do not fix its weights; raise ridge"):
        system = regmean.System([zeros], 1.0, 0.0, "layer 1 down")
        system.solve(np.full((3, 1), np.inf))
