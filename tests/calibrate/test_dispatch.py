"""Merges of every kind through the one door: what a recipe may ask for, and steps of both kinds in one recipe."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

from bmjax.calibrate import dispatch, steps
from bmjax.calibrate.check import check_steps
from bmjax.calibrate.needs import needs_of
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.nodes import prepare
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from tests.calibrate.tiny_models import SMALL, recipe, tensors

KINDS = ("ties", "regmean", "learned", "layerwise")
CALIBRATION = SMALL | {"steps": 1, "rows": 2, "documents": 12}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def block(folder, method, *models, **more):
    """A merge onto the base of the fixture `models`, by names of `sources`."""
    rows = {"a": "a.jsonl", "b": "b.jsonl"}
    entries = [
        name if method == "ties" else {"model": name, "data": str(folder / rows.get(name, "a.jsonl"))}
        for name in models or ("a", "b")
    ]
    parameters = (
        {} if method == "ties" else CALIBRATION if method in ("learned", "layerwise") else CALIBRATION | {"steps": 0}
    )
    return {"merge_method": method, "base_model": "base", "models": entries, "parameters": parameters, **more}


def sources(folder):
    return {name: str(folder / name) for name in ("base", "a", "b")}


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_type_template_report_and_card(models, tmp_path, kind):
    merge = block(models, kind, sources=sources(models), out_dtype="bfloat16", chat_template="alpaca", seed=3)
    report = dispatch.merge(merge, tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    written = open_checkpoint(tmp_path / "out")
    assert {info.dtype for info in written.tensors.values()} == {"BF16"}
    assert "### Instruction" in (tmp_path / "out/chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out/merge_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["seed"] == 3 and report["dtypes"] == ["bfloat16"]
    assert report["checksums"].keys() == written.tensors.keys() == report["tensors"].keys()
    assert report["recipe"]["steps"][0]["merge_method"] == kind
    assert {s["directory"] for s in report["sources"].values()} == set(sources(models).values())
    card = (tmp_path / "out/README.md").read_text()
    assert f"`{kind}`" in card and report["sources"]["a"]["checksum"] in card
    assert ("held-out rows" in card and "mean coefficient" in card) == (kind != "ties")


def test_statistics_are_those_of_the_changes(models, tmp_path, kind):
    report = dispatch.merge(block(models, kind, sources=sources(models)), tmp_path / "out")
    base, a, b, out = (tensors(path) for path in (models / "base", models / "a", models / "b", tmp_path / "out"))
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        changes = [x[name].astype(np.float64) - base[name] for x in (a, b)]
        summary = report["tensors"][name]["merged"]
        expected = np.sum(changes[0] * changes[1]) / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1])
        assert summary["cosines"]["a, b"] == pytest.approx(expected, abs=1e-5)
        assert summary["models"]["a"]["delta_norm"] == pytest.approx(np.linalg.norm(changes[0]), rel=1e-5)
        assert summary["reference_norm"] == pytest.approx(np.linalg.norm(base[name].astype(np.float64)), rel=1e-5)
        moved = np.linalg.norm(out[name].astype(np.float64) - base[name])
        assert summary["moved_norm"] == pytest.approx(moved, rel=1e-4)
        assert summary["sign_conflicts"] == pytest.approx(np.mean(changes[0] * changes[1] < 0))
    assert report["sources"]["a"]["checksum"] == CHECKSUMS.setdefault("a", report["sources"]["a"]["checksum"])


CHECKSUMS: dict[str, str] = {}  # of the models read, the same whatever reads them


def test_steps_are_the_merges_one_after_another(models, tmp_path, kind):
    """ties, then this kind, then ties again: as three merges of directories in float32."""
    first = {**block(models, "ties"), "name": "first"}
    second = {**block(models, kind, "first", "b"), "name": "second"}
    last = block(models, "ties", "second", "a")
    report = dispatch.merge({"sources": sources(models), "steps": [first, second, last]}, tmp_path / "out")
    assert listing(tmp_path) == ["out"] and set(report["total"]) == {"size", "first", "second", "merged"}
    assert set(report["sources"]) == {"base", "a", "b"}
    places = sources(models)
    for merge, name in ((first, "first"), (second, "second"), (last, "merged")):
        alone = {key: value for key, value in merge.items() if key != "name"}
        dispatch.merge({**alone, "sources": dict(places), "dtype": "float32"}, tmp_path / name)
        places[name] = str(tmp_path / name)
    expected, written = tensors(tmp_path / "merged"), tensors(tmp_path / "out")
    assert all(np.array_equal(written[name], expected[name]) for name in expected)


def test_a_step_with_data_may_end_a_recipe(models, tmp_path, kind):
    first = {**block(models, "ties"), "name": "first"}
    second = block(models, kind, "b", base_model="first")
    report = dispatch.merge(
        {"sources": sources(models), "steps": [first, second], "dtype": "float16"}, tmp_path / "out"
    )
    assert {info.dtype for info in open_checkpoint(tmp_path / "out").tensors.values()} == {"F16"}
    assert (tmp_path / "out/tokenizer.json").exists() and report["total"]["merged"]["reference_norm"] > 0


def test_a_union_of_tokenizers(models, tmp_path, kind):
    """One model has a token and a row more: the result has it, and all other rows keep their tokens."""
    shutil.copytree(models / "b", tmp_path / "b")
    backend = Tokenizer.from_file(str(tmp_path / "b/tokenizer.json"))
    backend.add_tokens(["<new>"])
    backend.save(str(tmp_path / "b/tokenizer.json"))
    weights = tensors(tmp_path / "b")
    count = len(weights["model.embed_tokens.weight"])
    assert backend.token_to_id("<new>") == count
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        row = np.full_like(weights[name][:1], 0.125)
        weights[name] = np.concatenate([weights[name], row])
    safetensors.numpy.save_file(weights, tmp_path / "b/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**config, "vocab_size": count + 1}))
    merge = block(models, kind, sources=sources(models) | {"b": str(tmp_path / "b")}, tokenizer_source="union")
    report = dispatch.merge(merge, tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).token_to_id("<new>") == count
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == count + 1
    np.testing.assert_allclose(tensors(tmp_path / "out")["model.embed_tokens.weight"][count], 0.125, rtol=1e-6)
    assert listing(tmp_path) == ["b", "out"] and set(report["sources"]) == {"base", "a", "b"}
    assert report["sources"]["b"]["directory"] == str(tmp_path / "b")


def test_check_tells_and_writes_nothing(models, tmp_path, kind):
    lines = list(dispatch.check(read_recipe(block(models, kind, sources=sources(models))), tmp_path / "out"))
    assert lines[0] == f"step merged: {kind} of a, b into base" and not listing(tmp_path)
    assert any(line.startswith("write ") for line in lines)
    assert any("a.jsonl for 'a'" in line for line in lines) == (kind != "ties")
    for words in (
        "tokens, and on 8 held-out documents of at most 128",
        "one layer of every model",
        "beside the result",
    ):
        assert any(words in line for line in lines) == (kind != "ties")


def test_check_refuses_what_the_merge_would(models, tmp_path, kind):
    bad = block(models, kind, sources=sources(models) | {"a": str(tmp_path / "nothing")})
    for run in (lambda r: list(dispatch.check(r, tmp_path / "out")), lambda r: dispatch.merge(r, tmp_path / "out")):
        with pytest.raises(UserError, match=r"model 'a': .*nothing: no such model directory"):
            run(read_recipe(bad))
    assert not listing(tmp_path)


@pytest.mark.parametrize("name", ["directory", "org/name", "org/name@v2"])
def test_a_model_by_each_kind_of_name(models, tmp_path, monkeypatch, kind, name):
    asked = []

    def snapshot_download(repository, revision=None, **options):
        asked.append((repository, revision))
        return str(models / "a")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    spelt = str(models / "a") if name == "directory" else name
    merge = block(models, kind, spelt, "b", sources={"base": str(models / "base"), "b": str(models / "b")})
    lines = list(dispatch.check(read_recipe(merge), tmp_path / "out"))
    assert any(line.startswith(f"read {spelt}") for line in lines)
    expected = {"directory": set(), "org/name": {("org/name", None)}, "org/name@v2": {("org/name", "v2")}}
    assert set(asked) == expected[name]


def test_mistakes_in_a_later_step_are_told_before_any_is_made(models, tmp_path, monkeypatch):
    monkeypatch.setattr(steps.files, "merge", lambda *arguments, **options: pytest.fail("a step was made"))
    first = {**block(models, "ties"), "name": "first"}
    for change, words in (
        ({"parameters": CALIBRATION | {"seq_len": 512}}, "context of 256"),
        ({"models": [{"model": "first", "data": "nothing.jsonl"}]}, "nothing.jsonl"),
        ({"parameters": {"rowz": 1}}, "did you mean 'rows'?"),
    ):
        second = block(models, "learned", "first") | change
        with pytest.raises(UserError, match=words):
            dispatch.merge({"sources": sources(models), "steps": [first, second]}, tmp_path / "out")
    assert not listing(tmp_path)


def test_an_error_leaves_nothing_behind(models, tmp_path, monkeypatch):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps, "merge_step", full_disk)
    first = {**block(models, "ties"), "name": "first"}
    with pytest.raises(UserError, match="No space left"):
        dispatch.merge(
            {"sources": sources(models), "steps": [first, block(models, "learned", "first")]}, tmp_path / "out"
        )
    assert not listing(tmp_path)


def test_memory_is_refused_with_data(models, tmp_path):
    with pytest.raises(UserError, match="--memory: learned holds one layer of every model"):
        dispatch.merge(recipe(models), tmp_path / "out", memory=2**20)


@pytest.mark.parametrize("stage", ["polish", "distill"])
def test_check_counts_the_steps_after_the_merge(models, tmp_path, stage):
    """A step more is so many tokens more, the result is held whole, and what is counted is enough."""

    def checked(steps_after):
        made = read_recipe(recipe(models, "regmean", **CALIBRATION | {"steps": 0, stage: steps_after}))
        (checked,) = check_steps(prepare(made, tmp_path / "out"))
        step, needs = checked.step, checked.needs
        deep = replace(ModelConfig.from_dir(models / "base"), num_layers=1000)  # its weights outweigh its states
        return needs, needs_of(step, deep, 4).memory, " ".join(needs.lines(step))

    (without, memory_without, plain), (needs, memory, words), (more, memory_more, _) = map(checked, (0, 2, 4))
    # Two domains; the branches run forward on the rows that the student learns from.
    rows = 2 * CalibrationSettings().batch * SMALL["seq_len"] * (2 if stage == "distill" else 1)
    assert (needs.tokens - without.tokens, more.tokens - needs.tokens) == (2 * rows, 2 * rows)
    assert needs.disk - without.disk == sum(4 * t.size for t in tensors(models / "base").values())
    assert memory > memory_without and (memory_more > memory) == (stage == "distill")
    assert ("the whole result and its moments" in words, "last hidden states" in words) == (True, stage == "distill")
    assert "the whole result" not in plain
    report = dispatch.merge(recipe(models, "regmean", **CALIBRATION | {"steps": 0, stage: 2}), tmp_path / "out")
    counted = sum(count for purpose, count in report["tokens"].items() if purpose != "held_out")
    assert needs.tokens / 3 < counted <= needs.tokens


def test_what_stands_beside_the_weights_is_that_of_any_merge(models, tmp_path, kind):
    """The donor's small files, and a config that stops where the template ends turns; `linear` is the reference."""
    donor = tmp_path / "base"
    shutil.copytree(models / "base", donor)
    beside = ["LICENSE", "modeling_other.py", "1_Pooling/config.json", "steps/notes.json", "preprocessor_config.json"]
    for name in beside:
        (donor / name).parent.mkdir(exist_ok=True)
        (donor / name).write_text(json.dumps({"about": f"the donor's {name}"}))
    (donor / "rows.jsonl").write_text("{}")
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"eos_token_id": 1, "custom": [1, 2]}))
    more = {"sources": sources(models) | {"base": str(donor)}, "chat_template": "chatml", "out_dtype": "bfloat16"}
    dispatch.merge(block(models, kind, **more), tmp_path / "out")
    dispatch.merge({"merge_method": "linear", "base_model": "base", "models": ["a", "b"], **more}, tmp_path / "linear")

    def files(folder):
        return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    written, expected = files(tmp_path / "out"), files(tmp_path / "linear")
    assert written.keys() == expected.keys() > {*beside}
    of_a_merge = {"README.md", "merge_report.json", "recipe.yaml", "model.safetensors"}
    assert all(written[name].read_bytes() == expected[name].read_bytes() for name in written.keys() - of_a_merge)
    assert json.loads(written["config.json"].read_text())["eos_token_id"] == [2, 1]


def test_what_stands_beside_the_weights_comes_through_every_step(models, tmp_path):
    donor = tmp_path / "base"
    shutil.copytree(models / "base", donor)
    (donor / "LICENSE").write_text("the donor's")
    merge = {"sources": sources(models) | {"base": str(donor)}, "steps": [
        {**block(models, "regmean"), "name": "mid"}, {**block(models, "ties", "b"), "base_model": "mid"},
    ]}  # fmt: skip
    dispatch.merge({**merge, "chat_template": "chatml"}, tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "the donor's"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["num_hidden_layers"] == 2


@pytest.mark.parametrize(("along", "steps"), [("fisher", 0), ("changes", 1), ("fisher", 1)])
def test_embedding_and_head_need_no_more_memory_for_more_models(models, along, steps):
    """Of all models together only blocks of them are in memory; coefficients by entry are those of whole models."""
    wide = replace(ModelConfig.from_dir(models / "base"), vocab_size=10**6)

    def memory(branches, **parameters):
        block = recipe(models, along=along, **{"steps": steps, "per": "tensor"} | parameters)
        block["models"] = [{"model": name, "data": str(models / "a.jsonl")} for name in branches]
        (step,) = read_recipe(block | {"sources": {}}).steps
        return needs_of(step, wide, 2).memory

    matrix = wide.vocab_size * wide.hidden_size
    one, three = memory("a"), memory("abc")
    assert one == three > 4 * 4 * matrix
    assert memory("abc", per="entry") - three == (16 * 3 * spec.count(wide) if steps else 0)
