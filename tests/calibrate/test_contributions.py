"""Gram matrices and squared gradients are torch's, RegMean the closed form, Fisher's shares a weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from bmjax.calibrate import contributions, dispatch
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.weights import hf
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


def regmean(changes, grams, off_diagonal, ridge):
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
            expected = start + regmean(changes, grams, 0.9, 0.01)
        else:
            expected = start + sum(changes) / 2
        # Two float32 passes through the model stand between the activations.
        assert np.abs(merged[key] - expected).max() <= 2e-5, key
    assert report["kept"] == "start" and set(report["tokens"]) == {"grams", "held_out"}
    assert report["tokens"]["grams"] == sum(batch.real_tokens for batch in read.values())


def test_squares_are_torchs_squared_gradients(models):
    config = ModelConfig.from_dir(models / "a")
    _, read = batches(models, "a", 2)
    params = hf.load_params(models / "a", config, dtype=np.float32)
    squares = contributions.squares(config, params, iter(read), np.float32, "none")
    network = transformers.AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.float32)
    expected = {name: np.zeros(tuple(p.shape)) for name, p in network.named_parameters()}
    rows = [
        jax.tree.map(lambda array, i=i: array[i : i + 1], batch) for batch in read for i in range(len(batch.tokens))
    ]
    for row in rows:
        network.zero_grad()
        for tokens, mask in documents(row):
            ids = torch.tensor(tokens[None]).long()
            scores = network(ids).logits[0, :-1].log_softmax(-1)
            picked = scores.gather(1, ids[0, 1:, None])[:, 0]
            (-(picked * torch.tensor(mask[1:])).sum()).backward()
        for name, p in network.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad.double().numpy() ** 2
    for row in spec.table(config):
        for layer, key in enumerate(row.hf_keys()):
            square = np.asarray(get(squares, row.path))[layer] if row.stacked else np.asarray(get(squares, row.path))
            square = square.T if row.transposed else square
            np.testing.assert_allclose(square, expected[key], rtol=2e-3, atol=1e-5 * expected[key].max(), err_msg=key)


def test_fisher_shares_are_a_weighted_mean():
    rng = np.random.default_rng(0)
    plain = [rng.normal(size=(2, 3, 4)) for _ in range(3)]
    squares = [rng.random((2, 3, 4)) for _ in range(3)]
    squares[0][:, 0] = squares[1][:, 0] = squares[2][:, 0] = 0
    weighted = contributions._weighted([jnp.asarray(p) for p in plain], [jnp.asarray(f) for f in squares], (1, 2))
    shares = [f / f.mean((1, 2), keepdims=True) for f in squares]
    total = sum(shares)
    expected = np.where(total > 0, sum(s * 3 * p for s, p in zip(shares, plain, strict=True)) / np.where(total > 0, total, 1), sum(plain))  # fmt: skip # noqa: E501
    np.testing.assert_allclose(sum(weighted), expected, rtol=1e-4, atol=1e-6)
