import numpy as np
import pytest

from tests.merge.reference import BF16, heavy_tailed, leaf, merge_arrays, real_sized


@pytest.mark.parametrize("make", [heavy_tailed, real_sized])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.9), (0.0, 1.0, 0.0), (1.5, -0.5, 0.25)])
def test_equals_float64(make, normalize, weights):
    base, branches = make((64, 96), 1, branches=2)
    models = [base, *branches]
    merged, kept = merge_arrays("linear", None, models, weight=weights, normalize=normalize)
    exact = sum(w * x.astype(np.float64) for w, x in zip(weights, models, strict=True))
    exact = exact / sum(weights) if normalize else exact
    scale = np.max(np.abs(models), axis=0) * max(1, *map(abs, weights))
    assert np.max(np.abs(merged - exact) / scale) < 4e-7
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(kept, 1)


def test_equal_models_stay_bit_for_bit():
    base, _ = heavy_tailed((33, 7), 2)
    merged = leaf("linear", None, [base] * 3, weight=(0.34, 0.33, 0.33))
    np.testing.assert_array_equal(merged, base)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (2, 3, 4)])
def test_any_shape(shape):
    x, y = np.full(shape, 1.0, np.float32), np.full(shape, 2.0, np.float32)
    merged = leaf("linear", None, [x, y], weight=(3.0, 1.0))
    assert merged.shape == shape
    np.testing.assert_allclose(merged, 1.25, rtol=1e-6)


def test_bfloat16_is_rounded_once():
    base, branches = real_sized((200, 300), 3, branches=2)
    models = [m.astype(BF16) for m in (base, *branches)]
    merged = leaf("linear", None, models, weight=(0.34, 0.34, 0.34)).astype(BF16)
    exact = sum(m.astype(np.float64) for m in models) / 3
    assert np.mean(merged == exact.astype(BF16)) >= 0.999
