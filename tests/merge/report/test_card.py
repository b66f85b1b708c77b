import json

import numpy as np
import pytest
import yaml

from bmjax.calibrate.dispatch import merge
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.engine import stream
from bmjax.merge.engine.passes import block
from bmjax.merge.methods.arcee_fusion import agreement, three_importances
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
    three = [np.asarray(x) for x in three_importances(block(base, [branch], {}))]
    exact = fusion_mask(base, branch)
    assert jaccard(mask(three[0]), exact) >= 0.999
    noisy = jaccard(mask(textbook(base, branch, BF16)), exact)
    (_, _), (both, either) = agreement(three)
    assert noisy < 0.35 and both / either == pytest.approx(noisy, abs=0.05)
    monkeypatch.setattr(stream, "SAMPLE", 2**15)
    report = merge({"merge_method": "arcee_fusion", "base_model": "base", "models": ["a"]}, "out")
    jaccards = report["total"]["merged"]["mask_jaccard_of_textbook"]
    assert jaccards["bfloat16"] < 0.35 and jaccards["float32"] < 0.95
    assert "agrees with this one (Jaccard)" in (tmp_path / "out/README.md").read_text()
