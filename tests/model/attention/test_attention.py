"""Every backend, on one device and on meshes, equals the dense formula: values and gradients, packed, GQA."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.model.attention import rows, tiles
from bmjax.model.attention.dispatch import causal_attention
from bmjax.model.attention.options import AttentionOptions
from bmjax.parallel.mesh import make_mesh
from tests.model.attention.reference import assert_equal_to_dense, packed, value_and_gradients

MESHES = {
    "batch": {"data": 2, "fsdp": 4},
    "tensor": {"fsdp": 2, "tensor": 4},
    "context 2": {"fsdp": 2, "context": 2, "tensor": 2},
    "context 4": {"context": 4, "tensor": 2},
    "context 8": {"context": 8},
}
EXCHANGES = ("ulysses", "gather", "ring")


@pytest.mark.parametrize(
    ("length", "window"), [(100, None), (300, 37), (1024, None), (1030, None), (1300, 200), (2048, None)]
)
def test_xla(length, window):
    limit = None if window is None else jnp.int32(window)
    assert (length > rows.LONGEST) == (length > 1024)  # both forms are tested
    assert_equal_to_dense(lambda *x: causal_attention(*x, limit), packed(2, length, 4, 2, 8), window)


needs_tokamax = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
TOKAMAX = pytest.param("tokamax", marks=needs_tokamax)


@pytest.mark.parametrize("backend", ["xla", "splash", TOKAMAX])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_heads_in_groups(backend, heads):
    length = 1100 if backend == "xla" else 256
    assert_equal_to_dense(
        lambda *x: causal_attention(*x, None, AttentionOptions(backend)), packed(1, length, *heads, 16)
    )


@pytest.mark.parametrize(("mesh", "exchange", "kv_heads"), [
    ("batch", "auto", 2), ("tensor", "auto", 8), ("tensor", "auto", 2),
    *((mesh, exchange, 2) for mesh in ("context 2", "context 4", "context 8") for exchange in EXCHANGES),
    *(("context 4", exchange, 8) for exchange in EXCHANGES),
])  # fmt: skip
def test_meshes(mesh, exchange, kv_heads):
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        inputs = packed(8, 64, 8, kv_heads, 8, seed=1)
        assert_equal_to_dense(lambda *x: causal_attention(*x, None, AttentionOptions("xla", exchange)), inputs)


@pytest.mark.parametrize("backend", ["splash", TOKAMAX])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_kernels_on_a_mesh(exchange, backend):
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 2, "tensor": 2})):
        inputs = packed(2, 256, 8, 2, 16, seed=2)
        assert_equal_to_dense(lambda *x: causal_attention(*x, None, AttentionOptions(backend, exchange)), inputs)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_windows_on_a_mesh(exchange):
    with jax.set_mesh(make_mesh({"context": 4, "tensor": 2})):
        inputs = packed(1, 512, 8, 4, 8, seed=3)
        function = lambda *x: causal_attention(*x, jnp.int32(50), AttentionOptions("xla", exchange))  # noqa: E731
        assert_equal_to_dense(function, inputs, window=50)


@pytest.mark.parametrize("shape", [(3, 60, 8, 2), (8, 60, 6, 3), (8, 63, 7, 7)])
def test_indivisible_rows_and_heads_stay_whole(shape):
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 2, "tensor": 2})):
        assert_equal_to_dense(causal_attention, packed(*shape, 8))


@pytest.mark.parametrize(("backend", "length"), [
    ("xla", 256), ("xla", 1280), ("splash", 256), pytest.param("tokamax", 256, marks=needs_tokamax),
])  # fmt: skip
def test_packed_equals_alone(backend, length):
    """Each document of a row whatever lies around it: nothing of another enters, not a bit."""
    q, k, v, segments, weight = packed(1, length, 4, 2, 16, seed=4)
    run = value_and_gradients(lambda *x: causal_attention(*x, None, AttentionOptions(backend)))
    whole = run(q, k, v, segments, weight)
    for document in np.unique(segments):
        others = (segments != document)[..., None, None]
        noise = np.random.default_rng(5).normal(size=q.shape).astype(np.float32)
        mixed = [np.where(others, noise[:, :, : x.shape[2]], x) for x in (q, k, v)]
        again = run(*mixed, segments, weight)
        mine = segments == document
        for a, b in zip(again, whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[mine], np.asarray(b)[mine])


def test_segments_in_any_order():
    """Ids need not rise along the row."""
    q, k, v, _, weight = packed(2, 1500, 2, 1, 8, seed=6)
    segments = np.repeat(np.random.default_rng(7).integers(0, 4, (2, 30)), 50, axis=1).astype(np.int32)
    assert_equal_to_dense(causal_attention, (q, k, v, segments, weight))


def test_a_query_with_nothing_to_see():
    q, k, v, segments, _ = packed(1, 64, 2, 1, 8, seed=8)
    out, lse = tiles.attention(q, k, v, segments, segments + 10)
    assert not np.any(out) and np.all(lse == tiles.MASKED)
    out, lse = tiles.attention(q, k, v, segments, segments, -64)  # all keys come later
    assert not np.any(out) and np.all(lse == tiles.MASKED)


@pytest.mark.parametrize("compared", ["values", "gradients"])
def test_log_sums(compared):
    q, k, v, segments, _ = packed(1, 96, 2, 2, 8, seed=9)

    def dense(q, k):
        scores = jnp.einsum("btnh,bsnh->btns", q, k) * 8**-0.5
        allowed = (
            np.tril(np.ones((96, 96), bool))[None, :, None] & (segments[:, :, None] == segments[:, None])[:, :, None]
        )
        return jax.nn.logsumexp(jnp.where(allowed, scores, -jnp.inf), axis=-1)

    def tiled(q, k):
        return tiles.attention(q, k, v, segments, segments)[1]

    if compared == "values":
        np.testing.assert_allclose(tiled(q, k), dense(q, k), atol=1e-5)
        return
    weight = np.random.default_rng(10).normal(size=(1, 96, 2))
    got, want = (jax.grad(lambda *x: jnp.sum(f(*x) * weight), (0, 1))(q, k) for f in (tiled, dense))  # noqa: B023
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [512, 1024])
def test_short_rows_hardly_compute_the_masked_half(length):
    computed = sum((stop - start) * stop for start, stop in rows.blocks(length))
    assert computed / length**2 <= 0.63


@pytest.mark.parametrize(("document", "most"), [(16_384, 0.55), (4096, 0.16), (512, 0.06)])
def test_tiles_visit_what_is_seen(document, most):
    """Of all pairs of tiles: half for one document, hardly more than the documents' own squares otherwise."""
    length, sizes = 16_384, (tiles.QUERIES, tiles.KEYS)
    segments = jnp.asarray(np.arange(length)[None] // document + 1, jnp.int32)
    low, high = tiles.visits(sizes, segments, segments, jnp.int32(0), jnp.int32(2**30))
    visited = int(jnp.sum(high - low)) * sizes[0] * sizes[1]
    assert visited / length**2 <= most


def test_long_rows_never_build_the_square():
    """Temporaries of values and gradients at 32,768 tokens: below a hundredth of one head's square."""
    length = 32_768
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.bfloat16) for n in (2, 1, 1)]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(q, k, v, segments):
        return jnp.sum(causal_attention(q, k, v, segments).astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2 * 4 / 25


@pytest.mark.parametrize(("length", "window", "message"), [
    (100, None, "splash needs rows of a multiple of 128 tokens, not 100"),
    (128, 5, "splash knows no sliding window"),
])  # fmt: skip
def test_splash_says_why_it_cannot(length, window, message):
    q, k, v, segments, _ = packed(1, length, 2, 1, 8)
    with pytest.raises(UserError, match=message):
        causal_attention(q, k, v, segments, window, AttentionOptions("splash"))


def test_ulysses_needs_heads():
    with jax.set_mesh(make_mesh({"context": 4, "tensor": 2})), pytest.raises(UserError, match="ulysses gives each"):
        causal_attention(*packed(1, 64, 4, 2, 8)[:4], None, AttentionOptions("xla", "ulysses"))
