"""Every merge method with parameters of every kind, for tests that hold for all of them."""

import numpy as np

from bmjax.merge.methods import METHODS

SHAPE = (120, 384)  # of most tests, because each shape is a compilation
# No few multiples of these add up to zero or to half a step of bfloat16, where rounding alone would decide.
THREE = (0.6131, 0.3719, 0.2347)
OPPOSED = (0.7313, -0.4127, 0.2719)
ROUNDINGS = 1e-6  # sixteen of float32's, of half a unit in the last place each, relative to the largest of the inputs

# Method ("no base": one that can do without), how many branches, parameters.
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


def method_of(case):
    return case[0].removesuffix(" no base")


def has_base(case):
    return case[0] == method_of(case) and METHODS[method_of(case)].base != "unused"


def assert_near(merged, expected, inputs):
    """merged: float32, within `ROUNDINGS` of an `Exact`; entries that rounding decides may differ (one in 1000)."""
    every = [np.abs(x.astype(np.float64)) for x in inputs if x is not None]
    size = np.maximum(np.max(every, axis=0), np.abs(expected.value))
    wrong = np.abs(merged - expected.value) > ROUNDINGS * size
    assert expected.unsure.mean() <= 1e-3
    assert not np.any(wrong & ~expected.unsure)
