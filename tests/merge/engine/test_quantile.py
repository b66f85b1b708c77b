import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.merge.engine import quantile
from bmjax.parallel.mesh import make_mesh

RNG = np.random.default_rng(0)
CASES = {
    "normal": np.abs(RNG.standard_normal((97, 33))),
    "heavy": np.abs(RNG.standard_t(1, (50, 41))),
    "tiny": 1e-38 * np.abs(RNG.standard_normal((40, 20))),
    "subnormal": 1e-42 * np.abs(RNG.standard_normal(500)),
    "ties": RNG.integers(0, 4, (64, 8)),
    "equal": np.full((5, 7), 0.3),
    "zeros": np.zeros(12),
    "half zeros": np.maximum(RNG.standard_normal(1001), 0),
    "one": np.array([2.5]),
    "scalar": np.array(2.5),
    "three dimensions": np.abs(RNG.standard_normal((4, 5, 6))),
    "largest": np.array([np.finfo(np.float32).max, np.inf, 0.0, 1.0]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_sort(name):
    x = CASES[name].astype(np.float32)
    ranks = sorted({0, x.size // 3, x.size // 2, x.size - 1, *(quantile.rank(q, x.size) for q in (0.25, 0.5, 0.75))})
    statistics = jax.jit(lambda a: quantile.order_statistics(a, ranks))(x)
    np.testing.assert_array_equal(statistics, np.sort(x.ravel())[ranks])


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), (("fsdp", "tensor"), None), (None, ("fsdp", "tensor"))])
def test_sharded_equals_a_sort(spec):
    x = np.abs(RNG.standard_normal((64, 96))).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec(*spec)))
    ranks = [0, 1000, 3071, 6143]
    np.testing.assert_array_equal(
        jax.jit(lambda a: quantile.order_statistics(a, ranks))(placed), np.sort(x.ravel())[ranks]
    )


def test_both_ways_of_counting_agree():
    bits = RNG.integers(0, 1000, (33, 17)).astype(np.int32)
    limits = np.array([-1, 0, 500, 999], np.int32)
    expected = [(bits < limit).sum() for limit in limits]
    np.testing.assert_array_equal(quantile._counts_by_rows(bits, limits), expected)
    np.testing.assert_array_equal(quantile._counts_at_once(bits, limits), expected)


def test_accelerators_reduce_scalars_only():
    """What a TPU or GPU runs moves no elements between devices, whatever the sharding."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(np.ones((64, 96), np.int32), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    text = jax.jit(quantile._counts_at_once).lower(placed, np.zeros(3, np.int32)).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "collective-permute" not in text


def test_order_does_not_matter():
    x = np.abs(RNG.standard_normal(999)).astype(np.float32)
    ranks = [quantile.rank(q, 999) for q in (0.25, 0.5, 0.75)]
    assert ranks == [249, 499, 748]
    np.testing.assert_array_equal(
        quantile.order_statistics(x, ranks), quantile.order_statistics(RNG.permutation(x), ranks)
    )


@pytest.mark.parametrize("x, ranks", [(np.zeros(0), [0]), (np.zeros(3), [3]), (np.zeros(3), [-1])])
def test_impossible_ranks(x, ranks):
    with pytest.raises(ValueError, match="order_statistics"):
        quantile.order_statistics(jax.numpy.asarray(x, jax.numpy.float32), ranks)
