"""Every method against its formula in float64, on changes as fine-tuning leaves them and on heavy-tailed ones.

float32 results lie within a few roundings of the inputs. The only exceptions are entries whose fate (kept or dropped,
+ or -) is decided by a number within rounding of its limit: the formula says which, of at most one in a thousand.
"""

import numpy as np
import pytest

from bmjax.merge.methods import METHODS
from tests.merge.cases import CASES, SHAPE, assert_near, has_base, label, method_of
from tests.merge.formulas import FORMULAS, exact
from tests.merge.reference import BF16, heavy_tailed, merge_arrays, real_sized

DATA = {
    "1e-4": lambda n: real_sized(SHAPE, 1, delta_rms=1e-4, branches=n),
    "5e-4": lambda n: real_sized(SHAPE, 2, delta_rms=5e-4, branches=n),
    "heavy tails": lambda n: heavy_tailed(SHAPE, 3, branches=n),
    "bfloat16": lambda n: real_sized(SHAPE, 4, delta_rms=3e-4, branches=n),
}


ELSEWHERE = {"fisher", "isotropic", "tsv"}  # formulas of their own, in test_fisher.py and test_singular.py


def test_every_method_has_a_formula_and_cases():
    assert FORMULAS.keys() == METHODS.keys() - ELSEWHERE
    assert {method_of(case) for case in CASES} == FORMULAS.keys()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_equals_float64(case, data):
    _, n, parameters = case
    base, branches = DATA[data](n)
    stored = BF16 if data == "bfloat16" else np.float32
    base, branches = base.astype(stored) if has_base(case) else None, [x.astype(stored) for x in branches]
    merged, kept = merge_arrays(method_of(case), base, branches, **parameters)
    merged, expected = np.asarray(merged), exact(method_of(case), base, branches, **parameters)
    assert_near(merged, expected, [base, *branches])
    np.testing.assert_allclose(kept, expected.kept, atol=1e-3)
    if data == "bfloat16":
        assert np.mean(merged.astype(BF16) == expected.value.astype(BF16)) >= 0.999
