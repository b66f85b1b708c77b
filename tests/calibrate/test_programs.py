"""Large parameters are merged block by block, from memory or from their files, which changes rounding at most."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bmjax.calibrate import dispatch, models, programs
from bmjax.model.spec import Param
from bmjax.parallel.mesh import make_mesh
from tests.calibrate.tiny_models import read_from_files_in_blocks, recipe, tensors


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factor_shape", [(12, 1), (1, 10), (1, 1), (12, 10)])
@pytest.mark.parametrize("explicit", [False, True])
def test_blocks_are_the_whole(monkeypatch, factor_shape, explicit, transposed):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    row = Param(("w",), (12, 10), ("vocab", "embed"), "w", "normal", transposed)
    trees, factors = [{"w": draw(12, 10)} for _ in range(3)], [{"w": draw(*factor_shape)} for _ in range(2)]
    shares = {("w",): [draw(12, 10) for _ in range(2)]} if explicit else {}
    base, *branches = (np.asarray(m["w"], np.float64) for m in trees)
    given = [np.asarray(s) * f["w"] for s, f in zip(
        shares.get(("w",), [(b - base) / 2 for b in branches]), factors, strict=True)]  # fmt: skip
    sums = [np.sum(sum(given) ** 2), *(np.sum(g**2) for g in given), *(np.count_nonzero(g) for g in given)]
    merged = []
    for size in (models.CHUNK, 40, 7):
        monkeypatch.setattr(models, "CHUNK", size)
        blocks = list(programs.chunks(row, trees, shares, factors))
        assert (len(blocks) > 1) == (size < 120)
        merged.append(programs.merge_part([row], trees, shares, factors, "float32", make_mesh({}))["w"])
        np.testing.assert_allclose(merged[-1], base + sum(given), rtol=1e-5, atol=1e-6)
        total = 0.0
        for index, arrays in blocks:
            block, of_block = programs.merge_chunk_with_sums(*arrays)
            assert np.array_equal(block, merged[-1][index])
            total += np.asarray(of_block).sum(-1)
        np.testing.assert_allclose(total, sums, rtol=1e-5)
    for again in merged[1:]:  # the compiler may round a product before it is added, or not
        np.testing.assert_allclose(again, merged[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("regmean", "float32"), ("layerwise", "bfloat16"), pytest.param("learned", "float32", marks=pytest.mark.slow)],
)
def test_a_merge_from_files_is_that_from_memory(models_with_embeddings, tmp_path, monkeypatch, method, dtype):
    parameters = {"steps": 0 if method == "regmean" else 1, "rows": 2, "compute_dtype": dtype}
    if method == "learned":
        parameters["along"] = "fisher"
    merge = recipe(models_with_embeddings, method, **parameters)
    expected = dispatch.merge(merge, tmp_path / "memory")
    read_from_files_in_blocks(monkeypatch)
    read, whole = [], models.OnDisk.__getitem__
    monkeypatch.setattr(
        models.OnDisk, "__getitem__", lambda leaf, index: read.append(leaf.row.hf_key) or whole(leaf, index)
    )
    report = dispatch.merge(merge, tmp_path / "files")
    assert set(read) == {"model.embed_tokens.weight", "lm_head.weight"}
    a, b = tensors(tmp_path / "memory"), tensors(tmp_path / "files")
    assert report["sources"] == expected["sources"]
    if method != "learned":
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert report["held_out_loss"] == expected["held_out_loss"]
    for name in a:  # gradients of coefficients are sums over blocks
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-6, err_msg=name)
    for stage, losses in expected["held_out_loss"].items():
        assert report["held_out_loss"][stage] == pytest.approx(losses, rel=1e-6)
    for name, summary in expected["tensors"].items():
        for key in ("moved_norm", "reference_norm"):
            assert report["tensors"][name]["merged"][key] == pytest.approx(summary["merged"][key], rel=1e-5)


@pytest.fixture(scope="module")
def models_with_embeddings(models):
    """The fixture `models`, where the branches have embeddings of their own, too."""
    for seed, name in enumerate(("a", "b")):
        path = models / name / "model.safetensors"
        weights = safetensors.numpy.load_file(path)
        noise = np.random.default_rng(seed).normal(0, 0.02, weights["model.embed_tokens.weight"].shape)
        weights["model.embed_tokens.weight"] += noise.astype(np.float32)
        safetensors.numpy.save_file(weights, path, {"format": "pt"})
    return models
