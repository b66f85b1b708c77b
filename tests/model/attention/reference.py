"""Attention over the whole square, differentiated by jax: what every backend must equal."""

import jax
import jax.numpy as jnp
import numpy as np


def dense(q, k, v, segments, window=None):
    """softmax(q k / sqrt(H)) v."""
    B, T, N, H = q.shape
    k, v = (jnp.repeat(a, N // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    index = jnp.arange(T)
    allowed = (index[None, :] <= index[:, None]) & (index[:, None] - index[None, :] < (window or T))
    allowed = allowed[None] & (segments[:, :, None] == segments[:, None, :])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1), v)


def packed(batch, length, heads, kv_heads, size, seed=0, documents=5):
    """Random q, k, v, segments (documents one after another, padding 0 at the end) and a weight for the output."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, length, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.sort(rng.integers(1, documents + 1, (batch, length)), axis=1).astype(np.int32)
    segments[:, length - length // 16 :] = 0
    return q, k, v, segments, rng.normal(size=q.shape).astype(np.float32)


def value_and_gradients(function):
    """(q, k, v, segments, weight) -> output and gradients of its weighted sum, jitted."""

    def total(q, k, v, segments, weight):
        out = function(q, k, v, segments)
        return jnp.sum(out * weight), out

    @jax.jit
    def run(*inputs):
        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*inputs)
        return out, *gradients

    return run


def assert_equal_to_dense(function, inputs, window=None, atol=2e-5):
    got = value_and_gradients(function)(*inputs)
    want = value_and_gradients(lambda *x: dense(*x, window))(*inputs)
    for a, b, name in zip(got, want, ("out", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)
