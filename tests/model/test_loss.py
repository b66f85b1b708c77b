"""The chunked loss and its own gradient equal the plain formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.model import loss
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import make_mesh


def reference(h, w, labels, mask):
    """(loss, dh, dw) by the textbook formula, float64."""
    h, w, mask = (np.asarray(a, np.float64) for a in (h, w, mask))
    z = h @ w
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    total = -np.sum(np.log(np.take_along_axis(p, labels[..., None], -1)[..., 0]) * mask)
    dz = p.copy()
    np.put_along_axis(dz, labels[..., None], np.take_along_axis(p, labels[..., None], -1) - 1, -1)
    dz *= mask[..., None]
    return total, dz @ w.T, np.einsum("btd,btv->dv", h, dz)


def nats_by_token(h, w, labels):
    """-log p(label) at every position, float64."""
    z = np.asarray(h, np.float64) @ np.asarray(w, np.float64)
    z -= z.max(-1, keepdims=True)
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("elements", [2**25, 1000])
def test_sum_and_gradients(monkeypatch, elements):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(2, 32, 16)).astype(np.float32), rng.normal(size=(16, 50)).astype(np.float32)
    labels, mask = rng.integers(0, 50, (2, 32)), (rng.random((2, 32)) < 0.4).astype(np.float32)
    mask[0, :24] = 0  # whole chunks without a target
    total, (dh, dw) = jax.jit(
        jax.value_and_grad(lambda h, w: 3.0 * loss.cross_entropy_sum(h, w, labels, mask), (0, 1))
    )(h, w)
    want, want_dh, want_dw = reference(h, w, labels, mask)
    np.testing.assert_allclose(total, 3 * want, rtol=1e-5)
    np.testing.assert_allclose(dh, 3 * want_dh, atol=1e-4)
    np.testing.assert_allclose(dw, 3 * want_dw, atol=1e-4)
    assert (loss._chunk_count(64, 50) > 1) == (elements == 1000)
    alone = jax.jit(lambda h, w: loss.cross_entropy_sum(h, w, labels, mask))(h, w)
    np.testing.assert_allclose(alone, want, rtol=1e-5)
    by_token = jax.jit(lambda h, w: loss.cross_entropy_by_token(h, w, labels))(h, w)
    np.testing.assert_allclose(by_token, nats_by_token(h, w, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [31, 32])
@pytest.mark.parametrize("elements", [2**25, 400])
@pytest.mark.parametrize(
    "mesh",
    [{"data": 2}, {"context": 2}, {"fsdp": 4, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}, {"tensor": 8}],
)
def test_any_mesh(monkeypatch, length, elements, mesh):
    """Where it divides tokens, vocabulary and width, and where it does not."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    rng = np.random.default_rng(1)
    h, w = rng.normal(size=(2, length, 16)).astype(np.float32), rng.normal(size=(16, 50)).astype(np.float32)
    labels, mask = rng.integers(0, 50, (2, length)), (rng.random((2, length)) < 0.4).astype(np.float32)
    mask[0, : length // 2] = 0

    def total(h, w):
        return 2.0 * loss.cross_entropy_sum(h, w, labels, mask)

    with jax.set_mesh(make_mesh(mesh)):
        got, (dh, dw) = jax.jit(jax.value_and_grad(total, (0, 1)))(h, w)
        alone = jax.jit(total)(h, w)
        frozen = jax.jit(jax.grad(total))(h, w)
        by_token = jax.jit(lambda h, w: loss.cross_entropy_by_token(h, w, labels))(h, w)
    want, want_dh, want_dw = reference(h, w, labels, mask)
    np.testing.assert_allclose([got, alone], 2 * want, rtol=1e-5)
    np.testing.assert_allclose(dh, 2 * want_dh, atol=1e-4)
    np.testing.assert_allclose(frozen, 2 * want_dh, atol=1e-4)
    np.testing.assert_allclose(dw, 2 * want_dw, atol=1e-4)
    np.testing.assert_allclose(by_token, nats_by_token(h, w, labels), rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """One row of 32,768 tokens, 152,064 words: temporaries beside the gradients, of one row's logits in float32."""
    length, vocab, width = 32_768, 152_064, 64
    h, w = jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16), jax.ShapeDtypeStruct((width, vocab), jnp.bfloat16)
    labels, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss.cross_entropy_sum, (0, 1)))
    memory = step.lower(h, w, labels, mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= length * vocab * 4 / 20


def test_a_frozen_head_costs_no_product():
    h, w = jnp.ones((2, 64, 32)), jnp.ones((32, 500))
    labels, mask = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))

    def flops(which):
        grad = jax.grad(lambda h, w: loss.cross_entropy_sum(h, w, labels, mask), which)
        return jax.jit(grad).lower(h, w).compile().cost_analysis()["flops"]

    product = 2 * 2 * 64 * 32 * 500
    assert flops((0, 1)) - flops(0) > 0.95 * product


def test_targets_are_the_next_tokens_of_the_same_document():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    labels, mask = loss.next_token_targets(Batch(tokens, segments, jnp.array([[1, 1, 1, 0, 1, 1]])))
    assert labels.tolist() == [[6, 7, 8, 9, 0, 0]]
    assert mask.tolist() == [[1, 0, 0, 1, 0, 0]]
