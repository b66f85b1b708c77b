import gc
import json
import os
import shutil
import weakref

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import bmjax.merge as package
from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.merge.__main__ import main
from bmjax.merge.engine import stream
from bmjax.merge.methods import METHODS
from tests.merge.reference import BF16, SMALL, fuse, hf_dir, hf_tensors

BACKBONE = hf_tensors(SMALL, 0)
NAMES = ("math", "code", "science")
MODELS = {"backbone": BACKBONE, **{name: hf_tensors(SMALL, i + 1, BACKBONE) for i, name in enumerate(NAMES)}}
UP = "model.layers.1.mlp.up_proj.weight"
ARCEE = {"merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Directories named backbone, math, code and science, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, tensors in MODELS.items():
        hf_dir(tmp_path / name, tensors)
    return tmp_path


def snapshot(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_pairwise_fusion_of_directories(models):
    report = merge(ARCEE, "out")
    for key, tensor in load_file("out/model.safetensors").items():
        expected = fuse(MODELS["science"][key], MODELS["math"][key])
        np.testing.assert_array_equal(tensor, expected.astype(np.float32), err_msg=key)
    assert json.loads((models / "out/merge_report.json").read_text()) == report
    assert report["sources"]["math"]["directory"] == "math"
    assert 0.01 < report["total"]["merged"]["models"]["math"]["kept"] < 0.3
    assert (models / "out/tokenizer.json").read_bytes() == (models / "science/tokenizer.json").read_bytes()
    assert (models / "out/config.json").read_bytes() == (models / "science/config.json").read_bytes()


@pytest.mark.parametrize("method", ["della", "arcee_fusion", "ties", "model_stock"])
def test_kept_chunks_are_freed_with_their_tensor(method, models, monkeypatch):
    """Without a garbage collector: its inputs would wait for that, gigabytes of them."""
    jobs = []

    class Watched(stream.ChunkCache):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            jobs.append(weakref.ref(self))

    monkeypatch.setattr(stream, "ChunkCache", Watched)
    gc.disable()
    try:
        merge({"merge_method": method, "base_model": "science", "models": ["math", "code"]}, "out")
        assert len(jobs) == len(MODELS["math"])
        assert not any(job() for job in jobs)
    finally:
        gc.enable()


def test_two_steps_of_the_paper_take_the_last_base(models):
    steps = [
        {"name": "mid", **ARCEE},
        {"name": "student", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]},
    ]
    merge({"steps": steps}, "out")
    for key, tensor in load_file("out/model.safetensors").items():
        mid = fuse(MODELS["science"][key], MODELS["math"][key]).astype(np.float32)
        np.testing.assert_array_equal(tensor, fuse(MODELS["code"][key], mid).astype(np.float32), err_msg=key)
    assert json.loads((models / "out/tokenizer.json").read_text()) == {"made for": "code"}


def test_steps_may_differ_in_their_number_of_models(models):
    steps = [
        {"name": "mean", "merge_method": "linear", "models": ["math", "code"]},
        {"name": "end", "merge_method": "task_arithmetic", "base_model": "science", "models": ["mean"]},
    ]
    report = merge({"steps": steps}, "out")
    for key, tensor in load_file("out/model.safetensors").items():
        mean = (MODELS["math"][key].astype(np.float64) + MODELS["code"][key]) / 2
        np.testing.assert_allclose(tensor, mean, atol=1e-6)
    assert {step: len(report["total"][step]["models"]) for step in ("mean", "end")} == {"mean": 2, "end": 1}


@pytest.mark.parametrize("asked, stored", [({}, "bfloat16"), ({"dtype": "float32"}, "float32"),
                                           ({"dtype": "float32", "out_dtype": "float16"}, "float16")])  # fmt: skip
def test_result_type(models, asked, stored):
    hf_dir(models / "full", {UP: MODELS["math"][UP]})
    hf_dir(models / "half", {UP: BACKBONE[UP].astype(BF16)})
    merge({"merge_method": "task_arithmetic", "base_model": "half", "models": ["full"], **asked}, "out")
    with safe_open("out/model.safetensors", "np") as file:
        kinds = {str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    assert kinds == {{"bfloat16": "BF16", "float32": "F32", "float16": "F16"}[stored]}
    assert json.loads((models / "out/config.json").read_text())["dtype"] == stored


def test_arithmetic_is_float32_with_one_rounding(models):
    half = [MODELS[name][UP].astype(BF16) for name in NAMES]
    for name, tensor in zip(NAMES, half, strict=True):
        hf_dir(models / "bf16" / name, {UP: tensor})
    merge({"merge_method": "linear", "models": [f"bf16/{name}" for name in NAMES]}, "out")
    with safe_open("out/model.safetensors", "flax") as file:
        merged = np.asarray(file.get_tensor(UP))
    exact = sum(tensor.astype(np.float64) for tensor in half) / 3
    assert np.mean(merged == exact.astype(BF16)) >= 0.999


def test_any_architecture_and_shapes(models):
    rng = np.random.default_rng(1)
    first = {
        "conv.weight": rng.standard_normal((4, 3, 5)).astype(np.float32),
        "scale": np.array(0.5, np.float32),
        "positions": np.arange(6),
        "wide": rng.standard_normal((3, 4)),
    }
    second = {k: v if k == "positions" else np.array(v + 0.25, v.dtype) for k, v in first.items()}
    hf_dir(models / "a", first, model_type="other")
    hf_dir(models / "b", second, model_type="other")
    report = merge({"merge_method": "linear", "models": ["a", "b"]}, "out")
    for key, tensor in load_file("out/model.safetensors").items():
        assert tensor.dtype == first[key].dtype
        np.testing.assert_allclose(tensor, (first[key] + second[key].astype(np.float64)) / 2, rtol=1e-6)
    assert set(report["tensors"]) == {"conv.weight", "scale", "wide"}


def test_shards_and_same_bytes_twice(models):
    symmetric = {"merge_method": "arcee_fusion", "base_model": "backbone", "models": list(NAMES)}
    merge(symmetric, "one", shard_bytes=20_000)
    merge(symmetric, "two", shard_bytes=20_000)
    assert snapshot(models / "one") == snapshot(models / "two")
    index = json.loads((models / "one/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = merge({"merge_method": "linear", "models": ["one"]}, "three")
    assert again["sources"]["one"]["tensors"] == len(BACKBONE)


def test_the_package_answers_the_python_contract(models):
    report = package({"merge_method": "linear", "models": ["math", "code"]}, "out")
    assert report["total"]["merged"]["models"].keys() == {"math", "code"}


def test_progress_and_notes(models):
    hf_dir(models / "other", MODELS["math"], rope_theta=5.0)
    seen, lines = [], []
    merge({**ARCEE, "models": ["other"]}, "out", progress=lambda *now: seen.append(now), log=lines.append)
    assert seen[-1][0] == seen[-1][1] == 2 * sum(t.nbytes for t in BACKBONE.values())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert any("rope_theta" in line and "'other'" in line for line in lines)


def damaged(name, change):
    def prepare(root):
        tensors = {k: v.copy() for k, v in MODELS["math"].items()}
        change(tensors)
        shutil.rmtree(root / name)
        hf_dir(root / name, tensors)

    return prepare


def tie(root):
    tensors = dict(MODELS["math"])
    del tensors["lm_head.weight"]
    shutil.rmtree(root / "math")
    hf_dir(root / "math", tensors, tie_word_embeddings=True)


@pytest.mark.parametrize("base, other", [("science", "math"), ("math", "science")])
def test_a_tied_models_head_is_its_embedding(models, base, other):
    tie(models)
    lines = []
    merge({"merge_method": "linear", "models": [base, other]}, "out", log=lines.append)
    heads = {"science": MODELS["science"]["lm_head.weight"], "math": MODELS["math"]["model.embed_tokens.weight"]}
    merged = load_file("out/model.safetensors")["lm_head.weight"]
    np.testing.assert_allclose(merged, (heads["science"] + heads["math"].astype(np.float64)) / 2, atol=1e-8)
    assert json.loads((models / "out/config.json").read_text()).get("tie_word_embeddings", False) is False
    assert any("'math' is tied" in line for line in lines)


def test_surplus_tensors_are_noted_and_not_merged(models):
    damaged("math", lambda t: t.update(x=t[UP]))(models)
    lines = []
    merge(ARCEE, "out", log=lines.append)
    assert "x" not in load_file("out/model.safetensors")
    assert any("'math' holds 1 tensor (x)" in line for line in lines)


def occupy(root):
    (root / "out").mkdir()
    (root / "out/notes.txt").write_text("mine")


def cut(root):
    path = root / "math/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil(value):
    return damaged("math", lambda t: t[UP].__setitem__((3, 4), value))


FAILURES = {
    "nan": (spoil(np.nan), ARCEE, f"model 'math': tensor '{UP}' holds NaN"),
    "inf": (spoil(-np.inf), ARCEE, f"tensor '{UP}' holds NaN or infinity"),
    "overflow": (spoil(1e6), {**ARCEE, "dtype": "float16"}, "overflow float16"),
    "missing tensor": (
        damaged("math", lambda t: t.pop(UP)),
        ARCEE,
        f"model 'math' lacks 1 tensor ({UP}) that 'science' has",
    ),
    "shape": (
        damaged("math", lambda t: t.update({UP: t[UP][1:]})),
        ARCEE,
        f"tensor '{UP}' has shape [47, 32] in model 'math'",
    ),
    "quantized": (
        damaged("math", lambda t: t.update({UP: t[UP].astype(np.int8)})),
        ARCEE,
        "model 'math': its weights are quantized (I8 weights)",
    ),
    "truncated": (cut, ARCEE, "math/model.safetensors"),
    "unknown model": (None, {**ARCEE, "models": ["mathe"]}, "mathe: no such model directory; did you mean 'math'?"),
    "alias of nothing": (None, {**ARCEE, "sources": {"math": "nowhere"}}, "'math': nowhere: no such model directory"),
    "out not empty": (occupy, ARCEE, "out: exists and is not a model directory"),
    "out is a file": (lambda root: (root / "out").write_text("x"), ARCEE, "out: exists and is not a directory"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_and_change_nothing(models, name):
    prepare, recipe, message = FAILURES[name]
    if prepare:
        prepare(models)
    before = snapshot(models)
    with pytest.raises(UserError) as error:
        merge(recipe, "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(models) == before
    assert not [p for p in models.iterdir() if p.name.startswith(".")]


def test_integer_tensors_must_agree(models):
    for i, name in enumerate(("a", "b")):
        hf_dir(models / name, {"x": np.ones(3, np.float32), "positions": np.arange(3) + i})
    with pytest.raises(UserError, match="'positions' is int64 and differs between models 'a' and 'b'"):
        merge({"merge_method": "linear", "models": ["a", "b"]}, "out")
    assert not (models / "out").exists()


@pytest.mark.parametrize("out", ["science", "math", ".", "link"])
def test_output_is_never_an_input(models, out):
    os.symlink("science", models / "link")
    before = snapshot(models)
    with pytest.raises(UserError, match="contains"):
        merge(ARCEE, out, overwrite=True)
    assert snapshot(models) == before


def test_overwrite_replaces_a_model_but_nothing_else(models):
    merge(ARCEE, "out")
    first = snapshot(models / "out")
    with pytest.raises(UserError, match="--overwrite"):
        merge({**ARCEE, "models": ["code"]}, "out")
    assert snapshot(models / "out") == first
    merge({**ARCEE, "models": ["code"]}, "out", overwrite=True)
    assert snapshot(models / "out") != first
    occupied = models / "papers"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a model directory"):
        merge(ARCEE, "papers", overwrite=True)
    assert (occupied / "thesis.tex").exists()


def test_a_failed_overwrite_leaves_the_old_result(models):
    merge(ARCEE, "out")
    first = snapshot(models / "out")
    damaged("math", lambda t: t["lm_head.weight"].__setitem__((0, 0), np.nan))(models)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        merge(ARCEE, "out", overwrite=True)
    assert snapshot(models / "out") == first


def write_recipe(root, text="merge_method: arcee_fusion\nbase_model: science\nmodels: [math]\n"):
    (root / "recipe.yaml").write_text(text)
    return "recipe.yaml"


def test_command(models, capsys):
    recipe = write_recipe(models)
    assert main([recipe, "out", "--overwrite", "parameters.lambda=0.5", "dtype=bfloat16"]) == 0
    printed = capsys.readouterr()
    assert "arcee_fusion" in printed.out and "math" in printed.out
    report = json.loads((models / "out/merge_report.json").read_text())
    assert report["dtypes"] == ["bfloat16"]
    assert report["recipe"]["steps"][0]["parameters"] == {"lambda": 0.5}
    assert main([recipe, "quiet", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["recipe.yaml"],
        ["nothing.yaml", "out"],
        ["recipe.yaml", "out", "lamda=1"],
        ["recipe.yaml", "out", "--overwrit"],
        ["recipe.yaml", "science"],
    ],
)
def test_command_errors(models, capsys, arguments):
    write_recipe(models)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("bmjax: error: ") and printed.err.count("\n") == 1


def test_help_lists_every_method_and_parameter(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in text
        assert all(f"{name}" in text for name in method.parameters)
    assert "learned, layerwise, regmean:" in text and "importance*: (required)" in text and "inspect" not in text
