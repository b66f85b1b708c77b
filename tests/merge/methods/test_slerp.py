import numpy as np
import pytest

from tests.merge.reference import heavy_tailed, leaf, real_sized


def exact(base, branch, t):
    """Shoemake's formula in float64."""
    a, b = base.astype(np.float64), branch.astype(np.float64)
    angle = 2 * np.arcsin(np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) / 2)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("make", [heavy_tailed, real_sized])
def test_equals_float64(make, t):
    base, (branch,) = make((64, 96), 1)
    merged = leaf("slerp", base, [branch], t=t)
    rms = np.sqrt(np.mean(base.astype(np.float64) ** 2))
    np.testing.assert_allclose(merged, exact(base, branch, t), rtol=3e-7, atol=1e-6 * rms)


def test_models_far_apart_in_direction_and_length():
    rng = np.random.default_rng(2)
    base, branch = rng.standard_normal((2, 20, 30)).astype(np.float32)
    merged = leaf("slerp", base, [5 * branch], t=0.25)
    np.testing.assert_allclose(merged, exact(base, 5 * branch, 0.25), atol=3e-6)


def test_the_ends_are_the_models_and_equal_models_stay():
    base, (branch,) = heavy_tailed((33, 7), 3)
    np.testing.assert_array_equal(leaf("slerp", base, [branch], t=0.0), base)
    np.testing.assert_allclose(leaf("slerp", base, [branch], t=1.0), branch, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(leaf("slerp", base, [base], t=0.4), base)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_opposite_and_zero_tensors_are_mixed_along_the_line(sign):
    base, _ = heavy_tailed((5, 9), 4)
    merged = leaf("slerp", base, [(sign * base).astype(np.float32)], t=0.25)
    np.testing.assert_allclose(merged, (0.75 + 0.25 * sign) * base, rtol=1e-6, atol=1e-7)


def test_one_element_and_a_vector():
    np.testing.assert_allclose(leaf("slerp", np.float32([2.0]), [np.float32([4.0])], t=0.5), [3.0], rtol=1e-6)
    base, (branch,) = heavy_tailed((17,), 5)
    np.testing.assert_allclose(leaf("slerp", base, [branch], t=0.3), exact(base, branch, 0.3), rtol=1e-6, atol=1e-7)
