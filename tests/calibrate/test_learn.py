"""The gradient through the merge and the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.calibrate import contributions, learn
from bmjax.model.config import ModelConfig
from bmjax.weights import hf
from tests.calibrate.tiny_models import batches


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_gradient_of_coefficients_is_the_difference_quotient(models, per):
    config = ModelConfig.from_dir(models / "base")
    load = lambda name: hf.load_params(models / name, config, dtype=np.float32)  # noqa: E731
    base = load("base")
    parts = [contributions._plain(load("base"), load(name), 2) for name in ("a", "b")]
    calibration, _ = batches(models, "a")
    batch = calibration.joint(0, "learning")
    factors = [learn.coefficients(config, 1.0, per) for _ in parts]
    nats = lambda weights: learn._nats(config, learn.merged(base, parts, weights), batch, 2, "float32", "none")  # noqa: E731
    gradient = jax.grad(nats)(factors)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda k: jnp.asarray(rng.normal(size=k.shape), jnp.float32), factors)
    up, down = (float(nats(jax.tree.map(lambda k, d, s=s: k + s * d, factors, direction))) for s in (0.05, -0.05))
    expected = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert abs(expected) > 1e-4
    assert (up - down) / 0.1 == pytest.approx(expected, rel=0.02, abs=2e-5)
    # A row is an output: the last axis of a kernel here, the first of a tensor in a file.
    kernel = factors[0]["layers"]["mlp"]["down"]["kernel"]
    assert kernel.shape == ((2, 1, 32) if per == "row" else (2, 1, 1))
