import importlib
import re

import jax
import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.engine import passes
from bmjax.merge.engine.trees import merge_trees
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model.spec import get, table, unflatten
from bmjax.parallel.mesh import make_mesh, sharding
from tests.merge.reference import SMALL, fuse, fusion_mask, hf_dir, hf_tensors, merge_by, tensors_of, tree_of

BACKBONE = hf_tensors(SMALL, 0)
BRANCHES = {name: hf_tensors(SMALL, i + 1, BACKBONE) for i, name in enumerate(("math", "code", "science"))}
TREES = {name: tree_of(SMALL, t) for name, t in {"backbone": BACKBONE, **BRANCHES}.items()}
TABLE = table(SMALL)
RECIPES = {
    "linear": {"merge_method": "linear", "models": list(BRANCHES)},
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "backbone", "models": list(BRANCHES),
        "parameters": {"lambda": 0.5},
    },
    "symmetric": {"merge_method": "arcee_fusion", "base_model": "backbone", "models": list(BRANCHES)},
    "paper": {
        "steps": [
            {"name": "mid", "merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]},
            {"name": "student", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]},
        ]
    },
    "rebased": {
        "steps": [
            {"name": "one", "merge_method": "arcee_fusion", "base_model": "backbone", "models": ["math"]},
            {
                "name": "two", "merge_method": "arcee_fusion", "base_model": "one", "models": ["code"],
                "parameters": {"rebase": "backbone"},
            },
        ]
    },
    "kept": {
        "merge_method": "task_arithmetic", "base_model": "backbone", "models": list(BRANCHES),
        "keep": ["embed", {"regex": r"layers\.1\..*up_proj"}],
    },
    "kept of the first model": {"merge_method": "linear", "models": list(BRANCHES), "keep": ["mlp"]},
    "kept in steps": {
        "steps": [
            {"name": "one", "merge_method": "ties", "base_model": "math", "models": ["code"], "keep": ["q_proj"]},
            {"name": "two", "merge_method": "ties", "base_model": "one", "models": ["science"], "keep": ["norm"]},
        ]
    },
}  # fmt: skip


def shard(tree, mesh):
    leaves = [
        (row.path, jax.device_put(get(tree, row.path), sharding(mesh, row.axes, row.shape))) for row in TABLE
    ]  # fmt: skip
    return unflatten(leaves)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tensors = {"backbone": BACKBONE, **BRANCHES}
    return {name: str(hf_dir(root / name, tensors[name])) for name in tensors}


@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_file_engine(name, directories, tmp_path):
    recipe = read_recipe({**RECIPES[name], "sources": directories})
    params, report = merge_trees(recipe, TREES, TABLE)
    on_disk = merge(recipe, tmp_path / "out")
    files = open_checkpoint(tmp_path / "out")
    for key, tensor in tensors_of(SMALL, params).items():
        np.testing.assert_array_equal(tensor, files.read(key), err_msg=key)
    assert report["tensors"].keys() == on_disk["tensors"].keys()
    step = recipe.steps[-1].name
    for key in report["tensors"]:
        for model, values in report["tensors"][key][step]["models"].items():
            assert values["kept"] == pytest.approx(on_disk["tensors"][key][step]["models"][model]["kept"], abs=1e-6)


def test_kept_tensors_are_the_donors():
    params, _ = merge_trees(RECIPES["kept"], TREES, TABLE)
    for key, tensor in tensors_of(SMALL, params).items():
        kept = "embed" in key or ("layers.1." in key and "up_proj" in key)
        assert np.array_equal(tensor, BACKBONE[key]) == kept, key


def test_keys_for_files_are_refused():
    recipe = {**RECIPES["linear"], "tokenizer_source": "union"}
    with pytest.raises(UserError, match="tokenizer: other tokens than the base's are for files"):
        merge_trees(recipe, TREES, TABLE)
    merge_trees({**recipe, "tokenizer_source": "base"}, TREES, TABLE[:1])


def test_every_layer_has_its_own_quantiles():
    params, _ = merge_by("arcee_fusion", TREES["science"], {"math": TREES["math"]}, TABLE)
    for key, tensor in tensors_of(SMALL, params).items():
        expected = fuse(BRANCHES["science"][key], BRANCHES["math"][key])
        np.testing.assert_array_equal(tensor, expected.astype(np.float32), err_msg=key)


def test_a_mesh_of_eight_equals_one_device():
    # One row of each kind of layout, because every one is a compilation for eight devices.
    rows = [row for row in TABLE if re.search("embedding|/q/", row.name)]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = {model: shard(tree, mesh) for model, tree in TREES.items()}
    for name in ("symmetric", "rebased"):
        recipe = read_recipe(RECIPES[name])
        single, single_report = merge_trees(recipe, TREES, rows)
        many, many_report = merge_trees(recipe, sharded, rows)
        for row in rows:
            leaf = get(many, row.path)
            assert leaf.sharding.is_equivalent_to(sharding(mesh, row.axes, row.shape), leaf.ndim)
            np.testing.assert_array_max_ulp(np.asarray(leaf), np.asarray(get(single, row.path)), maxulp=1)
        step = recipe.steps[-1].name
        for model, values in single_report["total"][step]["models"].items():
            assert values["kept"] == pytest.approx(many_report["total"][step]["models"][model]["kept"], abs=1e-6)


def test_order_of_the_papers_steps():
    """The result is code's except where mid's change is salient; mid is science's except where math's is."""
    params, _ = merge_trees(RECIPES["paper"], TREES, TABLE)
    for key, tensor in tensors_of(SMALL, params).items():
        mid = fuse(BRANCHES["science"][key], BRANCHES["math"][key]).astype(np.float32)
        np.testing.assert_array_equal(tensor, fuse(BRANCHES["code"][key], mid).astype(np.float32), err_msg=key)


def test_a_rebased_sequence_keeps_changes_of_earlier_steps():
    recipe = read_recipe(RECIPES["rebased"])
    rebased, _ = merge_trees(recipe, TREES, TABLE)
    first, second = RECIPES["rebased"]["steps"]
    reverting, _ = merge_trees({"steps": [first, {**second, "parameters": {}}]}, TREES, TABLE)
    survived = {"rebased": [], "plain": []}
    for label, params in (("rebased", rebased), ("plain", reverting)):
        for key, tensor in tensors_of(SMALL, params).items():
            base = BACKBONE[key].astype(np.float64)
            math, code = (BRANCHES[name][key] - base for name in ("math", "code"))
            # Math's change is still in the entry, alone or with code's added to it.
            moved = tensor - base
            kept = (np.abs(moved - math) < 1e-6) | (np.abs(moved - math - code) < 1e-6)
            mask = fusion_mask(BACKBONE[key], BRANCHES["math"][key])
            survived[label].append(kept[mask])
    assert np.mean(np.concatenate(survived["rebased"])) == 1.0
    assert np.mean(np.concatenate(survived["plain"])) < 0.6


def test_weights_by_branch_and_lambda():
    weights = [1.0, 0.5, 0.25]
    params, _ = merge_by(
        "task_arithmetic", TREES["backbone"], [TREES[n] for n in BRANCHES], TABLE, weight=weights, lambda_=0.7
    )
    for key, tensor in tensors_of(SMALL, params).items():
        base = BACKBONE[key].astype(np.float64)
        change = sum(w * (b[key] - base) for w, b in zip(weights, BRANCHES.values(), strict=True))
        np.testing.assert_allclose(tensor, base + 0.7 * change, atol=1e-7)


def test_rebase_takes_a_tree():
    params, _ = merge_by(
        "task_arithmetic", TREES["math"], {"code": TREES["code"]}, TABLE, rebase=TREES["backbone"]
    )  # fmt: skip
    for key, tensor in tensors_of(SMALL, params).items():
        exact = BRANCHES["math"][key].astype(np.float64) + BRANCHES["code"][key] - BACKBONE[key]
        np.testing.assert_allclose(tensor, exact, atol=1e-7)


def test_result_type_is_that_of_the_base_or_dtype():
    rows = [row for row in TABLE if "norm" in row.name]
    half = jax.tree.map(lambda x: x.astype("bfloat16"), TREES["backbone"])
    params, _ = merge_by("task_arithmetic", half, {"math": TREES["math"]}, rows)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    params, _ = merge_by("task_arithmetic", half, {"math": TREES["math"]}, rows, dtype="float32")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("dtype", ["int8", "uint8", np.int32, "bool"])
def test_a_type_that_holds_no_fractions_is_refused(dtype):
    with pytest.raises(UserError, match=r"dtype: \w+ is no floating-point type"):
        merge_by("task_arithmetic", TREES["backbone"], {"math": TREES["math"]}, TABLE, dtype=dtype)


def test_report_by_layer():
    moved = {**BACKBONE, **{k: v for k, v in BRANCHES["math"].items() if ".1." in k}}
    _, report = merge_by("arcee_fusion", TREES["backbone"], {"math": tree_of(SMALL, moved)}, TABLE)
    kept = {layer: entry["merged"]["models"]["math"]["kept"] for layer, entry in report["layers"].items()}
    assert kept.keys() == {"embed_tokens", "0", "1", "2", "norm", "lm_head"}
    masks = [fusion_mask(BACKBONE[k], moved[k]).ravel() for k in BACKBONE if ".1." in k]
    assert kept.pop("1") == pytest.approx(np.concatenate(masks).mean(), abs=1e-6)
    assert set(kept.values()) == {0.0}
    norm = np.sqrt(sum(np.sum((moved[k].astype(np.float64) - BACKBONE[k]) ** 2) for k in BACKBONE))
    assert report["total"]["merged"]["models"]["math"]["delta_norm"] == pytest.approx(norm, rel=1e-5)


def test_recipes_and_lambdas_share_compiled_programs():
    """A merge costs compilation once a shape, however many recipes a run compares."""
    arcee_fusion = importlib.import_module("bmjax.merge.methods.arcee_fusion")
    scoring = passes.values(arcee_fusion.quick_row_kls, True)
    merge_trees(RECIPES["paper"], TREES, TABLE)
    compiled = scoring._cache_size()
    for scale in (0.1, 0.2):
        merge_by("arcee_fusion", TREES["backbone"], {n: TREES[n] for n in BRANCHES}, TABLE, lambda_=scale)
    assert scoring._cache_size() == compiled


def broken(change):
    tree = jax.tree.map(np.array, TREES["math"])
    change(tree)
    return tree


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["layers"]["mlp"].pop("up"), "model 'math': parameter layers/mlp/up/kernel is missing"),
        (lambda t: t["final_norm"].update(scale=np.ones(3)), "final_norm/scale has shape (3,), expected (32,)"),
        (
            lambda t: t["layers"]["mlp"]["up"]["kernel"].__setitem__((1, 2, 3), np.nan),
            "model 'math': tensor 'model.layers.1.mlp.up_proj.weight' holds NaN",
        ),
    ],
)
def test_broken_trees(change, message):
    with pytest.raises(UserError) as error:
        merge_by("arcee_fusion", TREES["backbone"], {"math": broken(change)}, TABLE)
    assert message in str(error.value)


def test_unknown_names():
    with pytest.raises(UserError, match="no model is named 'backbon'; did you mean 'backbone'"):
        merge_trees({"merge_method": "linear", "models": ["backbon"]}, TREES, TABLE)
