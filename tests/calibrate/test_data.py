"""What is held out stays out; rows of other columns are read by templates."""

import json

import jax
import numpy as np
import pytest

from bmjax.branch.loader import Loader
from bmjax.calibrate import data
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import student
from tests.calibrate.tiny_models import batches, documents, recipe
from tests.conftest import write_rows


def test_held_out_documents_are_never_learned_from(models):
    calibration, _ = batches(models, "a")
    for loader, held in zip(calibration.loaders, calibration.held_out, strict=True):
        assert isinstance(loader, Loader)
        seen = {tuple(e.tokens) for e in loader.dataset.examples}
        judged = [tuple(t) for t, _ in documents(held)]
        assert len(judged) == 4 and not seen & set(judged)


def test_rows_of_other_columns_are_mapped_as_in_training(models, tmp_path):
    rows = [json.loads(line) for line in (models / "a.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "a.jsonl", [{"question": row["prompt"], "answer": row["response"]} for row in rows])
    plain = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
    write_rows(tmp_path / "plain.jsonl", plain)
    read = {}
    for name, columns in (("plain", {}), ("a", {"prompt": "{question}", "response": "{answer}"})):
        merge = recipe(models)
        merge["models"][0] = {"model": "a", "data": str(tmp_path / f"{name}.jsonl"), **columns}
        (step,) = read_recipe(merge).steps
        base = student.open(models / "base", purpose="calibration")
        read[name] = data.read(step, step.calibration, 0, base, make_mesh({})).held_out[0]
    for mapped, as_they_are in zip(jax.tree.leaves(read["a"]), jax.tree.leaves(read["plain"]), strict=True):
        assert np.array_equal(mapped, as_they_are)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"data": "a.jsonl", "prompt": "{q}"}, "'prompt' and 'response' map columns together"),
        ({"prompt": "{q}", "response": "{a}"}, "maps the columns of 'data', which is missing"),
    ],
)
def test_half_a_mapping_is_refused(models, entry, line):
    merge = recipe(models)
    merge["models"][0] = {"model": "a", **entry}
    with pytest.raises(UserError, match=line):
        read_recipe(merge)
