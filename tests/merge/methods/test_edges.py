"""What every method makes of tensors that are special in one way or another."""

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.cases import CASES, SHAPE, assert_near, has_base, label, method_of
from tests.merge.formulas import FORMULAS, exact
from tests.merge.reference import heavy_tailed, jaccard, leaf, merge_arrays, real_sized


def one_changed(n):
    base, branches = real_sized(SHAPE, 11, branches=n)
    return base, [base] * (n - 1) + branches[-1:]


def equal_models(n):
    base, (branch,) = heavy_tailed(SHAPE, 12)
    return base, [branch] * n


def constant_rows(n):
    base, branches = heavy_tailed(SHAPE, 13, branches=n)
    base[:50] = 0.25
    for i, branch in enumerate(branches):
        branch[:40] = 0.25 + 0.125 * (i + 1)
    return base, branches


def equal_magnitudes(n):
    rng = np.random.default_rng(14)
    base = (rng.integers(-100, 100, SHAPE) / 4096).astype(np.float32)
    return base, [(base + rng.integers(-1, 2, SHAPE) / 4096).astype(np.float32) for _ in range(n)]


def sparse_changes(n):
    """Fewer entries changed than a density keeps."""
    base, branches = real_sized(SHAPE, 15, branches=n)
    changed = np.random.default_rng(16).random((n, *SHAPE)) < 0.03
    return base, [np.where(c, x, base) for c, x in zip(changed, branches, strict=True)]


def zeros(n):
    return np.zeros(SHAPE, np.float32), [np.zeros(SHAPE, np.float32)] * n


def from_zero(n):
    return np.zeros(SHAPE, np.float32), heavy_tailed(SHAPE, 17, branches=n)[1]


MADE = [one_changed, equal_models, constant_rows, equal_magnitudes, sparse_changes, zeros, from_zero]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_special_tensors(case, make):
    _, n, parameters = case
    base, branches = make(n)
    base = base if has_base(case) else None
    merged, kept = merge_arrays(method_of(case), base, branches, **parameters)
    expected = exact(method_of(case), base, branches, **parameters)
    assert_near(np.asarray(merged), expected, [base, *branches])
    np.testing.assert_allclose(kept, expected.kept, atol=1e-3)


SCALED = ("linear", "passthrough")


@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in SCALED or c[1:] == (3, {})], ids=label)
def test_equal_models_give_the_model_bit_for_bit(case):
    _, n, parameters = case
    base, _ = heavy_tailed(SHAPE, 18)
    merged = leaf(method_of(case), base if has_base(case) else None, [base] * n, **parameters)
    np.testing.assert_array_equal(merged, base)


# One of every kind of pass and selection; a shape each is a compilation each.
FORMS = [
    ("linear", 2, {"weight": (0.7, 0.3)}),
    ("passthrough", 1, {}),
    ("nearswap", 1, {"t": 2e-3}),
    ("slerp", 1, {"t": 0.3}),
    ("nuslerp", 2, {"weight": (0.3, 0.7)}),
    ("nuslerp", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False}),
    ("nuslerp", 2, {"weight": (0.3, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 2, {"weight": (0.7, 0.3)}),
    ("karcher", 2, {"weight": (0.7, 0.3)}),
    ("model_stock", 2, {}),
    ("model_stock", 2, {"filter_wise": True}),
    ("task_arithmetic", 2, {"lambda_": 0.7}),
    ("ties", 2, {"density": 0.4}),
    ("breadcrumbs", 2, {"density": 0.6, "gamma": 0.2}),
    ("breadcrumbs_ties", 2, {"density": 0.6, "gamma": 0.2}),
    ("dare_linear", 2, {"density": 0.6}),
    ("dare_ties", 2, {"density": 0.6}),
    ("della", 2, {"density": 0.6}),
    ("della_linear", 2, {"density": 0.6}),
    ("sce", 2, {"select_topk": 0.5}),
    ("ram", 2, {"epsilon": 2e-3}),
    ("ramplus_tl", 2, {"epsilon": 2e-3}),
    ("arcee_fusion", 2, {}),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (37,), (3, 5, 16)], ids=str)
@pytest.mark.parametrize("case", FORMS, ids=label)
def test_any_shape(case, shape):
    """A number, one element, a vector and a tensor of three axes. Rows are the last axis, a vector is one row."""
    _, n, parameters = case
    base, branches = heavy_tailed(shape, 19, branches=n)
    base, branches = base if has_base(case) else None, [np.asarray(x) for x in branches]
    merged, kept = merge_arrays(method_of(case), base, branches, **parameters)
    assert merged.shape == shape and merged.dtype == np.float32
    expected = exact(method_of(case), base, branches, **parameters)
    assert_near(np.asarray(merged), expected, [base, *branches])
    np.testing.assert_allclose(kept, expected.kept, atol=1e-6)


BASE, BRANCHES = heavy_tailed(SHAPE, 20, branches=3)
SPARSE = ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")


@pytest.mark.parametrize("method", SPARSE)
def test_density_zero_is_the_base_and_one_keeps_all(method):
    merged, kept = merge_arrays(method, BASE, BRANCHES, density=0.0)
    np.testing.assert_array_equal(merged, BASE)
    np.testing.assert_array_equal(kept, 0)
    more = {"gamma": 0.0} if "breadcrumbs" in method else {}
    elect = method in ("ties", "breadcrumbs_ties", "dare_ties", "della")
    plain = {"density": 1.0, "normalize": False, "rescale": False}
    whole = leaf(method, BASE, BRANCHES, **plain, **more)
    np.testing.assert_array_equal(whole, leaf("ties" if elect else "task_arithmetic", BASE, BRANCHES, normalize=False))
    # One branch of density 0 among others takes no part in anything.
    more["rescale"] = False
    mixed = leaf(method, BASE, BRANCHES, density=[0.5, 0.5, 0.0], **more)
    np.testing.assert_array_equal(mixed, leaf(method, BASE, BRANCHES[:2], density=0.5, **more))


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_gamma(method):
    """gamma 0 keeps the largest, as ties does; a density above 1 - gamma lets fewer large ones drop."""
    branch = BRANCHES[:1]
    np.testing.assert_array_equal(
        leaf(method, BASE, branch, density=0.3, gamma=0.0), leaf("ties", BASE, branch, density=0.3, normalize=False)
    )
    moved = leaf(method, BASE, branch, density=0.95, gamma=0.2) != BASE
    size = np.abs(BRANCHES[0] - BASE)
    n = size.size
    assert moved.sum() == pytest.approx(0.95 * n, abs=3)
    assert size[moved].max() == np.sort(size, axis=None)[int(0.95 * n) - 1]
    assert np.all(size[~moved] > size[moved].max())
    np.testing.assert_array_equal(leaf(method, BASE, branch, density=1.0, gamma=0.3), leaf("ties", BASE, branch))


def test_epsilon():
    """At epsilon 0 della is dare; at its bounds the chance runs from 0 to 1; beyond them it is refused."""
    plain = {"density": 0.3, "rescale": False, "seed": 7}
    np.testing.assert_array_equal(
        leaf("della_linear", BASE, BRANCHES, epsilon=0.0, **plain), leaf("dare_linear", BASE, BRANCHES, **plain)
    )
    merged = leaf("della_linear", BASE, BRANCHES[:1], epsilon=0.3, density=0.3, rescale=False)
    smallest = np.argmin(np.abs(BRANCHES[0] - BASE), axis=1)[:, None]
    np.testing.assert_array_equal(np.take_along_axis(merged, smallest, 1), np.take_along_axis(BASE, smallest, 1))
    merged = leaf("della_linear", BASE, BRANCHES[:1], epsilon=0.3, density=0.7, rescale=False)
    largest = np.argmax(np.abs(BRANCHES[0] - BASE), axis=1)[:, None]
    np.testing.assert_allclose(
        np.take_along_axis(merged, largest, 1), np.take_along_axis(BRANCHES[0], largest, 1), atol=1e-7
    )
    for density in (0.3, 0.7):
        with pytest.raises(UserError, match=r"epsilon: 0\.31 around density"):
            merge_arrays("della", BASE, BRANCHES, density=density, epsilon=0.31)
    for density in (0.0, 1.0):  # where nothing is left to chance
        merge_arrays("della", BASE, BRANCHES, density=density, epsilon=0.31)


def test_select_topk():
    np.testing.assert_array_equal(leaf("sce", BASE, BRANCHES, select_topk=0.0), BASE)
    np.testing.assert_array_equal(leaf("sce", BASE, BRANCHES[:1], select_topk=0.5), BASE)  # one model: no variance
    np.testing.assert_allclose(leaf("sce", BASE, BRANCHES[:1]), BRANCHES[0], atol=3e-7)
    few = leaf("sce", BASE, BRANCHES, select_topk=1e-9)
    np.testing.assert_array_equal(few, BASE)


WEIGHTED = [name for name in FORMULAS if "weight" in METHODS[name].parameters and name != "nuslerp"]
KEPT = {"ties": {"density": 0.5}, **{name: {"density": 0.5, "rescale": False} for name in SPARSE if name != "ties"}}


@pytest.mark.parametrize("method", [name for name in WEIGHTED if name != "model_stock"])
def test_a_model_of_weight_zero_takes_no_part(method):
    base = None if METHODS[method].base == "unused" else BASE
    parameters = KEPT.get(method, {})
    merged = leaf(method, base, BRANCHES, weight=[0.6131, 0.3719, 0.0], **parameters)
    without = leaf(method, base, BRANCHES[:2], weight=[0.6131, 0.3719], **parameters)
    np.testing.assert_allclose(merged, without, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["linear", "karcher", "nuslerp", "model_stock", "task_arithmetic", "breadcrumbs",
                                    "dare_linear", "della_linear"])  # fmt: skip
def test_weights_that_sum_to_zero_are_refused(method):
    base = None if METHODS[method].base == "unused" else BASE
    more = {"normalize": True} if "normalize" in METHODS[method].parameters else {}
    with pytest.raises(UserError, match="weight"):
        merge_arrays(method, base, BRANCHES[:2], weight=[0.5, -0.5], **more)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_opposite_changes_of_equal_weight_elect_plus(method):
    base, (branch,) = equal_magnitudes(1)
    merged = leaf(method, base, [branch, base + (base - branch)], normalize=False)
    np.testing.assert_array_equal(merged, base + np.abs(branch - base))


@pytest.mark.parametrize("method", [name for name in FORMULAS if "rebase" in METHODS[name].parameters])
def test_rebase(method):
    """Changes are measured from another model and added to the base."""
    origin, base, branches = BASE, BRANCHES[2], BRANCHES[:2]
    parameters = {"density": {"density": 0.5}, "select_topk": {"select_topk": 0.5}}
    density = next((values for name, values in parameters.items() if name in METHODS[method].parameters), {})
    merged, kept = merge_arrays(method, base, branches, rebase=origin, **density)
    expected = exact(method, base, branches, rebase=origin, **density)
    assert_near(np.asarray(merged), expected, [base, origin, *branches])
    np.testing.assert_allclose(kept, expected.kept, atol=1e-3)
    np.testing.assert_array_equal(leaf(method, base, [origin, origin], rebase=origin, **density), base)


def test_compat_mergekit_has_the_textbooks_rounding():
    """Its arcee_fusion is ours where changes are large, and rounding noise at those of fine-tuning."""
    agreement = []
    for weight_rms, delta_rms in ((1.0, 0.5), (0.02, 1e-4)):
        base, (branch,) = real_sized(SHAPE, 21, weight_rms, delta_rms)
        masks = [leaf("arcee_fusion", base, [branch], compat=compat) != base for compat in (None, "mergekit")]
        agreement.append(jaccard(*masks))
    assert agreement[0] >= 0.999
    assert agreement[1] < 0.9


WEIGHTED = [name for name in METHODS if "weight" in METHODS[name].parameters and name != "fisher"]


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0)], ids=str)
def test_weights_that_cancel_are_refused_by_the_recipe_or_give_finite_values(name, weights):
    base, branches = heavy_tailed((8, 6), 18, branches=2)
    base = None if METHODS[name].base == "unused" else base
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip("ab", weights, strict=True)]
    recipe = {"merge_method": name, "models": entries} | ({} if base is None else {"base_model": "base"})
    try:
        read_recipe(recipe)
    except UserError as error:
        assert "weight: " in str(error)
        return
    merged = leaf(name, base, branches, weight=weights)
    assert np.isfinite(merged).all()


def test_weights_that_cancel_in_some_tensors_alone_are_refused_by_the_plan():
    weight = [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]
    block = {"models": ["a", "b"], "parameters": {"weight": weight}}
    (step,) = read_recipe({"merge_method": "multislerp", **block}).steps
    assert step.at("attn", 0.0)["weight"] == (1.0, 1.0)
    with pytest.raises(UserError, match="tensor 'mlp': weight: 0, 0 sum to 0"):
        step.at("mlp", 0.0)
    block["parameters"]["normalize_weights"] = False
    (step,) = read_recipe({"merge_method": "multislerp", **block}).steps
    assert step.at("mlp", 0.0)["weight"] == (0.0, 0.0)
