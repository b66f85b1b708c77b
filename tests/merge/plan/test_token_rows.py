from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bmjax.io.safetensors import TensorInfo
from bmjax.merge.plan.token_rows import row_reader

ROWS = np.array([3, 4, 5, -1, 0, -1, 2, 2, -1, 7], np.int64)
OTHERS = [np.array([-1, -1, -1, 1, -1, 0, -1, -1, -1, -1]), np.array([-1, -1, -1, 2, -1, -1, -1, -1, -1, -1])]


@pytest.mark.parametrize("key, shape", [("t", (8, 5)), ("t", (8,)), ("final_logits_bias", (1, 8))])
@pytest.mark.parametrize("dtype, name", [(np.float32, "F32"), (ml_dtypes.bfloat16, "BF16")])
def test_rows_are_read_in_the_results_order(key, shape, dtype, name):
    rng = np.random.default_rng(0)
    files = {f"{i}.{key}": rng.standard_normal(shape).astype(dtype) for i in range(3)}
    infos = [TensorInfo(stored, Path("x"), name, shape, 0, value.nbytes) for stored, value in files.items()]
    reads = []

    def read(info, start, out):
        reads.append((info.name, start, len(out)))
        out[...] = files[info.name].reshape(-1)[start : start + len(out)]

    by_row = [value.reshape(8, -1) for value in files.values()]
    expected = np.zeros((len(ROWS), by_row[0].shape[1]), dtype)
    for i, row in enumerate(ROWS):
        lent = [by_row[k + 1][at[i]].astype(np.float32) for k, at in enumerate(OTHERS) if at[i] >= 0]
        expected[i] = by_row[0][row] if row >= 0 else np.mean(lent, axis=0).astype(dtype) if lent else 0
    flat = expected.reshape(-1)
    fill = row_reader(infos[0], ROWS, list(zip(infos[1:], OTHERS, strict=True)), read)
    for start in range(0, len(flat), 3):
        for end in (start + 1, start + 2, start + 7, len(flat)):
            out = np.full(min(end, len(flat)) - start, np.nan, dtype)
            fill(start, out)
            np.testing.assert_array_equal(out, flat[start : start + len(out)])
    reads.clear()
    fill(0, np.empty(len(flat), dtype))
    width = flat.size // len(ROWS)
    assert reads[0] == (f"0.{key}", 3 * width, 3 * width) and len(reads) == 8
