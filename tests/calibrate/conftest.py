"""Two branches near a base, and rows for each."""

import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import sums, write_rows, write_student


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two branches near it, and a file of rows for each."""
    folder = tmp_path_factory.mktemp("calibrated")
    base = write_student(folder / "base")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    for seed, name in enumerate(("a", "b"), 1):
        rng = np.random.default_rng(seed)
        branch = write_student(folder / name)
        moved = {key: value if "embed" in key else value + rng.normal(0, 0.02, value.shape).astype(np.float32)
                 for key, value in tensors.items()}  # fmt: skip
        safetensors.numpy.save_file(moved, branch / "model.safetensors", {"format": "pt"})
        write_rows(folder / f"{name}.jsonl", sums(40, seed))
    return folder
