"""Every method over files in chunks is every method over whole arrays, on one device or on eight."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.merge.engine import chunks
from bmjax.merge.engine.trees import merge_trees
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model.spec import Param
from tests.merge.cases import CASES, SHAPE, has_base, label, method_of
from tests.merge.reference import heavy_tailed, hf_dir, merge_arrays, real_sized

BASE, BRANCHES = real_sized(SHAPE, 31, delta_rms=5e-4, branches=3)
MODELS = dict(zip(("base", "a", "b", "c"), [BASE, *BRANCHES], strict=True))


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Not a whole number of them in a tensor, be they of its rows or of its entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 8192)
        patch.setattr(chunks, "COLUMNS", 200)
        patch.setattr(chunks, "SAMPLE", 2048)
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(hf_dir(root / name, {"w": w})) for name, w in MODELS.items()}


def recipe_of(case, sources):
    """The case as a recipe of the models a, b, c."""
    method, (_, n, parameters) = method_of(case), case
    top = {key: parameters[key] for key in ("seed", "compat") if key in parameters}
    entries = [{"model": name, "parameters": {}} for name in ("a", "b", "c")[:n]]
    shared = {}
    for argument, value in parameters.items():
        if isinstance(value, tuple):
            for entry, number in zip(entries, value, strict=True):
                entry["parameters"][argument] = number
        elif argument not in top:
            shared[argument.rstrip("_")] = value
    base = {"base_model": "base"} if has_base(case) else {}
    return read_recipe(
        {"merge_method": method, "models": entries, "parameters": shared, "sources": sources, **base, **top}
    )


def measured(case):
    """Whether the method sums over the tensor, which is rounded otherwise in chunks and on several devices."""
    method, parameters = method_of(case), case[2]
    if "rescale" in METHODS[method].parameters and not method.startswith("dare"):
        return parameters.get("rescale", METHODS[method].parameters["rescale"].default)
    means = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce")
    return method in means or (method.startswith("dare") and "compat" in parameters)


def assert_last_bits(merged, whole):
    size = np.maximum(np.abs(whole), np.sqrt(np.mean(whole.astype(np.float64) ** 2)))
    np.testing.assert_array_less(np.abs(merged - whole) / size, 2e-7)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_files_in_chunks_equal_whole_arrays(case, directories, tmp_path):
    cache = chunks.ChunkCache(SHAPE, METHODS[method_of(case)].by_row, pool=None, keep=False)
    assert len(cache.chunks) == 8 and cache.chunks[7].count < cache.chunks[7].height * cache.columns
    recipe = recipe_of(case, directories)
    models = {name: {"w": w} for name, w in MODELS.items()}
    params, report = merge_trees(recipe, models, [Param(("w",), SHAPE, ("rows", "columns"), "w", "normal")])
    whole, (step,) = np.asarray(params["w"]), recipe.steps
    on_disk = merge(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")["w"]
    if measured(case):
        assert_last_bits(merged, whole)
    else:
        np.testing.assert_array_equal(merged, whole)
    for name, model in report["tensors"]["w"][step.name]["models"].items():
        assert model["kept"] == pytest.approx(on_disk["tensors"]["w"][step.name]["models"][name]["kept"], abs=1e-4)
    merge(recipe, tmp_path / "little", memory=2**14)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "little")]
    assert written[0] == written[1]


# One of each kind of pass: order statistics, rows, sums, counts, columns, sorted rows and masks, rows within a kernel.
PASSES = [
    ("ties", 3, {"density": 0.5}),
    ("arcee_fusion", 3, {}),
    ("breadcrumbs_ties", 3, {"density": 0.5, "rescale": True}),
    ("karcher", 3, {}),
    ("ramplus_tl", 3, {"epsilon": 3e-4, "alpha": 2.0}),
    ("nuslerp", 2, {"nuslerp_flatten": False}),
    ("della", 3, {"density": 0.5}),
    ("model_stock", 3, {"filter_wise": True}),
    ("sce", 3, {"select_topk": 0.3}),
]


@pytest.mark.parametrize("case", PASSES, ids=label)
def test_eight_devices_equal_one(case):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    placed = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    base, *branches = list(MODELS.values())[: case[1] + 1]
    base = base if has_base(case) else None
    single, kept = merge_arrays(method_of(case), base, branches, **case[2])
    base, branches = jax.device_put((base, branches), placed)
    many, kept_by_many = merge_arrays(method_of(case), base, branches, **case[2])
    assert len(many.sharding.device_set) == 8
    assert_last_bits(np.asarray(many), np.asarray(single))
    np.testing.assert_allclose(kept_by_many, kept, atol=1e-4)


ODD = {"vector": (37,), "cube": (3, 5, 16)}


@pytest.mark.parametrize("case", [c for c in PASSES if c[0] in ("nuslerp", "della")], ids=label)
def test_files_of_odd_shapes(case, tmp_path):
    """Whose blocks are mostly padding."""
    made = {key: heavy_tailed(shape, 32, branches=3) for key, shape in ODD.items()}
    tensors = {"base": {key: np.asarray(base) for key, (base, _) in made.items()}}
    for i, name in enumerate(("a", "b", "c")):
        tensors[name] = {key: np.asarray(branches[i]) for key, (_, branches) in made.items()}
    recipe = recipe_of(case, {name: str(hf_dir(tmp_path / name, tensors[name])) for name in tensors})
    rows = [Param((key,), shape, ("rows",) * len(shape), key, "normal") for key, shape in ODD.items()]
    params, _ = merge_trees(recipe, tensors, rows)
    merge(recipe, tmp_path / "out")
    for key, merged in load_file(tmp_path / "out/model.safetensors").items():
        assert merged.shape == ODD[key]
        assert_last_bits(merged, np.asarray(params[key]))


FIRST = {method_of(case): case for case in reversed(CASES)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("method", FIRST)
def test_nan_and_infinity_name_model_and_tensor(method, value, directories, tmp_path):
    case = FIRST[method]
    broken = MODELS["a"].copy()
    broken[77, 123] = value
    sources = {**directories, "a": str(hf_dir(tmp_path / "a", {"w": broken}))}
    with pytest.raises(UserError, match="model 'a': tensor 'w' holds NaN or infinity"):
        merge(recipe_of(case, sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()
