import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.recipe.test_recipe import sliced

SLERP = """
slices:
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 40]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 40]}
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
"""


def test_mergekits_gradient_slerp(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SLERP)
    (step,) = read_recipe(path).steps
    (part,) = step.slices
    assert (part.step.base, part.step.branches, part.layers) == (
        "psmathur/orca_mini_v3_13b", ("garage-bAInd/Platypus2-13B",), 40,
    )  # fmt: skip
    layer = "model.layers.10."
    assert part.step.at(layer + "self_attn.q_proj.weight", 10 / 39)["t"] == pytest.approx(
        np.interp(10 / 39, [0, 0.25, 0.5, 0.75, 1], [0, 0.5, 0.3, 0.7, 1])
    )
    assert part.step.at(layer + "mlp.up_proj.weight", 1.0) == {"t": 0.0}
    assert part.step.at("model.norm.weight", 0.0) == {"t": 0.5}


def test_frankenmerge_slices():
    recipe = read_recipe({
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 5],
                          "parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]}}],
             "residual_weight": 0.5},
        ],
    })  # fmt: skip
    (step,) = recipe.steps
    assert recipe.inputs == ("a", "b") and recipe.donor == "a" and step.branches == ("a", "b")
    first, second = step.slices
    assert (first.ranges, first.layers, first.step.at("x", 0.0)) == ({"a": (0, 3)}, 3, {"scale": (1.0,)})
    assert (second.ranges, second.layers) == ({"b": (1, 5)}, 4)
    assert second.step.at("model.layers.3.self_attn.o_proj.weight", 0.5) == {"scale": (0.0,)}
    assert "residual_weight has no effect" in recipe.notes[0]


def test_parameters_of_all_levels():
    block = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2]},
                    {"model": "a", "layer_range": [2, 4], "parameters": {"weight": [{"filter": "mlp", "value": 0.1}]}},
                    {"model": "b", "layer_range": [4, 6]},
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 0.2}, {"filter": "attn", "value": 0.3}]},
            }
        ],
        "parameters": {"weight": 0.4, "lambda": [1, 2]},
    }
    recipe = read_recipe(block)
    step = recipe.steps[0].slices[0].step
    assert step.base == "base" and step.branches == ("a", "b")
    assert step.at("layers.0.mlp.up.weight", 0.0)["weight"] == (0.1, 0.2)
    assert step.at("layers.0.attn.q.weight", 0.0)["weight"] == (0.3, 0.3)
    expected = {"weight": (0.4, 0.4), "lambda": 1.25, "normalize": False, "rebase": None}
    assert expected.items() <= step.at("norm.weight", 0.25).items()
    assert step.at("layers.0.mlp.w", 0.0, {"a": "layers.2.other.w"})["weight"] == (0.4, 0.2)
    assert recipe.notes == ()


def test_what_has_no_effect_is_told():
    recipe = read_recipe(sliced([["a", 0, 1]], [["a", 0, 1]], parameters={"int8_mask": True}))
    assert recipe.notes == ("recipe: int8_mask has no effect: masks are never kept in memory whole",)


def test_a_base_beside_the_sources_has_their_layers():
    sources = [{"model": m, "layer_range": [1, 3]} for m in ("a", "b")]
    block = {"merge_method": "task_arithmetic", "base_model": "base", "slices": [{"sources": sources}]}
    (part,) = read_recipe(block).steps[0].slices
    assert part.ranges == {"base": (1, 3), "a": (1, 3), "b": (1, 3)}
    sources[1]["layer_range"] = [2, 4]
    with pytest.raises(UserError, match=r"slices\[0\]: list 'base' among the sources"):
        read_recipe(block)


def test_arguments_that_are_wrong_for_one_tensor():
    weights = [{"filter": "mlp", "value": 0}, {"value": 1}]
    (step,) = read_recipe({"merge_method": "linear", "models": ["a"], "parameters": {"weight": weights}}).steps
    assert step.at("norm", 0.0)["weight"] == (1.0,)
    with pytest.raises(
        UserError, match=r"step 'merged': tensor 'layers\.0\.mlp\.up'.*sum to 0.*`keep: \[PART OF"
    ) as error:
        step.at("layers.0.mlp.up", 0.0)
    assert str(error.value).endswith("leaves it as 'a' has it")


def test_weights_that_cancel_on_one_tensor_are_another_matter():
    weights = [[{"filter": "mlp", "value": value}, {"value": 1}] for value in (1, -1)]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    (step,) = read_recipe({"merge_method": "linear", "models": models}).steps
    with pytest.raises(UserError, match="sum to 0") as error:
        step.at("layers.0.mlp.up", 0.0)
    assert "keep" not in str(error.value)


REMAINDER = "tensors that no filter fits get the default"


@pytest.mark.parametrize(
    ("method", "name", "default"),
    [("slerp", "t", 0.5), ("linear", "weight", 1.0), ("ties", "density", 1.0), ("ties", "lambda", 1.0)],
)
@pytest.mark.parametrize("rule", [{"filter": "self_attn"}, {"regex": r"layers\.0\."}])
def test_filters_that_leave_tensors_to_the_default_are_noted(method, name, default, rule):
    block = {"merge_method": method, "models": ["a", "b"]} | ({} if method == "linear" else {"base_model": "a"})

    def notes(*rules, models=("a", "b")):
        values = {"parameters": {name: list(rules)}} if rules else {}
        return [note for note in read_recipe({**block, "models": list(models), **values}).notes if REMAINDER in note]

    first = {**rule, "value": 0.25}
    (note,) = notes(first)
    assert f"recipe: {name}: {REMAINDER}, {default}; add a last entry" in note
    step = read_recipe({**block, "parameters": {name: [first]}}).steps[0]
    value = step.at("model.norm.weight", 0.0)[name]
    assert set(value if isinstance(value, tuple) else [value]) == {default}
    for rest in ({"value": 1}, {"filter": "*", "value": 1}, {"regex": ".*", "value": 1}):
        assert not notes(first, rest)
    if name != "lambda":
        entry = {"model": "b", "parameters": {name: [first]}}
        assert f"{name} of model 'b': {REMAINDER}" in notes(models=("a", entry))[0]
        assert not notes({"value": 1}, models=("a", entry))
