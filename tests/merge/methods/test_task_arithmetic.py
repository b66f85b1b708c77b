import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.reference import BF16, heavy_tailed, leaf, real_sized


@pytest.mark.parametrize("make", [heavy_tailed, real_sized])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_equals_float64(make, normalize, scale):
    base, branches = make((64, 96), 1, branches=3)
    weights = (1.0, 0.5, 0.25)
    merged = leaf("task_arithmetic", base, branches, weight=weights, normalize=normalize, lambda_=scale)
    b = base.astype(np.float64)
    change = sum(w * (x.astype(np.float64) - b) for w, x in zip(weights, branches, strict=True))
    exact = b + scale * (change / sum(weights) if normalize else change)
    size = np.max(np.abs([base, *branches]), axis=0)
    assert np.max(np.abs(merged - exact) / size) < 4e-7


def test_no_change_is_the_base():
    base, _ = heavy_tailed((33, 7), 2)
    np.testing.assert_array_equal(leaf("task_arithmetic", base, [base, base], lambda_=0.7), base)


def test_rebase_adds_a_task_vector_to_another_model():
    backbone, (math, code) = heavy_tailed((40, 30), 3, branches=2)
    merged = leaf("task_arithmetic", math, [code], rebase=backbone)
    exact = math.astype(np.float64) + (code.astype(np.float64) - backbone)
    np.testing.assert_allclose(merged, exact, rtol=0, atol=3e-7)


def test_bfloat16_is_rounded_once():
    base, branches = real_sized((200, 300), 4, branches=2, delta_rms=5e-4)
    base, *branches = (m.astype(BF16) for m in (base, *branches))
    merged = leaf("task_arithmetic", base, branches, lambda_=0.5).astype(BF16)
    exact = base.astype(np.float64) + 0.5 * sum(x.astype(np.float64) - base.astype(np.float64) for x in branches)
    assert np.mean(merged == exact.astype(BF16)) >= 0.999


@pytest.mark.parametrize("method", ["ties", "sce", "linear"])
def test_int8_mask_is_accepted_with_a_note(method):
    recipe = {"merge_method": method, "base_model": "base", "models": ["base", "a"], "parameters": {"int8_mask": True}}
    assert read_recipe(recipe).notes == ("recipe: int8_mask has no effect: masks are never kept in memory whole",)
    assert "int8_mask" not in METHODS[method].parameters
    with pytest.raises(UserError, match="int8_mask: expected true or false, found 3"):
        read_recipe({**recipe, "parameters": {"int8_mask": 3}})
