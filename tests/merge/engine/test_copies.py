"""What is copied is copied byte for byte, and masks of infinities are no weights."""

import ml_dtypes
import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from tests.merge.plan_helpers import NORM, soup, tensors
from tests.merge.reference import BF16

UP = "model.layers.1.mlp.up_proj.weight"
MASK = "model.causal_mask"
COPY = {"merge_method": "passthrough", "models": ["a"]}


def notes_of(recipe, out="out"):
    notes = []
    merge(recipe, out, overwrite=True, log=notes.append)
    return notes


def result(name, out="out"):
    return open_checkpoint(out).read(name)


# Values that arithmetic in float32 changes: digits of float64, and numbers below the least normal one.
EXACT = {"float64": (np.float64, 1 + 1e-12), "tiny float64": (np.float64, 1e-310), "subnormal": (np.float32, 1e-41),
         "subnormal bfloat16": (ml_dtypes.bfloat16, 1e-39), "huge float64": (np.float64, 1e300)}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("keep", [False, True])
def test_a_copy_has_the_bytes_of_its_model(save, case, keep):
    dtype, number = EXACT[case]
    a, b = (
        {name: (value.astype(np.float64) * number).astype(dtype) for name, value in tensors(seed=i).items()}
        for i in range(2)
    )
    save("a", a), save("b", b)
    recipe = soup("a", "b", keep=["layers", "embed", "norm", "lm_head"]) if keep else COPY
    notes = notes_of(recipe)
    for name, value in a.items():
        assert result(name).dtype == value.dtype and result(name).tobytes() == value.tobytes()
    assert not any("float64" in note for note in notes)


def test_merges_of_float64_say_that_they_compute_in_float32(save):
    values = {name: value.astype(np.float64) for name, value in tensors().items()}
    save("a", values), save("b", values | {UP: values[UP] + 1e-3})
    (note,) = notes_of(soup("a", "b", keep=["norm"]))
    assert note.startswith("10 tensors (model.embed_tokens.weight, ") and "with the digits of float32" in note
    scaled = notes_of({**COPY, "parameters": {"scale": 2}})
    assert any("with the digits of float32" in note for note in scaled)
    assert notes_of({**soup("a", "b"), "dtype": "float32"}) == []


INFINITE = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
MASKS = {"-inf": INFINITE, "the least number": np.triu(np.full((4, 4), np.finfo(np.float32).min), 1),
         "several values": INFINITE + np.arange(4, dtype=np.float32)}  # fmt: skip
RECIPES = {
    "linear": soup("a", "b"),
    "ties": {"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 0.5}},
    "keep": soup("a", "b", keep=["mask"]),
    "passthrough": COPY,
    "steps": {"steps": [{"name": "mid", **soup("a", "b")}, soup("mid", "a")]},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_mask_that_all_models_share_is_copied(save, mask, recipe, dtype):
    for i, name in enumerate("ab"):
        save(name, tensors(seed=i) | {MASK: MASKS[mask]})
    report = merge({**RECIPES[recipe], **({"dtype": dtype} if dtype else {})}, "out")
    expected = MASKS[mask].astype(BF16) if dtype else MASKS[mask]
    np.testing.assert_array_equal(result(MASK), expected)
    assert UP in report["tensors"] and np.isfinite(report["total"][list(report["total"])[-1]]["reference_norm"])


BROKEN = {
    "a weight with one infinity": (UP, lambda t: t.__setitem__((0, 0), np.inf), "ab"),
    "a weight with NaN": (UP, lambda t: t.__setitem__((0, 0), np.nan), "ab"),
    "a mask with NaN": (MASK, lambda t: t.__setitem__((0, 0), np.nan), "ab"),
    "a mask of one model": (MASK, lambda t: t.__setitem__((0, 3), 0), "b"),
    "a weight of infinities": (UP, lambda t: t.fill(-np.inf), "ab"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_not_finite_are_still_refused(save, case):
    name, spoil, models = BROKEN[case]
    for i, model in enumerate("ab"):
        values = tensors(seed=0) | {MASK: INFINITE.copy(), NORM: np.full(4, i + 1, np.float32)}
        if model in models:
            spoil(values[name])
        save(model, values)
    with pytest.raises(UserError, match=rf"tensor '{name}' holds NaN or infinity"):
        merge(soup("a", "b"), "out")
    if case != "a mask of one model":
        with pytest.raises(UserError, match=rf"tensor '{name}' holds NaN or infinity"):
            merge(COPY, "out")
