import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from tests.merge.reference import heavy_tailed, hf_dir, merge_arrays, real_sized

SHAPE = (48, 64)


def formula(base, branches, importances, weights, scale, relative=True):
    b = base.astype(np.float64)
    f = [np.maximum(i.astype(np.float64), 0) for i in importances]
    f = [w * (i / i.mean() if relative and i.mean() > 0 else i) for w, i in zip(weights, f, strict=True)]
    d = [x.astype(np.float64) - b for x in branches]
    total = sum(f)
    plain = sum(w * x for w, x in zip(weights, d, strict=True)) / sum(weights)
    some = total != 0
    mean = sum(i * x for i, x in zip(f, d, strict=True)) / np.where(some, total, 1)
    return b + scale * np.where(some, mean, plain)


@pytest.mark.parametrize("make", [real_sized, heavy_tailed])
@pytest.mark.parametrize("relative", [True, False])
def test_formula(make, relative):
    base, branches = make(SHAPE, 1, branches=3)
    rng = np.random.default_rng(2)
    importances = [(scale * rng.chisquare(1, SHAPE)).astype(np.float32) for scale in (1e-6, 1e-4, 1e-9)]
    for i in importances:
        i[:3] = 0
    weights = (1.0, 0.5, 2.0)
    merged, kept = merge_arrays(
        "fisher", base, branches, importance=importances, weight=list(weights), lambda_=1.5, relative=relative
    )
    exact = formula(base, branches, importances, weights, 1.5, relative)
    np.testing.assert_allclose(merged, exact, atol=3e-7 * np.abs(exact).max())
    assert list(kept) == [1, 1, 1]


def test_a_tensor_without_importances_is_averaged():
    base, branches = real_sized(SHAPE, 3, branches=2)
    merged, _ = merge_arrays("fisher", base, branches, importance=[np.zeros(SHAPE, np.float32)] * 2)
    np.testing.assert_allclose(merged, sum(b.astype(np.float64) for b in branches) / 2, atol=1e-8)


def test_over_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, branches = real_sized(SHAPE, 4, branches=2)
    rng = np.random.default_rng(5)
    importances = [rng.chisquare(1, SHAPE).astype(np.float32) for _ in range(2)]
    for name, tensor in zip(("base", "a", "b", "ia", "ib"), (base, *branches, *importances), strict=True):
        hf_dir(tmp_path / name, {"x": tensor})
    recipe = {
        "merge_method": "fisher", "base_model": "base",
        "models": [{"model": n, "parameters": {"importance": f"i{n}"}} for n in ("a", "b")],
    }  # fmt: skip
    merge(recipe, "out")
    expected = merge_arrays("fisher", base, branches, importance=importances)[0]
    # The sums of the importances are taken in another order.
    np.testing.assert_allclose(load_file("out/model.safetensors")["x"], expected, atol=1e-9)
    with pytest.raises(UserError, match="fisher needs parameter 'importance' of model 'b'; it has no default"):
        merge({**recipe, "models": [recipe["models"][0], "b"]}, "other")
