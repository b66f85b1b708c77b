"""The written-out gradients are those that jax derives from the plain formulas."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from bmjax.model import ops


@pytest.mark.parametrize(("D", "F"), [(8, 24), (24, 8)])
def test_matmul(D, F):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, D), (D, F), (2, 5, F)))
    got = jax.grad(lambda x, w: (ops.matmul(x, w) * g).sum(), (0, 1))(x, w)
    want = jax.grad(lambda x, w: ((x @ w) * g).sum(), (0, 1))(x, w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_swiglu():
    rng = np.random.default_rng(1)
    gate, up, g = (rng.normal(size=(3, 4, 5)).astype(np.float32) * 3 for _ in range(3))
    np.testing.assert_allclose(ops.swiglu(gate, up), nn.silu(gate) * up, rtol=1e-6)
    got = jax.grad(lambda a, b: (ops.swiglu(a, b) * g).sum(), (0, 1))(gate, up)
    want = jax.grad(lambda a, b: (nn.silu(a) * b * g).sum(), (0, 1))(gate, up)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
