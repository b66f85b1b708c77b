"""The random numbers of dare and della: what they are, and that they are as good as independent."""

import itertools

import jax
import numpy as np
import pytest

from bmjax.merge.engine.tensor import keys
from bmjax.merge.methods.kernels import Block, random_bits
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.cases import SHAPE
from tests.merge.formulas import exact, uniform
from tests.merge.reference import heavy_tailed, leaf, merge_arrays, real_sized

SIZE = SHAPE[0] * SHAPE[1]


def key_of(seed, tensor, model):
    recipe = read_recipe({"merge_method": "dare_linear", "base_model": "base", "models": [model], "seed": seed})
    return keys(recipe.seed, tensor, recipe.steps[0].branches)[0]


@pytest.mark.parametrize("start", [0, 2**20, 2**32 - 1000, 2**33 + 5])
def test_bits_are_the_documented_hash(start):
    """Also where a chunk crosses the 2^32nd entry of a tensor."""
    x = Block(None, [np.zeros(SHAPE, np.float32)], {}, np.array([start >> 32, start & 0xFFFFFFFF], np.uint32))
    bits = jax.jit(random_bits)(x, key_of(3, "layer.weight", "math"))
    np.testing.assert_array_equal(bits, uniform(SHAPE, 3, "layer.weight", "math", start))


def correlation(a, b):
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_numbers_are_uniform_and_independent():
    """Of models, tensors, seeds, neighbours in a row or column, and halves of the index: within 4.5 deviations."""
    shape = (512, 1024)
    draws = [
        uniform(shape, seed, tensor, model, start)
        for seed, tensor, model, start in [
            (0, "a", "math", 0), (0, "a", "code", 0), (0, "b", "math", 0), (1, "a", "math", 0), (0, "a", "math", 2**32),
        ]
    ]  # fmt: skip
    n = draws[0].size
    for draw in draws:
        counts = np.histogram(draw, bins=64, range=(0, 1))[0]
        assert np.sum((counts - n / 64) ** 2) / (n / 64) < 63 + 4.5 * np.sqrt(2 * 63)
        for lag in (1, 2, 32, 1023, 1024, 1025, 2**16):
            assert correlation(draw.ravel()[lag:], draw.ravel()[:-lag]) < 4.5 / np.sqrt(n)
    for a, b in itertools.combinations(draws, 2):
        assert correlation(a, b) < 4.5 / np.sqrt(n)
        for share in (0.05, 0.5):
            both = np.mean((a < share) & (b < share))
            assert abs(both - share**2) < 4.5 * np.sqrt(share**2 * (1 - share**2) / n)


@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_share_kept(method, density):
    base, branches = real_sized(SHAPE, 1, branches=3)
    more = {"epsilon": 0.02} if method == "della_linear" else {}
    for seed in range(4):
        _, kept = merge_arrays(method, base, branches, density=density, seed=seed, **more)
        np.testing.assert_allclose(kept, density, atol=4.5 * np.sqrt(density * (1 - density) / SIZE))


def test_dare_is_right_on_average():
    """Over seeds the kept and rescaled changes come to the whole ones."""
    base, branches = real_sized(SHAPE, 2, branches=2)
    weight, seeds = (0.6, -0.3), 100
    mean = np.mean(
        [leaf("dare_linear", base, branches, weight=weight, density=0.4, seed=i) for i in range(seeds)], axis=0,
        dtype=np.float64,
    )  # fmt: skip
    changes = [w * (x.astype(np.float64) - base) for w, x in zip(weight, branches, strict=True)]
    deviation = np.sqrt(sum(d**2 for d in changes) * (1 / 0.4 - 1) / seeds)
    score = (mean - base - sum(changes)) / np.maximum(deviation, 1e-7)
    assert np.abs(np.mean(score)) < 4.5 / np.sqrt(SIZE)
    assert np.std(score) == pytest.approx(1, abs=0.02)


def test_the_chance_of_della_rises_with_the_rank():
    base, branches = real_sized(SHAPE, 3, branches=1)
    order = np.argsort(np.abs(branches[0] - base), axis=1)
    kept = np.zeros(SHAPE[1])
    for seed in range(20):
        merged = leaf("della_linear", base, branches, density=0.4, epsilon=0.3, rescale=False, seed=seed)
        kept += np.take_along_axis(merged != base, order, 1).mean(0) / 20
    chance = np.linspace(0.1, 0.7, SHAPE[1])
    score = (kept - chance) / np.sqrt(chance * (1 - chance) / (20 * SHAPE[0]))
    assert np.abs(score).max() < 4.5
    assert np.std(score) == pytest.approx(1, abs=0.15)


def test_della_of_rows_of_one_entry():
    """Where nothing has a rank, each is kept with probability density."""
    base, branches = heavy_tailed((20_000, 1), 4, branches=2)
    merged, kept = merge_arrays("della_linear", base, branches, density=0.3, epsilon=0.3, rescale=False)
    np.testing.assert_allclose(kept, 0.3, atol=4.5 * np.sqrt(0.3 * 0.7 / 20_000))
    expected = exact("della_linear", base, branches, density=0.3, epsilon=0.3, rescale=False)
    np.testing.assert_allclose(merged, expected.value, rtol=3e-7, atol=1e-8)
