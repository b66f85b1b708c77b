import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from bmjax.calibrate.dispatch import merge
from bmjax.cli.main import main
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.engine import stream
from bmjax.merge.engine.passes import block
from bmjax.merge.methods.arcee_fusion import agreement
from tests.merge.reference import BF16, fusion_mask, hf_dir, jaccard, real_sized, softmax


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, branches = real_sized((64, 1024), 0, branches=2)
    for name, tensor in {"base": base, "a": branches[0], "b": branches[1]}.items():
        hf_dir(tmp_path / name, {"model.layers.0.w.weight": tensor})
    return base, branches


def test_the_card_tells_what_the_report_holds(models, tmp_path):
    merge({"merge_method": "ties", "base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.5}}, "out")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    text = (tmp_path / "out/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["merge", "bmjax"]
    summary = report["total"]["merged"]
    for name in ("a", "b"):
        assert f"| `{name}` | {summary['models'][name]['kept']:.1%} |" in body
        assert report["sources"][name]["checksum"] in body
    assert f"{summary['sign_conflicts']:.1%} of the entries" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["steps"][0]["parameters"] == {"density": 0.5}


def card_of(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def put_card(folder, **head):
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# {folder.name}\n")


def soup_of(*names, **more):
    return {"merge_method": "linear", "models": list(names), **more}


@pytest.mark.parametrize(
    ("recipe", "reference"),
    [
        ({"merge_method": "linear", "models": ["a", "b"]}, "`a`"),
        ({"merge_method": "linear", "models": ["a", "b"], "base_model": "base"}, "`a`"),
        ({"merge_method": "task_arithmetic", "models": ["a", "b"], "base_model": "base"}, "`base`"),
    ],
)
def test_the_card_says_by_whose_norm_the_move_is_told(models, tmp_path, capsys, recipe, reference):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", "recipe.yaml", "out"]) == 0
    _, body = card_of(tmp_path / "out")
    total = json.loads((tmp_path / "out/merge_report.json").read_text())["total"]["merged"]
    share = f"moved {total['moved_norm'] / total['reference_norm']:.2%} of the norm of "
    assert f"{share}{reference};" in body
    assert f"{share}{reference.strip('`')}, entries" in capsys.readouterr().out
    norm = np.linalg.norm(np.float64(models[0] if reference == "`base`" else models[1][0]))
    assert total["reference_norm"] == pytest.approx(norm, rel=1e-3)


def test_bases_and_licenses_come_from_the_inputs_cards(models, tmp_path):
    put_card(tmp_path / "base", base_model="org/base", license="apache-2.0")
    put_card(tmp_path / "a", base_model=["org/base", "org/instruct", "no id"], license="apache-2.0")
    merge(soup_of("base", "a", "b"), "out")
    head, body = card_of(tmp_path / "out")
    assert head["base_model"] == ["org/base", "org/instruct"] and head["base_model_relation"] == "merge"
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    assert body.count("| `apache-2.0` |") == 2 and body.count("| not known |") == 1


def test_licenses_that_differ_are_not_claimed_as_one(models, tmp_path):
    put_card(tmp_path / "base", license="other", license_name="own", license_link="https://x.org/l?a=1")
    merge(soup_of("base", "a"), "one")
    head, _ = card_of(tmp_path / "one")
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "own", "https://x.org/l?a=1")
    put_card(tmp_path / "a", license="mit")
    merge(soup_of("base", "a"), "two")
    head, body = card_of(tmp_path / "two")
    assert head["license"] == "other" and head["license_name"] != "own" and "| `mit` |" in body


def test_an_adapters_card_counts_beside_its_models(models, tmp_path):
    rank_one = {f"base_model.model.model.layers.0.w.lora_{k}.weight": np.ones(s, np.float32)
                for k, s in (("A", (1, 1024)), ("B", (64, 1)))}  # fmt: skip
    (tmp_path / "lora").mkdir()
    save_file(rank_one, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    put_card(tmp_path / "base", base_model="org/base", license="apache-2.0")
    put_card(tmp_path / "lora", base_model="org/other", license="mit")
    merge(soup_of("m", "a", sources={"m": "base+l", "l": "lora"}), "out")
    head, body = card_of(tmp_path / "out")
    assert head["base_model"] == ["org/base", "org/other"] and head["license"] == "other"
    assert "| `base+lora` |" in body and "`apache-2.0, mit`" in body


@pytest.mark.parametrize(
    "text", ["---\n- a\n---\n", "---\nlicense: [x\n---", "---\nlicense: 'a\n  b | c'\n---\n", "\0", ""]
)
def test_cards_that_say_nothing_readable(models, tmp_path, text):
    (tmp_path / "a/README.md").write_text(text)
    merge(soup_of("a"), "out")
    assert "license" not in card_of(tmp_path / "out")[0]


LOADED = {
    "LlamaForCausalLM": ("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "GPT2LMHeadModel": ("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "Gemma3ForConditionalGeneration": ("AutoModelForImageTextToText", "AutoProcessor", "image-text-to-text"),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "AutoTokenizer", "text2text-generation"),
    "LlamaForSequenceClassification": ("AutoModelForSequenceClassification", "AutoTokenizer", "text-classification"),
    "LlamaModel": ("AutoModel", "AutoTokenizer", None), "": ("AutoModel", "AutoTokenizer", None),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_the_card_says_how_to_load_it(models, tmp_path, name):
    import transformers

    path = tmp_path / "a/config.json"
    vision = {"vision_config": {}} if name.startswith("Gemma3") else {}
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name], **vision}))
    merge(soup_of("a"), "out")
    head, body = card_of(tmp_path / "out")
    model, reader, pipeline = LOADED[name]
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f"{model}.from_pretrained(path" in code and f"{reader}.from_pretrained(path)" in code
    assert head.get("pipeline_tag") == pipeline and "trust_remote_code" not in body
    assert model in transformers.__all__ and reader in transformers.__all__


def test_code_and_sentence_transformers_are_said(models, tmp_path):
    path = tmp_path / "a/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "modeling_x.X"}}))
    (tmp_path / "a/modules.json").write_text("[]")
    (tmp_path / "a/modeling_x.py").write_text("raise SystemExit")
    merge(soup_of("a"), "out")
    head, body = card_of(tmp_path / "out")
    assert (
        head["library_name"] == "sentence-transformers" and "SentenceTransformer(path, trust_remote_code=True)" in body
    )
    assert "read it first" in body and (tmp_path / "out/modeling_x.py").read_text() == "raise SystemExit"


def test_directories_of_this_machine_are_not_named(models, tmp_path):
    (tmp_path / "runs/math").mkdir(parents=True)
    (tmp_path / "a").rename(tmp_path / "runs/math/hf")
    recipe = soup_of("m", str(tmp_path / "b"), sources={"m": str(tmp_path / "runs/math/hf")})
    merge(recipe, "out")
    text = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in text and "| `m` | `math` |" in text and "| `b` | `b` |" in text
    again = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert again["sources"]["m"] == str(tmp_path / "runs/math/hf")


RECIPES = {
    "overrides": ({"merge_method": "ties", "base_model": "base", "models": ["a", "b"]}, ["parameters.density=0.3"]),
    "filters": (soup_of("a", "b", parameters={"weight": [{"filter": "w", "value": [0.2, 0.8]}, {"value": 1}]}), []),
    "steps": ({"sources": {"x": "a"}, "seed": 5, "steps": [
        {"name": "mid", "merge_method": "dare_ties", "base_model": "base", "models": [{"model": "x", "parameters": {
            "weight": 0.4}}, "b"], "parameters": {"density": 0.5}},
        {"merge_method": "slerp", "base_model": "mid", "models": ["b"], "parameters": {"t": 0.5}}]}, []),
    "slices": ({"merge_method": "passthrough", "dtype": "bfloat16", "slices": [
        {"sources": [{"model": m, "layer_range": [0, 1]}]} for m in "aba"]}, []),
    "template": (soup_of("a", chat_template="{% for m in messages %}\n{{ m.content }}: é{% endfor %}"), []),
    "keep": (soup_of("a", {"model": {"path": "b"}}, keep=["w", {"regex": "no tensor"}]), []),
    "modules": ({"merge_method": "linear", "parameters": {"weight": 1}, "modules": {
        "text_decoder": {"models": [{"model": m} for m in "ab"]}, "vision_tower": {"models": [{"model": "a"}]}}}, []),
    "compat": ({"merge_method": "arcee_fusion", "base_model": "base", "models": ["a"], "compat": "mergekit"}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_that_is_written_runs_again(models, tmp_path, name):
    recipe, overrides = RECIPES[name]
    merge(recipe, "one", overrides=overrides)
    merge("one/recipe.yaml", "two")
    for file in ("model.safetensors", "recipe.yaml", "README.md", "merge_report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("recipe", [soup_of("a", "./b"), soup_of("x", sources={"x": "a"})], ids=str)
@pytest.mark.parametrize("out", ["out", "runs/merges/out"])
def test_the_first_line_says_where_relative_paths_begin(models, tmp_path, monkeypatch, recipe, out):
    merge(recipe, out)
    first = (tmp_path / out / "recipe.yaml").read_text().splitlines()[0]
    start = re.fullmatch(r"# Relative paths begin in (\S+), seen from this file: run `bmjax merge` there\.", first)[1]
    monkeypatch.chdir(tmp_path / out)
    with pytest.raises(UserError, match="no such model directory"):
        merge("recipe.yaml", tmp_path / "again")
    monkeypatch.chdir(start)
    merge(tmp_path / out / "recipe.yaml", "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / out / "model.safetensors").read_bytes()


def test_the_first_line_names_no_other_directories(models, tmp_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("elsewhere") / "out"
    merge(soup_of("a"), out)
    first = (out / "recipe.yaml").read_text().splitlines()[0]
    assert first == "# Relative paths begin in the directory where this merge was run: run `bmjax merge` there."
    merge(soup_of(str(tmp_path / "a")), "absolute")
    assert not (tmp_path / "absolute/recipe.yaml").read_text().startswith("#")


def test_norms_cosines_and_conflicts(models, tmp_path):
    base, (a, b) = models
    report = merge({"merge_method": "task_arithmetic", "base_model": "base", "models": ["a", "b"]}, "out")
    da, db = (x.astype(np.float64) - base for x in (a, b))
    total = report["total"]["merged"]
    assert total["cosines"]["a, b"] == pytest.approx(
        np.sum(da * db) / np.linalg.norm(da) / np.linalg.norm(db), abs=1e-5
    )
    assert total["models"]["a"]["delta_norm"] == pytest.approx(np.linalg.norm(da), rel=1e-5)
    assert total["moved_norm"] == pytest.approx(np.linalg.norm(da + db), rel=1e-4)
    assert total["sign_conflicts"] == np.mean(da * db < 0)


def test_names_are_shown_and_not_obeyed(models, tmp_path):
    (tmp_path / "a").rename(tmp_path / "a|b`![x](y)`")
    merge({"merge_method": "linear", "models": ["base", "a|b`![x](y)`"]}, "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "| `` a\\|b`![x](y)` `` |" in text


def textbook(base, branch, kind):
    """The textbook's importance, every operation's result rounded to a type."""

    def rounded(x):
        return x.astype(kind).astype(np.float32)

    b, w = rounded(base), rounded(branch)
    p, q = (rounded(rounded(softmax(x)) + np.float32(1e-8)) for x in (w, b))
    kl = rounded(np.sum(rounded(p * rounded(np.log(rounded(p / q)))), axis=-1, keepdims=True))
    return rounded(np.abs(rounded(w - b)) * kl)


def mask(importance):
    ordered = np.sort(importance, axis=None)
    q1, median, q3 = (ordered[int(np.floor(q * (ordered.size - 1)))] for q in (0.25, 0.5, 0.75))
    return importance >= median + 1.5 * (q3 - q1)


def test_compat_takes_the_other_tools_mask(tmp_path, monkeypatch):
    """In the type that `dtype` names: what its arithmetic keeps, of bfloat16 files."""
    monkeypatch.chdir(tmp_path)
    base, (branch,) = real_sized((256, 1024), 7, delta_rms=6e-4)
    base, branch = base.astype(BF16), branch.astype(BF16)
    for name, tensor in {"base": base, "a": branch}.items():
        hf_dir(tmp_path / name, {"w": tensor})
    recipe = {"merge_method": "arcee_fusion", "base_model": "base", "models": ["a"], "compat": "mergekit"}
    b, w = base.astype(np.float32), branch.astype(np.float32)
    for dtype, kind in (("bfloat16", BF16), ("float32", np.float32)):
        report = merge({**recipe, "dtype": dtype}, f"out-{dtype}")
        importance = textbook(b, w, kind)
        expected = mask(importance) & (b != w)
        kept_mask = open_checkpoint(tmp_path / f"out-{dtype}").read("w").astype(np.float32) != b
        # In float32 the KL is rounding noise that any other order of a sum changes.
        assert dtype == "float32" or jaccard(kept_mask, expected) > 0.9
        assert jaccard(kept_mask, fusion_mask(b, w)) < 0.9
        assert report["total"]["merged"]["models"]["a"]["kept"] == pytest.approx(kept_mask.mean(), abs=1e-6)


def test_masks_of_the_textbook_formula_differ(models, tmp_path, monkeypatch):
    base, (branch, _) = models
    noisy = jaccard(mask(textbook(base, branch, BF16)), fusion_mask(base, branch))
    (_, _), (both, either) = agreement(block(base, [branch], {}))
    assert noisy < 0.35 and both / either == pytest.approx(noisy, abs=0.05)
    monkeypatch.setattr(stream, "SAMPLE", 2**18)  # all rows: each has one rounding error, and few say little
    report = merge({"merge_method": "arcee_fusion", "base_model": "base", "models": ["a"]}, "out")
    jaccards = report["total"]["merged"]["mask_jaccard_of_textbook"]
    assert jaccards["bfloat16"] < 0.35 and jaccards["float32"] < 0.95
    assert "agrees with this one (Jaccard)" in (tmp_path / "out/README.md").read_text()
