import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.nodes import prepare
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from tests.merge.plan_helpers import EMBED, HEAD, NORM, names, planned, soup, tensors

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def test_whole_models(save):
    a, b = save("a", tensors(head=False)), save("b", tensors(head=False, seed=1))
    result = planned(soup("a", "b", parameters={"weight": [1, 2]}), a=a, b=b)
    assert names(result) == list(a.tensors)
    by_name = {node.name: node for node in result.nodes}
    up = by_name["model.layers.1.mlp.up_proj.weight"]
    assert (up.dtype, up.shape, up.floating) == (F32, (8, 4), True)
    assert up.arguments == {"weight": (pytest.approx(4 / 3), pytest.approx(4 / 3)), "normalize": True}
    assert {model: (s.tensor, s.rows, s.node) for model, s in up.inputs.items()} == {
        "a": (up.name, None, None), "b": (up.name, None, None),
    }  # fmt: skip
    assert list(up.files()) == [("a", up.name), ("b", up.name)]
    assert by_name["model.layers.3.mlp.up_proj.weight"].arguments["weight"] == (2.0, 2.0)
    assert result.config_changes == {} and len(result.notes) == 1 and "goes along the depth" in result.notes[0]


def test_depth_of_no_layer_is_0_of_an_only_layer_1(save):
    """As mergekit 0.1.5 plans pre and post weights, and slices of one layer."""
    a = save("a", tensors(layers=1))
    values = [{"filter": "norm", "value": [2, 3]}, {"value": [1, 5]}]
    result = planned(soup("a", parameters={"weight": values}), a=a)
    assert [node.arguments["weight"] for node in result.nodes if node.name in (EMBED, HEAD)] == [(1.0,), (1.0,)]
    assert [node.arguments["weight"] for node in result.nodes if node.name == NORM] == [(2.0,)]
    assert [node.arguments["weight"] for node in result.nodes if ".0." in node.name] == [(5.0,), (5.0,)]


def test_every_stack_of_layers_has_its_own_depth(save):
    rows = {
        f"{stack}.{i}.w": np.ones((2, 2), np.float32) for stack, n in (("vision", 3), ("text", 2)) for i in range(n)
    }
    result = planned(soup("a", parameters={"weight": [0.5, 1.5]}), a=save("a", rows))
    assert {node.name: node.arguments["weight"] for node in result.nodes} == {
        "vision.0.w": (0.5,), "vision.1.w": (1.0,), "vision.2.w": (1.5,), "text.0.w": (0.5,), "text.1.w": (1.5,),
    }  # fmt: skip


def test_a_later_step_reads_an_earlier_one_as_a_node(save):
    models = {name: save(name, tensors(seed=i, dtype=BF16)) for i, name in enumerate("abc")}
    result = planned(
        {
            "steps": [
                {"name": "mid", "merge_method": "task_arithmetic", "base_model": "a", "models": ["b"]},
                {"merge_method": "linear", "models": ["mid", "c", "a"]},
            ],
            "dtype": "float16",
        },
        **models,
    )
    up = next(node for node in result.nodes if node.name.endswith("0.mlp.up_proj.weight"))
    mid = up.inputs["mid"].node
    assert (up.dtype, mid.dtype) == (np.float16, F32)
    assert (mid.step.name, list(mid.inputs), mid.arguments["lambda"]) == ("mid", ["a", "b"], 1.0)
    assert list(up.files()) == [("a", up.name), ("b", up.name), ("c", up.name)]


def test_stored_types_of_the_base_are_kept(save):
    a, b = tensors(), tensors(dtype=BF16)
    b[NORM] = a[NORM]
    for name in ("positions", "mask"):
        a[name] = b[name] = np.arange(3)
    result = planned(soup("a", base_model="b"), a=save("a", a), b=save("b", b))
    kinds = {node.name: (node.dtype, node.floating, bool(node.arguments)) for node in result.nodes}
    assert kinds[EMBED] == (BF16, True, True) and kinds[NORM] == (F32, True, True)
    assert kinds["positions"] == (np.dtype(np.int64), False, False)


FRANKEN = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "b", "layer_range": [1, 4]}]},
    ],
}


def test_frankenmerge(save):
    a = save("a", tensors(), num_hidden_layers=4, layer_types=["a0", "a1", "a2", "a3"], mlp_only_layers=[1])
    b = save("b", tensors(5, seed=1), num_hidden_layers=5, layer_types=["b0", "b1", "b2", "b3", "b4"])
    result = planned(FRANKEN, a=a, b=b)
    layers = [(i, part) for i in range(6) for part in ("self_attn.q_proj", "mlp.up_proj")]
    assert names(result) == [EMBED, *(f"model.layers.{i}.{part}.weight" for i, part in layers), NORM, HEAD]
    read = [(*node.files(),) for node in result.nodes]
    assert read[0] == (("a", EMBED),) and read[-2:] == [(("b", NORM),), (("b", HEAD),)]
    assert [files for node, files in zip(result.nodes, read, strict=True) if "up_proj" in node.name] == [
        ((model, f"model.layers.{i}.mlp.up_proj.weight"),)
        for model, i in (("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3))
    ]
    assert result.config_changes == {
        "num_hidden_layers": 6, "layer_types": ["a0", "a1", "a2", "b1", "b2", "b3"],
    }  # fmt: skip
    assert all("differs" in note for note in result.notes)


def test_slices_of_several_models_have_depths_of_their_own(save):
    models = {name: save(name, tensors(n, seed=n), n_layer=n) for name, n in (("a", 4), ("b", 5))}
    recipe = {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [2, 5]}]},
            {"sources": [{"model": "b", "layer_range": [0, 1]}, {"model": "a", "layer_range": [3, 4]}],
             "parameters": {"t": [0.25, 0.75]}},
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
    }  # fmt: skip
    result = planned(recipe, **models)
    ups = [node for node in result.nodes if "up_proj" in node.name]
    assert [node.arguments["t"] for node in ups] == [0.0, 0.5, 1.0, 0.75]
    assert [node.step.base for node in ups] == ["a"] * 4
    assert [[t.split(".")[2] for _, t in node.files()] for node in ups] == [
        ["0", "2"],
        ["1", "3"],
        ["2", "4"],
        ["3", "0"],
    ]
    assert {node.name: node.arguments["t"] for node in result.nodes if node.name in (EMBED, NORM)} == {
        EMBED: 0.5, NORM: 0.25,
    }  # fmt: skip
    assert result.config_changes == {} and len(result.nodes) == len(models["a"].tensors)


def test_a_step_of_slices_is_read_like_a_model(save):
    models = {name: save(name, tensors(seed=i), num_hidden_layers=4) for i, name in enumerate("ab")}
    recipe = {
        "steps": [
            {**FRANKEN, "name": "deep"},
            {"merge_method": "linear", "slices": [{"sources": [{"model": "deep", "layer_range": [2, 6]},
                                                               {"model": "a", "layer_range": [0, 4]}]}]},
        ]
    }  # fmt: skip
    result = planned(recipe, **models)
    ups = [node for node in result.nodes if "up_proj" in node.name]
    assert [[(m, int(t.split(".")[2])) for m, t in node.files()] for node in ups] == [
        [("a", 2), ("a", 0)], [("b", 1), ("a", 1)], [("b", 2), ("a", 2)], [("b", 3), ("a", 3)],
    ]  # fmt: skip
    assert [node.inputs["deep"].node.name for node in ups] == [
        f"model.layers.{i}.mlp.up_proj.weight" for i in range(2, 6)
    ]


@pytest.mark.parametrize("rows", [4, 9])
def test_other_vocabulary_sizes(save, rows):
    base = save("base", tensors(vocabulary=6), vocab_size=6)
    other = save("other", tensors(vocabulary=rows, seed=1), vocab_size=rows)
    result = planned(
        {"merge_method": "task_arithmetic", "base_model": "base", "models": ["other"]}, base=base, other=other
    )
    expected = {4: [0, 1, 2, 3, -1, -1], 9: [0, 1, 2, 3, 4, 5]}[rows]
    for node in result.nodes:
        source = node.inputs["other"]
        assert node.inputs["base"].rows is None
        if node.name in (EMBED, HEAD):
            assert node.shape == (6, 4) and source.rows.dtype == np.int64 and source.rows.tolist() == expected
            lacking = [(m, t, at.tolist()) for m, t, at in source.others]
            assert lacking == ([("base", node.name, [-1, -1, -1, -1, 4, 5])] if rows == 4 else [])
        else:
            assert source.rows is None
    (note,) = result.notes
    told = {4: "the 2 it lacks are taken from there", 9: "its last 3 are not read"}[rows]
    assert note == f"model 'other' has {rows} rows of tokens, 'base' 6: {told}"
    assert result.config_changes == {}


def test_surplus_and_computed_tensors_are_told(save):
    a, b = tensors(), tensors(seed=1)
    for i in range(4):
        a[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    b["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
    result = planned(soup("a", "b"), a=save("a", a), b=save("b", b))
    assert names(result) == list(tensors())
    surplus, computed = sorted(result.notes, key=lambda note: "left out" in note)
    assert "'b' holds 1 tensor (model.layers.0.self_attn.q_norm.weight) that 'a' lacks; not merged" in surplus
    assert computed.startswith("left out 4 tensors") and "'b' lacks" in computed


def test_filters_that_decide_nothing_are_told(save):
    values = [
        {"filter": "self_atn", "value": 0.5},
        {"filter": "mlp", "value": 0.2},
        {"regex": "up", "value": 0.1},
        {"value": 1},
    ]
    result = planned(soup("a", parameters={"weight": values}), a=save("a", tensors()))
    assert [note.split(": ", 1)[1] for note in result.notes] == [
        "parameter 'weight': filter 'self_atn' decides for no tensor",
        "parameter 'weight': filter 'up' decides for no tensor",
    ]


def test_sharded_inputs(save, tmp_path):
    values = tensors()
    folder = tmp_path / "b"
    folder.mkdir()
    mapping = {}
    for i, name in enumerate(reversed(values)):
        file = f"part-{i % 3}.safetensors"
        mapping[name] = file
        if i < 3:
            save_file({n: v for j, (n, v) in enumerate(reversed(values.items())) if j % 3 == i}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    b = open_checkpoint(folder)
    assert list(b.tensors) != list(values)
    result = planned(soup("a", "b"), a=save("a", values), b=b)
    assert names(result) == list(values)
    save_file(tensors(seed=9), folder / "model.safetensors")
    (note,) = planned(soup("a", "b"), a=open_checkpoint("a"), b=open_checkpoint(folder)).notes
    assert note.startswith("model 'b': model.safetensors: 1 more file of weights, not read")


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


UP = "model.layers.1.mlp.up_proj.weight"


BAD = {
    "missing": (without(tensors(), UP), soup("a", "b"), f"model 'b' lacks 1 tensor ({UP}) that 'a' has"),
    "missing in the base": (
        without(tensors(), UP),
        {"merge_method": "task_arithmetic", "base_model": "b", "models": ["a"]},
        None,
    ),
    "shape": (
        {**tensors(), UP: np.ones((9, 4), np.float32)},
        soup("a", "b"),
        f"tensor '{UP}' has shape [9, 4] in model 'b' and [8, 4] in 'a'",
    ),
    "hidden size": (tensors(hidden=3), soup("a", "b"), f"'{EMBED}' has shape [6, 3] in model 'b' and [6, 4] in 'a'"),
    "shape of the donor": (tensors(hidden=3), soup("a", base_model="b"), "has shape [6, 3] in model 'b' and [6, 4]"),
    "quantized": (
        {**tensors(), UP: np.ones((8, 4), np.int8)},
        soup("a", "b"),
        "model 'b': its weights are quantized (I8 weights)",
    ),
    "range": (
        tensors(),
        {"merge_method": "linear", "slices": [{"sources": [{"model": "b", "layer_range": [2, 5]}]}]},
        "model 'b': layer_range ends at 5, but model.layers has 4 layers",
    ),
    "two stacks": (
        {"encoder.0.w": np.ones(2), "decoder.0.w": np.ones(2)},
        {"merge_method": "linear", "slices": [{"sources": [{"model": "b", "layer_range": [0, 1]}]}]},
        "model 'b': slices need one stack of layers; by its tensors' names it has encoder, decoder",
    ),
    "no value": (
        tensors(),
        soup("a", "b", parameters={"weight": [{"filter": "mlp", "value": 0}, {"value": 1}]}),
        "step 'merged': tensor 'model.layers.0.mlp.up_proj.weight': ",
    ),
    "no tensor": ({}, soup("b"), "model 'b': holds no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_that_do_not_fit(save, name):
    values, recipe, message = BAD[name]
    a, b = save("a", tensors()), save("b", values)
    if message is None:
        assert any("'a' holds 1 tensor" in note for note in planned(recipe, a=a, b=b).notes)
        return
    with pytest.raises(UserError) as error:
        planned(recipe, a=a, b=b)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_parameter_without_a_value_names_the_tensor(save, monkeypatch):
    import dataclasses
    import inspect

    from bmjax.merge.methods import METHODS

    slerp = METHODS["slerp"]
    required = dataclasses.replace(slerp.parameters["t"], default=inspect.Parameter.empty)
    monkeypatch.setitem(METHODS, "slerp", dataclasses.replace(slerp, parameters={"t": required}))
    a, b = save("a", tensors()), save("b", tensors())
    recipe = {"merge_method": "slerp", "base_model": "a", "models": ["b"]}
    with pytest.raises(UserError, match="slerp needs parameter 't'; it has no default"):
        read_recipe(recipe)
    recipe["parameters"] = {"t": [{"filter": "mlp", "value": 0.5}]}
    with pytest.raises(UserError, match=f"'t' has no value for tensor '{EMBED}'"):
        planned(recipe, a=a, b=b)


def test_a_hub_models_directory_by_two_names_is_one_model(save, monkeypatch):
    for name in ("snapshot", "a"):
        save(name, tensors())
    monkeypatch.setattr(Recipe, "directory", lambda self, name, **more: Path("snapshot" if "/" in name else name))
    recipe = {"merge_method": "ties", "base_model": "org/name", "models": ["snapshot", "a"]}
    with pytest.raises(UserError, match="models 'org/name' and 'snapshot' are one directory"):
        prepare(read_recipe(recipe), "out")


def test_whole_numbers_that_differ_are_found_by_the_plan(save):
    masks = [np.arange(4), np.arange(4)[::-1].copy()]
    a, b = (save(name, tensors() | {"model.mask": mask}) for name, mask in zip("ab", masks, strict=True))
    with pytest.raises(
        UserError, match=r"'model.mask' is int64 and differs between models 'a' and 'b'.*`keep: \[model.mask"
    ):
        planned(soup("a", "b"), a=a, b=b)
    assert "model.mask" in names(planned(soup("a", "b", keep=["model.mask"]), a=a, b=b))


def test_two_directories_with_the_same_weights_are_told(save, tmp_path):
    save("a", tensors())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/model.safetensors").symlink_to("../a/model.safetensors")
    notes = []
    merge(soup("a", "b"), "out", log=notes.append)
    assert any("'a' and 'b' are two directories, but read the same files" in note for note in notes)
