import numpy as np
import pytest

from tests.merge.cases import SHAPE
from tests.merge.formulas import exact
from tests.merge.reference import BF16, leaf, real_sized


@pytest.mark.parametrize("select_topk", [0.15, 0.3, 0.6])
def test_entries_that_vary_equally_share_their_fate(select_topk):
    """Small changes of bfloat16 models are one or two steps, so that whole classes of entries vary by the same."""
    base, branches = real_sized(SHAPE, 4, delta_rms=1e-4, branches=3)
    base, branches = base.astype(BF16), [x.astype(BF16) for x in branches]
    merged = leaf("sce", base, branches, select_topk=select_topk)
    expected = exact("sce", base, branches, select_topk=select_topk)
    np.testing.assert_array_equal(merged != base, expected.value != base)
    assert np.mean(merged.astype(BF16) == expected.value.astype(BF16)) >= 0.9999
