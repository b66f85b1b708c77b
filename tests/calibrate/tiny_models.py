"""A recipe over the fixture `models`, and what it reads."""

import jax
import numpy as np
import safetensors.numpy

from bmjax.calibrate import data, models
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import student

SMALL = {"rows": 4, "held_out": 4, "seq_len": 128, "steps": 3, "remat": "none", "mesh": {}}


def recipe(folder, method="learned", **parameters):
    return {
        "merge_method": method,
        "base_model": "base",
        "sources": {name: str(folder / name) for name in ("base", "a", "b")},
        "models": [{"model": name, "data": str(folder / f"{name}.jsonl")} for name in ("a", "b")],
        "parameters": SMALL | parameters,
    }


def tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def batches(folder, name, count=4):
    """(calibration, that domain's batches) as the merge reads them."""
    (step,) = read_recipe(recipe(folder)).steps
    base = student.open(folder / "base", purpose="calibration")
    calibration = data.read(step, step.calibration, 0, base, make_mesh({}))
    rows = calibration.rows("ab".index(name), count, "grams")
    return calibration, [jax.tree.map(np.asarray, batch) for batch in rows]


def documents(batch):
    """Every packed document by itself, with its mask."""
    for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment], mask[segments == segment]


def read_from_files_in_blocks(monkeypatch):
    """Keep no model in memory, and cut embedding and head in blocks: of 300 rows of 32, two of 128 and a rest."""
    monkeypatch.setattr(models, "KEPT_BYTES", 0)
    monkeypatch.setattr(models, "CHUNK", 2**12)
