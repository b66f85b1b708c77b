import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.merge.engine import chunks
from tests.merge.reference import heavy_tailed, hf_dir, merge_arrays, real_sized

SHAPES = [(48, 64), (64, 48)]


def isotropic(base, branches, weights, scale):
    b = base.astype(np.float64)
    u, s, v = np.linalg.svd(sum(w * (x - b) for w, x in zip(weights, branches, strict=True)), full_matrices=False)
    return b + scale * s.mean() * u @ v


def nearest_orthonormal(columns):
    # By the polar decomposition: columns (columns^T columns)^(-1/2).
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / np.sqrt(values)) @ vectors.T


def tsv(base, branches, weights, rank, scale):
    b = base.astype(np.float64)
    kept = max(1, int(rank * min(base.shape)) // len(branches))
    parts = [np.linalg.svd(w * (x - b), full_matrices=False) for w, x in zip(weights, branches, strict=True)]
    left = nearest_orthonormal(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    right = nearest_orthonormal(np.concatenate([v[:kept].T for _, _, v in parts], axis=1))
    return b + scale * (left * np.concatenate([s[:kept] for _, s, _ in parts])) @ right.T


def check(merged, exact, base):
    """Singular vectors in float32: within 1e-3 of the change's rms."""
    rms = np.sqrt(np.mean((exact - base) ** 2))
    assert np.max(np.abs(np.asarray(merged, np.float64) - exact)) <= 1e-3 * rms + 1e-7 * np.abs(exact).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [real_sized, heavy_tailed])
def test_formulas(shape, make):
    base, branches = make(shape, 1, branches=3)
    weights = (1.0, 0.5, 2.0)
    merged, kept = merge_arrays("isotropic", base, branches, weight=list(weights), lambda_=0.7)
    check(merged, isotropic(base, branches, weights, 0.7), base)
    assert list(kept) == [1, 1, 1]
    for rank in (1.0, 0.5):
        merged, _ = merge_arrays("tsv", base, branches, weight=list(weights), rank=rank)
        check(merged, tsv(base, branches, weights, rank, 1.0), base)


def test_one_model_of_full_rank_is_itself():
    base, branches = real_sized((48, 64), 2)
    merged, _ = merge_arrays("tsv", base, branches)
    check(merged, branches[0].astype(np.float64), base)


@pytest.mark.parametrize("name", ["isotropic", "tsv"])
def test_vectors_are_added_and_equal_models_stay(name):
    base, branches = real_sized((96,), 3, branches=2)
    merged, _ = merge_arrays(name, base, branches)
    exact = base.astype(np.float64) + sum(x.astype(np.float64) - base for x in branches)
    np.testing.assert_allclose(merged, exact, atol=1e-8)
    base, _ = real_sized((48, 64), 4)
    np.testing.assert_array_equal(merge_arrays(name, base, [base, base])[0], base)


@pytest.mark.parametrize("name", ["isotropic", "tsv"])
def test_over_files_in_chunks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    base, branches = real_sized((64, 48), 5, branches=2)
    for model, tensor in zip(("base", "a", "b"), (base, *branches), strict=True):
        hf_dir(tmp_path / model, {"x": tensor})
    merge({"merge_method": name, "base_model": "base", "models": ["a", "b"]}, "out")
    expected = np.asarray(merge_arrays(name, base, branches)[0])
    np.testing.assert_array_max_ulp(load_file("out/model.safetensors")["x"], expected, maxulp=1)
