"""Distillation from the branches: the divergence against its formula in float64, and what the whole step keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bmjax.calibrate import dispatch, distill
from bmjax.parallel.mesh import make_mesh
from tests.calibrate.tiny_models import batches, recipe, tensors


def plain(h, w, teacher, teacher_w, weights, temperature):
    """(divergence, its gradients by h and w), float64, from whole logits."""
    h, w, teacher, teacher_w, weights = (np.asarray(a, np.float64) for a in (h, w, teacher, teacher_w, weights))
    log_p = scipy.special.log_softmax(h @ w / temperature, axis=-1)
    log_t = scipy.special.log_softmax(teacher @ teacher_w / temperature, axis=-1)
    value = temperature**2 * np.sum(weights * np.sum(np.exp(log_t) * (log_t - log_p), axis=-1))
    dz = temperature * weights[..., None] * (np.exp(log_p) - np.exp(log_t))
    return value, dz @ w.T, np.einsum("btd,btv->dv", h, dz)


def example(vocab, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    h, w = draw(2, 12, 16), 2 * draw(16, vocab)
    weights = jnp.asarray(rng.random((2, 12)) * (rng.random((2, 12)) < 0.6), jnp.float32)
    return h, w, h + 0.3 * draw(2, 12, 16), w + 0.3 * draw(16, vocab), weights


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("vocab", "elements"), [(50, 2**26), (50, 24 * 50), (50, 24 * 7), (257, 24 * 16), (3, 1)])
def test_divergence_and_gradients_are_the_plain_formula(monkeypatch, vocab, elements, temperature):
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", elements)
    h, w, teacher, teacher_w, weights = example(vocab)
    value, (dh, dw) = jax.value_and_grad(distill.divergence_sum, (0, 1))(h, w, teacher, teacher_w, weights, temperature)
    expected, expected_h, expected_w = plain(h, w, teacher, teacher_w, weights, temperature)
    assert expected > 1
    assert float(value) == pytest.approx(expected, rel=2e-6)
    np.testing.assert_allclose(dh, expected_h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, expected_w, rtol=1e-4, atol=1e-5)


def test_large_logits_and_equal_models():
    h, w, _, _, weights = example(50)
    assert abs(float(distill.divergence_sum(h, w, h, w, weights))) < 1e-5
    value = float(distill.divergence_sum(100 * h, w, -100 * h, w, weights))
    assert value == pytest.approx(plain(100 * h, w, -100 * h, w, weights, 1.0)[0], rel=1e-5)


def test_divergence_on_a_mesh_is_the_same():
    arguments = example(64)
    single = jax.value_and_grad(distill.divergence_sum, (0, 1))(*arguments)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2})):
        mesh = jax.jit(jax.value_and_grad(distill.divergence_sum, (0, 1)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), single, mesh)


def test_distilling_lowers_the_loss_and_moves_what_the_branches_moved(models, tmp_path):
    settings = {"steps": 0, "polish": 0, "distill": 6, "distill_rate": 1e-3, "start": 0.3}
    report = dispatch.merge(recipe(models, **settings), tmp_path / "out")
    mean = {stage: np.mean(list(losses.values())) for stage, losses in report["held_out_loss"].items()}
    assert mean["distilled"] < mean["start"] and report["kept"] == "distilled"
    base, merged = tensors(models / "base"), tensors(tmp_path / "out")
    assert np.array_equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not np.array_equal(merged["lm_head.weight"], base["lm_head.weight"])
    # Every token of a joint batch goes through the student and through one branch.
    calibration, _ = batches(models, "a")
    tokens = sum(calibration.joint(number, "x").real_tokens for number in range(6))
    assert report["tokens"]["distilling"] == report["tokens"]["distilling_teachers"] == tokens


def test_distillation_that_does_not_help_is_not_kept(models, tmp_path):
    said = []
    settings = {"steps": 0, "distill": 2}
    report = dispatch.merge(recipe(models, distill_rate=10.0, **settings), tmp_path / "far", log=said.append)
    dispatch.merge(recipe(models, steps=0), tmp_path / "start")
    assert report["kept"] == "start" and any("distilled" in line and "not kept" in line for line in said)
    far, start = tensors(tmp_path / "far"), tensors(tmp_path / "start")
    assert far.keys() == start.keys() and all(np.array_equal(far[key], start[key]) for key in far)
