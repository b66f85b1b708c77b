"""Every method against its formula in float64, on changes as fine-tuning leaves them and on heavy-tailed ones.

float32 results lie within a few roundings of the inputs. The only exceptions are entries whose fate (kept or dropped,
+ or -) is decided by a number within rounding of its limit: the formula says which, of at most one in a thousand.
"""

import numpy as np
import pytest

from bmjax.merge.methods import METHODS
from bmjax.merge.tree import merge_arrays
from tests.merge.formulas import FORMULAS, exact
from tests.merge.reference import BF16, heavy_tailed, real_sized

SHAPE = (128, 384)  # of all tests, because each shape is a compilation
# No few multiples of these add up to zero or to half a step of bfloat16, where rounding alone would decide.
THREE = (0.6131, 0.3719, 0.2347)
OPPOSED = (0.7313, -0.4127, 0.2719)
ROUNDINGS = 7e-7  # a dozen of float32's, of half a unit in the last place each, relative to the largest of the inputs

DATA = {
    "1e-4": lambda n: real_sized(SHAPE, 1, delta_rms=1e-4, branches=n),
    "5e-4": lambda n: real_sized(SHAPE, 2, delta_rms=5e-4, branches=n),
    "heavy tails": lambda n: heavy_tailed(SHAPE, 3, branches=n),
    "bfloat16": lambda n: real_sized(SHAPE, 4, delta_rms=3e-4, branches=n),
}


def models(data, n):
    base, branches = DATA[data](n)
    stored = BF16 if data == "bfloat16" else np.float32
    return base.astype(stored), [x.astype(stored) for x in branches]


CASES = [
    ("linear", 3, {}),
    ("linear", 3, {"weight": THREE, "normalize": False}),
    ("linear", 3, {"weight": OPPOSED}),
    ("passthrough", 1, {"scale": 0.7}),
    ("nearswap", 1, {"t": 2e-4}),
    ("slerp", 1, {"t": 0.3}),
    ("slerp", 1, {"t": 1.2}),
    ("nuslerp", 2, {"weight": (0.3, 0.7)}),
    ("nuslerp", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False}),
    ("nuslerp", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True, "compat": "mergekit"}),
    ("nuslerp no base", 2, {"weight": (0.3, 0.7)}),
    ("nuslerp no base", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False}),
    ("nuslerp no base", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, {"weight": THREE}),
    ("multislerp", 3, {"weight": OPPOSED, "normalize_weights": False}),
    ("multislerp no base", 3, {"weight": THREE}),
    ("karcher", 3, {}),
    ("karcher", 3, {"weight": THREE}),
    ("model_stock", 3, {}),
    ("model_stock", 3, {"weight": THREE}),
    ("model_stock", 3, {"weight": THREE, "filter_wise": True}),
    ("task_arithmetic", 3, {"weight": OPPOSED, "lambda_": 0.7}),
    ("task_arithmetic", 3, {"weight": THREE, "normalize": True}),
    ("ties", 3, {"weight": THREE, "density": 0.5}),
    ("ties", 3, {"weight": OPPOSED, "density": (0.1, 0.5, 0.9), "lambda_": 0.7}),
    ("ties", 3, {"weight": THREE, "density": 0.1, "normalize": False, "rescale": True, "lambda_": 0.2}),
    ("ties", 3, {"weight": THREE}),
    ("breadcrumbs", 3, {"weight": THREE, "density": 0.5}),
    ("breadcrumbs", 3, {"weight": OPPOSED, "density": 0.9, "gamma": 0.2, "normalize": True}),
    ("breadcrumbs", 3, {"weight": THREE, "density": (0.1, 0.5, 0.9), "gamma": (0.0, 0.1, 0.05), "rescale": True}),
    ("breadcrumbs_ties", 3, {"weight": THREE, "density": 0.5}),
    ("breadcrumbs_ties", 3, {"weight": THREE, "density": 0.9, "normalize": True, "rescale": True}),
    ("dare_linear", 3, {"weight": THREE, "density": 0.5, "seed": 3}),
    ("dare_linear", 3, {"weight": THREE, "density": (0.1, 0.5, 0.9), "normalize": True, "lambda_": 0.3}),
    ("dare_linear", 3, {"weight": THREE, "density": 0.5, "rescale": False, "lambda_": -0.5}),
    ("dare_linear", 3, {"weight": THREE, "density": 0.5, "compat": "mergekit"}),
    ("dare_ties", 3, {"weight": THREE, "density": 0.5}),
    ("dare_ties", 3, {"weight": OPPOSED, "density": 0.5, "rescale": False}),
    ("dare_ties", 3, {"weight": THREE, "density": 0.5, "normalize": True, "compat": "mergekit"}),
    ("della", 3, {"weight": THREE, "density": 0.5, "seed": 5}),
    ("della", 3, {"weight": OPPOSED, "density": (0.3, 0.5, 0.7), "epsilon": (0.0, 0.5, 0.3), "normalize": False}),
    ("della_linear", 3, {"weight": THREE, "density": 0.5}),
    ("della_linear", 3, {"weight": THREE, "density": 0.4, "epsilon": 0.1, "normalize": True, "rescale": False}),
    ("sce", 3, {}),
    ("sce", 3, {"select_topk": 0.1}),
    ("sce", 3, {"select_topk": 0.6}),
    ("ram", 3, {}),
    ("ram", 3, {"epsilon": 2e-4}),
    ("ramplus_tl", 3, {"epsilon": 2e-4}),
    ("ramplus_tl", 3, {"epsilon": 3e-4, "r": 0.5, "alpha": 2.0}),
    ("arcee_fusion", 1, {}),
    ("arcee_fusion", 3, {"lambda_": 0.6}),
    ("arcee_fusion", 3, {"combine": "sum", "lambda_": 0.6}),
    ("arcee_fusion", 3, {"importance": "tensor"}),
]  # fmt: skip


def label(case):
    method, _, parameters = case
    return " ".join([method, *(f"{k}={v}".replace(" ", "") for k, v in parameters.items())])


def inputs(case, data):
    name, n, parameters = case
    method = name.removesuffix(" no base")
    base, branches = models(data, n)
    without = METHODS[method].base == "unused" or name != method
    return method, None if without else base, branches, parameters


def test_every_method_has_a_formula_and_cases():
    assert FORMULAS.keys() == METHODS.keys()
    assert {name.removesuffix(" no base") for name, _, _ in CASES} == METHODS.keys()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_equals_float64(case, data):
    method, base, branches, parameters = inputs(case, data)
    merged, kept = merge_arrays(method, base, branches, **parameters)
    merged, expected = np.asarray(merged), exact(method, base, branches, **parameters)
    every = [x.astype(np.float64) for x in ([] if base is None else [base]) + branches]
    size = np.maximum(np.max(np.abs(every), axis=0), np.abs(expected.value))
    wrong = np.abs(merged - expected.value) > ROUNDINGS * size
    assert expected.unsure.mean() <= 1e-3
    assert not np.any(wrong & ~expected.unsure)
    np.testing.assert_allclose(kept, expected.kept, atol=1e-3)
    if data == "bfloat16":
        rounded = expected.value.astype(BF16)
        assert np.mean(merged.astype(BF16) == rounded) >= 0.999
