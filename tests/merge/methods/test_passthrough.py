import numpy as np

from tests.merge.reference import heavy_tailed, leaf


def test_the_model_itself_or_scaled():
    model, _ = heavy_tailed((33, 7), 1)
    np.testing.assert_array_equal(leaf("passthrough", None, [model]), model)
    np.testing.assert_array_equal(leaf("passthrough", None, [model], scale=0.5), model * np.float32(0.5))
