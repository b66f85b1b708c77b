import numpy as np
import pytest

from tests.merge.reference import heavy_tailed, leaf, real_sized


@pytest.mark.parametrize("t", [0.0, 1e-4, 5e-3, 10.0])
@pytest.mark.parametrize("make", [heavy_tailed, real_sized])
def test_equals_float64(make, t):
    base, (branch,) = make((64, 96), 1)
    a, b = base.astype(np.float64), branch.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.nan_to_num(np.float64(np.float32(t)) / np.abs(b - a), nan=1.0), 0, 1)
    size = np.maximum(np.abs(base), np.abs(branch))
    assert np.max(np.abs(leaf("nearswap", base, [branch], t=t) - (a + share * (b - a))) / size) < 2e-7


def test_near_values_are_taken_and_none_moves_further_than_t():
    base, (branch,) = heavy_tailed((40, 30), 2)
    merged = leaf("nearswap", base, [branch], t=0.01)
    near = np.abs(branch - base) <= np.float32(0.01)
    assert 0.2 < near.mean() < 0.9
    np.testing.assert_array_equal(merged[near], branch[near])
    assert np.max(np.abs(merged.astype(np.float64) - base)) <= 0.01 + 1e-7
