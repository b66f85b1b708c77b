import numpy as np

from bmjax.merge.methods import passthrough
from tests.merge.reference import heavy_tailed


def test_the_model_itself_or_scaled():
    model, _ = heavy_tailed((33, 7), 1)
    np.testing.assert_array_equal(passthrough(None, [model]).leaf, model)
    np.testing.assert_array_equal(passthrough(None, [model], scale=0.5).leaf, model * np.float32(0.5))
