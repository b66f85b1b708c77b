"""The lookup on any mesh is the lookup: values, and gradients summed over repeated tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.model.embedding import lookup
from bmjax.parallel.mesh import make_mesh, sharding

MESHES = [
    {},
    {"data": 8},
    {"fsdp": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 8},
]


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2}])
def test_many_equal_tokens_in_bfloat16(mesh):
    """Sums of small numbers to large ones, as frequent tokens have them, are not lost in the table's type."""
    with jax.set_mesh(make_mesh(mesh)):
        table, tokens = jnp.ones((8, 4), jnp.bfloat16), jnp.zeros((8, 512), jnp.int32)
        gradient = jax.jit(jax.grad(lambda e: jnp.sum(lookup(e, tokens).astype(jnp.float32))))(table)
    assert gradient[0, 0] == 4096 and gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("shape", [(8, 6, 48, 16), (3, 5, 49, 16), (8, 6, 48, 15), (3, 6, 48, 16)])
def test_any_mesh(mesh, shape):
    """Where the mesh divides rows, tokens, vocabulary and width, and where it does not."""
    B, T, V, D = shape
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V // 4, (B, T)).astype(np.int32)
    weight = rng.normal(size=(B, T, D)).astype(np.float32)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, sharding(mesh, ("vocab", "embed"), table.shape))
        out = jax.jit(lookup)(placed, tokens)
        gradient = jax.jit(jax.grad(lambda e: jnp.sum(lookup(e, tokens) * weight)))(placed)
    np.testing.assert_array_equal(out, table[tokens])
    want = np.zeros((V, D))
    np.add.at(want, tokens, weight)
    np.testing.assert_allclose(gradient, want, atol=1e-5)
