"""Curves, thinned and smoothed, against formulas."""

import math

import numpy as np
import pytest

from bmjax.report.records import smoothed, thinned


def test_curves_are_thinned_and_smoothed():
    rng = np.random.default_rng(0)
    y = rng.standard_normal(10_007)
    points = list(enumerate(y.tolist()))
    thin = thinned(points, 400)
    assert len(thin) == math.ceil(10_007 / 26)
    assert thin[3] == pytest.approx((np.mean(range(78, 104)), np.mean(y[78:104])))
    assert thinned(points[:50], 400) == points[:50]
    smooth = smoothed(points[:480])
    assert [x for x, _ in smooth] == list(range(480))
    assert smooth[0][1] == pytest.approx(y[0]) and smooth[7][1] == pytest.approx(np.mean(y[:15]))
    assert smooth[200][1] == pytest.approx(np.mean(y[180:221]))
    assert smooth[479][1] == pytest.approx(np.mean(y[459:480]))
