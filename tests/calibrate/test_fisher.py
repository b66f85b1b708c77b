"""Squared gradients are torch's, tied and sharded, and Fisher's shares a weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from bmjax.calibrate import fisher, learn, programs
from bmjax.calibrate.models import Models, whole
from bmjax.calibrate.progress import Progress
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model import parts, spec
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.parallel.mesh import make_mesh, sharding
from tests.calibrate.tiny_models import batches, documents, read_from_files_in_blocks, recipe
from tests.conftest import write_student


@pytest.mark.parametrize(("tied", "mesh"), [(False, {}), (True, {}), (False, {"fsdp": 2, "tensor": 2})])
def test_squares_are_torchs_squared_gradients(models, tmp_path, tied, mesh):
    directory = models / "a"
    if tied:
        directory = write_student(tmp_path / "tied", tie_word_embeddings=True)
    config = ModelConfig.from_dir(directory)
    _, read = batches(models, "a", 2)
    of_step = Models({"a": directory}, config, make_mesh(mesh))
    with jax.set_mesh(of_step.mesh):
        placed = [
            jax.device_put(batch, sharding(of_step.mesh, ("batch", "length"), batch.tokens.shape)) for batch in read
        ]
        progress = Progress(tmp_path / "progress.jsonl")
        fisher.squares(of_step, "a", placed, "float32", tmp_path, "a", progress)
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
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
        for key in row.hf_keys():
            square = np.load(fisher.squares_file(tmp_path, "a", key))
            np.testing.assert_allclose(square, expected[key], rtol=2e-3, atol=1e-5 * expected[key].max(), err_msg=key)


@pytest.mark.parametrize(("in_blocks", "mesh"), [(False, {}), (True, {"fsdp": 2, "tensor": 2})])
def test_contributions_of_parts_are_weighted_by_squares(models, tmp_path, monkeypatch, in_blocks, mesh):
    """Means are those of whole tensors, however small the blocks are that are weighted."""
    if in_blocks:
        read_from_files_in_blocks(monkeypatch)
    config = ModelConfig.from_dir(models / "base")
    calibration, _ = batches(models, "a")
    (step,) = read_recipe(recipe(models, along="fisher", rows=2)).steps
    of_step = Models({name: models / name for name in ("base", "a", "b")}, config, make_mesh(mesh))
    calibration.mesh = of_step.mesh
    with jax.set_mesh(of_step.mesh):
        progress = Progress(tmp_path / "progress.jsonl")
        along = fisher.Fisher(of_step, calibration, step.calibration, tmp_path, progress)
        for part in range(parts.count(config)):
            loaded = of_step.load(part)
            shares = along.shares(part, loaded)
            rows = parts.rows(config, part)
            factors = [learn.coefficients(rows, 1.0, "tensor") for _ in "ab"]
            for row in rows:
                together = [np.zeros(row.shape) for _ in "ab"]
                blocks = list(programs.chunks(row, loaded, shares, factors))
                assert (len(blocks) > 1) == (in_blocks and row.shape in ((300, 32), (32, 300)))
                for index, (_, of_block, _) in blocks:
                    for array, block in zip(together, of_block, strict=True):
                        array[index] = block
                start, *changed = (np.asarray(get(whole(tree), row.path), np.float64) for tree in loaded)
                files = [fisher.squares_file(tmp_path, f"fisher-{i}", row.hf_key) for i in range(2)]
                squares = [np.load(file).astype(np.float64) for file in files]
                squares = [(f.T if row.transposed else f) / f.mean() for f in squares]
                total = sum(squares)
                for array, square, leaf in zip(together, squares, changed, strict=True):
                    share = np.where(total > 0, square / np.where(total > 0, total, 1), 0.5)
                    np.testing.assert_allclose(array, share * (leaf - start), rtol=1e-5, atol=1e-7, err_msg=row.hf_key)


def test_fisher_shares_are_a_weighted_mean():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 4))
    changes = [rng.normal(size=(3, 4)) for _ in range(3)]
    squares = [rng.random((3, 4)) for _ in range(3)]
    squares[0][0] = squares[1][0] = squares[2][0] = 0
    models = [jnp.asarray(x) for x in (base, *(base + change for change in changes))]
    weighted = fisher.weighted(models, [jnp.asarray(f) for f in squares], [np.float32(f.mean()) for f in squares])
    shares = [f / f.mean() for f in squares]
    total = sum(shares)
    mean = sum(s * c for s, c in zip(shares, changes, strict=True)) / np.where(total > 0, total, 1)
    expected = np.where(total > 0, mean, sum(changes) / 3)
    np.testing.assert_allclose(sum(weighted), expected, rtol=1e-4, atol=1e-6)
