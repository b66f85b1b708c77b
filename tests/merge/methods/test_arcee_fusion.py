import importlib
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.calibrate.dispatch import merge
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.engine import passes
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.parallel.mesh import make_mesh
from tests.merge.reference import (
    BF16,
    EPSILON,
    fuse,
    fusion_mask,
    heavy_tailed,
    hf_dir,
    jaccard,
    leaf,
    merge_arrays,
    real_sized,
    softmax,
)

module = importlib.import_module("bmjax.merge.methods.arcee_fusion")

SHAPE = (64, 96)  # of most tests, because each shape is a compilation
REAL = {
    "896, 8e-4": ((300, 896), 0.02, 8e-4, np.float32),
    "896, 1e-4": ((300, 896), 0.02, 1e-4, np.float32),
    "4864, 2e-4": ((150, 4864), 0.02, 2e-4, np.float32),
    "4864, 1e-4": ((150, 4864), 0.03, 1e-4, np.float32),
    "4864, 5e-4, bfloat16": ((150, 4864), 0.02, 5e-4, BF16),
    "4864, 2e-4, bfloat16": ((150, 4864), 0.02, 2e-4, BF16),
    "vector": ((4864,), 0.02, 2e-4, np.float32),
}


@pytest.mark.parametrize("name", REAL)
def test_mask_of_fine_tuned_models(name):
    shape, weight_rms, delta_rms, stored = REAL[name]
    base, (branch,) = real_sized(shape, 1, weight_rms, delta_rms)
    base, branch = base.astype(stored), branch.astype(stored)
    merged, kept = merge_arrays("arcee_fusion", base, [branch])
    exact = fusion_mask(base, branch)
    changed = base.astype(np.float32) != branch.astype(np.float32)
    assert jaccard(np.asarray(merged != base.astype(np.float32)) & changed, exact) >= 0.999
    assert kept[0] == pytest.approx(exact.mean(), abs=1e-4)
    assert 0.02 < kept[0] < 0.3


@pytest.fixture(scope="module")
def embedding():
    """Qwen2.5-0.5B's embedding, that of a branch, and the exact mask."""
    base, (branch,) = real_sized((151_936, 896), 5)
    base, branch = base.astype(BF16), branch.astype(BF16)
    return base, branch, fusion_mask(base, branch)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["files", "mesh"])
def test_mask_of_a_whole_embedding(engine, embedding, tmp_path):
    base, branch, exact = embedding
    if engine == "files":
        key = "model.embed_tokens.weight"
        sources = {n: str(hf_dir(tmp_path / n, {key: t})) for n, t in {"base": base, "branch": branch}.items()}
        recipe = {"merge_method": "arcee_fusion", "base_model": "base", "models": ["branch"], "sources": sources}
        merge(read_recipe(recipe), tmp_path / "out")
        merged = open_checkpoint(tmp_path / "out").read(key)
    else:
        placed = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec("fsdp", "tensor"))
        merged, _ = merge_arrays("arcee_fusion", *jax.device_put((base, [branch]), placed))
        assert len(merged.sharding.device_set) == 8
    assert jaccard(np.asarray(merged, np.float32) != base.astype(np.float32), exact) >= 0.999


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [SHAPE, (96,), (3, 8, 50)])
def test_mask_on_heavy_tails(seed, shape):
    base, (branch,) = heavy_tailed(shape, seed)
    np.testing.assert_array_equal(leaf("arcee_fusion", base, [branch]), fuse(base, branch).astype(np.float32))


@pytest.mark.parametrize("delta_rms", [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 30.0])
def test_row_kl_against_extended_precision(delta_rms):
    base, (branch,) = real_sized((50, 896), 2, 0.3, delta_rms)
    kl = jax.jit(module.row_kl)(base, branch - base)
    np.testing.assert_allclose(kl, exact_kl(base, branch - base), rtol=2e-5)


def exact_kl(base, delta):
    """In extended precision, because float64 cancels at the smallest changes."""
    b, w = base.astype(np.longdouble), base.astype(np.longdouble) + delta
    p, q = softmax(w) + np.longdouble(EPSILON), softmax(b) + np.longdouble(EPSILON)
    return np.sum(p * np.log(p / q), axis=-1, keepdims=True).astype(np.float64)


quick = passes.values(module.quick_row_kls, True)


@pytest.mark.parametrize("columns", [64, 100, 896, 4864])
def test_quick_kl_is_within_its_error_of_the_exact_one(columns):
    """At changes from 1e-6 to 0.1, without and with one of 0.02 or 0.3 in each row."""
    for weight_rms, delta_rms, largest in itertools.product((0.02, 0.3), (1e-6, 2e-4, 3e-3, 0.1), (0, 0.02, 0.3)):
        base, (branch,) = real_sized((24, columns), columns, weight_rms, delta_rms)
        branch[np.arange(24), 7 * np.arange(24) % columns] += np.float32(largest)
        kl, doubt = quick(passes.block(base, [branch], {}), [])
        sure = doubt == 0
        assert sure.mean() > 0.85, (weight_rms, delta_rms, largest)
        exact = exact_kl(base, branch - base)
        np.testing.assert_allclose(kl[sure], exact[sure], rtol=module.KL_ERROR)


DOUBTFUL_ROWS = {
    "a change of 0.6": lambda base, branch: branch.__setitem__(5, base[5] + 0.6),
    "a weight of 25": lambda base, branch: (base.__setitem__(5, 25.0), branch.__setitem__(5, 25.5)),
    "a share so small that 1e-8 counts": lambda base, branch: (base.__iadd__(1.2), branch.__iadd__(1.2)),
    "a shift of the row": lambda base, branch: branch.__setitem__(slice(None), base + 0.25),
}


@pytest.mark.parametrize("case", DOUBTFUL_ROWS)
def test_doubtful_rows_are_computed_by_the_full_formula(case):
    base, (branch,) = real_sized((40, 4864), 3, 0.02, 4e-3)
    DOUBTFUL_ROWS[case](base[3], branch[3])
    _, doubt = quick(passes.block(base, [branch], {}), [])
    np.testing.assert_array_equal(np.flatnonzero(doubt), [3])
    np.testing.assert_array_equal(leaf("arcee_fusion", base, [branch]), fuse(base, branch).astype(np.float32))


def test_files_and_trees_agree_where_some_rows_are_doubtful(tmp_path):
    """Over files doubtful rows are picked, 16 at a time."""
    base, (branch,) = real_sized((3000, 512), 4, 0.02, 4e-4)
    branch[17 * np.arange(40), 3] += 0.7
    sources = {n: str(hf_dir(tmp_path / n, {"w.weight": t})) for n, t in {"base": base, "branch": branch}.items()}
    recipe = {"merge_method": "arcee_fusion", "base_model": "base", "models": ["branch"], "sources": sources}
    merge(read_recipe(recipe), tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out").read("w.weight")
    assert merged.tobytes() == leaf("arcee_fusion", base, [branch]).tobytes()


@pytest.mark.parametrize("stored", [np.float32, BF16])
def test_only_entries_at_the_limit_may_be_decided_otherwise(stored):
    """An importance is within KL_ERROR of the exact one, so the limit, of three of them, within four times that."""
    base, (branch,) = real_sized((300, 896), 5, 0.02, 3e-4)
    branch[::7, 11] += 0.3
    base, branch = base.astype(stored).astype(np.float32), branch.astype(stored).astype(np.float32)
    importance = np.abs(branch.astype(np.float64) - base) * exact_kl(base, branch - base)
    q1, median, q3 = np.sort(importance, axis=None)[[int(q * (base.size - 1)) for q in (0.25, 0.5, 0.75)]]
    limit = median + 1.5 * (q3 - q1)
    decided = np.abs(importance / limit - 1) > 5 * module.KL_ERROR
    assert decided.mean() > 1 - 1e-4
    kept = leaf("arcee_fusion", base, [branch]) != base
    np.testing.assert_array_equal(kept[decided], (importance >= limit)[decided])


def test_extreme_values_stay_finite():
    rng = np.random.default_rng(4)
    base = (100 * rng.standard_t(1, SHAPE)).astype(np.float32)
    branch = (base + 100 * rng.standard_t(1, SHAPE)).astype(np.float32)
    kl = module.row_kl(base, branch - base)
    assert np.all(np.isfinite(kl)) and np.all(kl >= 0)
    assert np.all(np.isfinite(leaf("arcee_fusion", base, [branch])))


@pytest.mark.parametrize("shape", [(), (5,), SHAPE])
def test_nothing_changed(shape):
    base = np.asarray(heavy_tailed(SHAPE, 5)[0].ravel()[: int(np.prod(shape))]).reshape(shape)
    merged, kept = merge_arrays("arcee_fusion", base, [base, base])
    np.testing.assert_array_equal(merged, base)
    np.testing.assert_array_equal(kept, [0, 0])


@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_rows_of_one_element_take_the_new_value(shape):
    """Their softmax is 1 whatever the value: every importance is 0 and reaches the threshold 0."""
    base, branch = np.full(shape, 0.5, np.float32), np.full(shape, 0.7, np.float32)
    merged, kept = merge_arrays("arcee_fusion", base, [branch])
    np.testing.assert_array_equal(merged, branch)
    assert kept[0] == 1


def test_entries_of_a_vector_that_equal_the_limit_are_kept():
    """Changes of 1 to 4 units, by quarters: the limit is 2 + 1.5 * (3 - 1) units, rounding or not."""
    base = np.full(400, 0.75, np.float32) + np.arange(400, dtype=np.float32) / 1024
    units = np.repeat([1, 2, 3, 5], 100)
    merged, kept = merge_arrays(
        "arcee_fusion", base, [base + (units * 2.0**-10 * np.sign(units - 2.5)).astype(np.float32)]
    )
    assert kept[0] == 0.25
    np.testing.assert_array_equal(merged != base, units == 5)


def test_constant_and_shifted_rows():
    base, (branch,) = real_sized(SHAPE, 6)
    base[:5] = 0.25
    branch[:5] = 0.375  # constant rows, shifted: softmax and so importance do not change
    merged = leaf("arcee_fusion", base, [branch])
    np.testing.assert_array_equal(merged[:5], base[:5])
    np.testing.assert_array_equal(merged, fuse(base, branch).astype(np.float32))


def test_kept_entries_are_the_branch_bit_for_bit():
    base, (branch,) = real_sized(SHAPE, 7, weight_rms=1.0, delta_rms=0.3)
    merged = leaf("arcee_fusion", base, [branch])
    assert np.all((merged == base) | (merged == branch))


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_symmetric_form(combine, scale):
    base, branches = heavy_tailed(SHAPE, 8, branches=3)
    branches[1] = (base + 1.3 * (branches[0] - base)).astype(np.float32)  # so that masks overlap
    merged, kept = merge_arrays("arcee_fusion", base, branches, combine=combine, lambda_=scale)
    masks = np.stack([fusion_mask(base, b) for b in branches])
    assert (masks.sum(0) >= 2).any()
    deltas = np.stack([b.astype(np.float64) - base for b in branches])
    change = np.sum(masks * deltas, axis=0)
    if combine == "mean":
        change = change / np.maximum(masks.sum(0), 1)
    np.testing.assert_allclose(merged, base + scale * change, rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(kept, masks.reshape(3, -1).mean(1), atol=1e-6)


def test_unchanged_branch_does_not_dilute_the_mean():
    base, (branch,) = heavy_tailed(SHAPE, 9)
    sparse = base.copy()
    sparse[0, :3] += 0.5  # most importances are 0, and so is the threshold
    merged = leaf("arcee_fusion", base, [branch, sparse])[1:]
    np.testing.assert_array_equal(merged, leaf("arcee_fusion", base, [branch])[1:])


def test_rebase():
    backbone, (math, code) = heavy_tailed(SHAPE, 10, branches=2)
    merged = leaf("arcee_fusion", math, [code], rebase=backbone)
    np.testing.assert_allclose(merged, fuse(math, code, origin=backbone), atol=3e-7)
    mask = fusion_mask(math, code, origin=backbone)
    np.testing.assert_array_equal(merged[~mask], math[~mask])


def test_deterministic():
    base, (branch,) = real_sized(SHAPE, 11)
    first, second = (leaf("arcee_fusion", base, [branch]) for _ in range(2))
    assert first.tobytes() == second.tobytes()
