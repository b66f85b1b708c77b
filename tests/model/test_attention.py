"""Blocked attention equals the dense formula, values and gradients, on both sides of the recomputation limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.model import attention


def dense(q, k, v, segments, window):
    """softmax(q k / sqrt(H)) v over the whole square, differentiated by jax."""
    B, T, N, H = q.shape
    k, v = (jnp.repeat(a, N // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    index = jnp.arange(T)
    allowed = (index[None, :] <= index[:, None]) & (index[:, None] - index[None, :] < window)
    allowed = allowed[None] & (segments[:, :, None] == segments[:, None, :])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize(("length", "window"), [(100, None), (300, 37), (1030, None), (1030, 200)])
def test_blocks_equal_the_square(length, window):
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(2, length, n, 8)).astype(np.float32) for n in (4, 2, 2))
    segments = np.sort(rng.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    weight = rng.normal(size=q.shape).astype(np.float32)
    limit = None if window is None else jnp.int32(window)

    def blocked(q, k, v):
        return jnp.sum(attention.causal_attention(q, k, v, segments, limit) * weight)

    def square(q, k, v):
        return jnp.sum(dense(q, k, v, segments, window or length) * weight)

    got, got_grads = jax.jit(jax.value_and_grad(blocked, (0, 1, 2)))(q, k, v)
    want, want_grads = jax.jit(jax.value_and_grad(square, (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("length", [512, 4096, 16_384, 32_768])
def test_the_masked_half_is_hardly_computed(length):
    computed = sum((stop - start) * stop for start, stop in attention._blocks(length))
    assert computed / length**2 <= (0.54 if length >= 2048 else 0.63)
