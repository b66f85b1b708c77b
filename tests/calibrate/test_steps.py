"""A whole merge: the guard, the mesh, the commands, what a user gets wrong."""

import json

import numpy as np
import pytest
import safetensors.numpy

import bmjax
from bmjax.calibrate import dispatch
from bmjax.config import UserError
from bmjax.merge.__main__ import main
from tests.calibrate.tiny_models import SMALL, batches, recipe, tensors
from tests.conftest import write_student


def test_learning_and_polishing_lower_the_loss(models, tmp_path):
    report = dispatch.merge(recipe(models, steps=12, polish=4, polish_rate=1e-3, learning_rate=0.5), tmp_path / "out")
    mean = {stage: np.mean(list(losses.values())) for stage, losses in report["held_out_loss"].items()}
    assert mean["learned"] < mean["start"] and mean["polished"] < mean["learned"] and report["kept"] == "polished"
    base, merged = tensors(models / "base"), tensors(tmp_path / "out")
    assert np.array_equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not np.array_equal(merged["lm_head.weight"], base["lm_head.weight"])
    # The held-out loss is the model's own, as written.
    m = bmjax.load(tmp_path / "out")
    calibration, _ = batches(models, "a")
    batch = calibration.judged()[0]
    nats, count = m.loss(batch.tokens, batch.loss_mask, segment_ids=batch.segment_ids)
    assert float(nats / count) == pytest.approx(report["held_out_loss"]["polished"]["a"], rel=1e-5)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == json.loads(json.dumps(report))


def test_what_does_not_help_on_held_out_rows_is_not_kept(models, tmp_path):
    said = []
    report = dispatch.merge(recipe(models, steps=3, learning_rate=300.0), tmp_path / "far", log=said.append)
    dispatch.merge(recipe(models, steps=0), tmp_path / "start")
    assert report["kept"] == "start" and any("not kept" in line for line in said)
    far, start = tensors(tmp_path / "far"), tensors(tmp_path / "start")
    assert far.keys() == start.keys() and all(np.array_equal(far[key], start[key]) for key in far)


def test_tied_models_in_bfloat16(models, tmp_path):
    """The head is the merged embedding, and parts are computed in float32 whatever the files hold."""
    for seed, name in enumerate(("base", "a", "b")):
        write_student(tmp_path / name, seed=seed, dtype="bfloat16", tie_word_embeddings=True)
    merge = recipe(models, "regmean", steps=0) | {"dtype": "float32"}
    merge["sources"] = {name: str(tmp_path / name) for name in ("base", "a", "b")}
    report = dispatch.merge(merge, tmp_path / "out")
    m, base = bmjax.load(tmp_path / "out"), bmjax.load(tmp_path / "base", dtype="float32")
    calibration, _ = batches(models, "a")
    for stage, model in (("start", m), ("base", base)):
        for name, batch in zip("ab", calibration.judged(), strict=True):
            nats, count = model.loss(batch.tokens, batch.loss_mask, segment_ids=batch.segment_ids)
            assert float(nats / count) == pytest.approx(report["held_out_loss"][stage][name], rel=1e-5)


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same(models, tmp_path):
    for name, mesh in (("one", {}), ("mesh", {"fsdp": 4, "tensor": 2})):
        dispatch.merge(recipe(models, mesh=mesh, batch=2), tmp_path / name)
    single, mesh = tensors(tmp_path / "one"), tensors(tmp_path / "mesh")
    assert max(float(np.abs(single[key] - mesh[key]).max()) for key in single) < 2e-4


def test_the_commands_are_the_same(models, tmp_path, capsys):
    bmjax.merge(recipe(models), tmp_path / "a")
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe(models)))
    assert main([str(file), str(tmp_path / "b"), "--check"]) == 0
    assert not (tmp_path / "b").exists()
    assert main([str(file), str(tmp_path / "b")]) == 0
    assert "held-out loss, start" in capsys.readouterr().out
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"model": "a"}]}, "model 'a' has no 'data': learned needs rows"),
        ({"parameters": {"stepps": 3}}, "did you mean 'steps'"),
        ({"models": [{"model": "base", "data": "x"}]}, "is the base_model"),
        ({"parameters": SMALL | {"held_out": 40}}, "40 rows, 40 of them to be held out"),
        ({"parameters": SMALL | {"seq_len": 512}}, "context of 256"),
        ({"base_model": "nowhere"}, "nowhere"),
        ({"models": [{"model": "a", "data": "nothing.jsonl"}]}, "nothing.jsonl"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        dispatch.merge(recipe(models) | change, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_shape_and_nan_name_model_and_tensor(models, tmp_path):
    other = write_student(tmp_path / "other", intermediate_size=48)
    with pytest.raises(UserError, match=r"tensor 'model.layers.0.mlp.\w+.weight' has shape .* in model 'a'"):
        dispatch.merge(recipe(models) | {"sources": {"base": str(models / "base"), "a": str(other), "b": str(models / "b")}}, tmp_path / "out")  # fmt: skip # noqa: E501
    broken = write_student(tmp_path / "broken")
    weights = tensors(broken)
    weights["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    sources = {"base": str(models / "base"), "a": str(broken), "b": str(models / "b")}
    with pytest.raises(UserError, match=r"model 'a': tensor 'model.norm.weight' holds NaN"):
        dispatch.merge(recipe(models) | {"sources": sources}, tmp_path / "out")
