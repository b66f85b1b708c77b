from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.merge.recipe import read_recipe

ARCEE = {"merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]}
MID = {**ARCEE, "name": "mid"}
LAST = {"name": "end", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]}
CONFIGS = sorted((Path(__file__).parents[2] / "configs/merge").glob("*.yaml"))


def steps(*blocks, **top):
    return {"steps": list(blocks), **top}


def test_a_mergekit_recipe_as_it_stands():
    recipe = read_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": "org/base",
            "models": [
                {"model": "org/base"},
                {"model": "a", "parameters": {"weight": 0.25}},
                "b",
            ],
            "parameters": {"weight": 2, "lambda": 0.5},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    )
    (step,) = recipe.steps
    assert step.branches == ("a", "b")
    assert step.base == "org/base" and recipe.donor == "org/base"
    assert step.arguments == {"weight": (0.25, 2.0), "lambda": 0.5, "normalize": False, "rebase": None}
    assert recipe.dtype == "bfloat16"
    assert recipe.inputs == ("org/base", "a", "b")


def test_linear_merges_its_base_only_where_it_is_listed():
    beside = read_recipe({"merge_method": "linear", "base_model": "x", "models": ["a", "b"]})
    listed = read_recipe({"merge_method": "linear", "base_model": "x", "models": ["x", "a"]})
    assert beside.steps[0].branches == ("a", "b") and beside.donor == "x"
    assert listed.steps[0].branches == ("x", "a")
    assert read_recipe({"merge_method": "linear", "models": ["a", "b"]}).donor == "a"


def test_named_steps():
    recipe = read_recipe(
        steps(
            MID,
            {**ARCEE, "base_model": "mid", "models": ["code"], "parameters": {"rebase": "science"}},
            dtype="bfloat16",
        )
    )
    assert [step.name for step in recipe.steps] == ["mid", "merged"]
    assert recipe.inputs == ("science", "math", "code")
    assert recipe.donor == "science"
    assert recipe.dtype == "bfloat16"


def test_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources: {a: A}\nsteps:\n"
        "  - {name: mid, merge_method: arcee_fusion, base_model: x, models: [a]}\n"
        "  - {name: end, merge_method: linear, models: [mid, x]}\n"
    )
    recipe = read_recipe(path, ["steps.mid.parameters.lambda=0.5", "sources.a=B", "dtype=float16"])
    assert recipe.steps[0].arguments["lambda"] == 0.5
    assert recipe.sources == {"a": "B"} and recipe.dtype == "float16"
    single = read_recipe({**ARCEE, "sources": {"math": "A"}}, ["parameters.lambda=0.25", "sources.math=B"])
    assert single.steps[0].arguments["lambda"] == 0.25 and single.sources == {"math": "B"}


def test_notes():
    listed = read_recipe({**ARCEE, "models": ["math"], "name": "x"})
    assert listed.notes == ()
    weighted = read_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": "b",
            "models": [{"model": "b", "parameters": {"weight": 1}}, "a"],
        }
    )
    assert "base model 'b' have no effect" in weighted.notes[0]
    early = read_recipe(steps({**MID, "dtype": "bfloat16"}, LAST))
    assert "dtype has no effect" in early.notes[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_worked_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert set(recipe.inputs) <= set(recipe.sources)


def test_there_is_a_worked_recipe_for_every_method():
    from bmjax.merge.methods import METHODS

    assert METHODS.keys() <= {path.stem for path in CONFIGS}


BAD = {
    "unknown key": ({**ARCEE, "base_modle": "x"}, "unknown key 'base_modle'; did you mean 'base_model'?"),
    "unknown method": ({**ARCEE, "merge_method": "arce_fusion"}, "did you mean 'arcee_fusion'?"),
    "no method": ({"models": ["a"]}, "key 'merge_method' is missing"),
    "no models": ({"merge_method": "linear"}, "key 'models' is missing"),
    "no base": ({"merge_method": "arcee_fusion", "models": ["a"]}, "arcee_fusion needs 'base_model'"),
    "unknown parameter": ({**ARCEE, "parameters": {"lamda": 1}}, "'lamda' of arcee_fusion; did you mean 'lambda'?"),
    "parameter of another method": ({**ARCEE, "parameters": {"density": 0.5}}, "unknown parameter 'density'"),
    "wrong type": ({**ARCEE, "parameters": {"lambda": "big"}}, "lambda: expected a number, found 'big'"),
    "true is no number": ({**ARCEE, "parameters": {"lambda": True}}, "lambda: expected a number, found True"),
    "not finite": ({**ARCEE, "parameters": {"lambda": float("nan")}}, "lambda: expected a number"),
    "unknown choice": ({**ARCEE, "parameters": {"combine": "meen"}}, "found 'meen'; did you mean 'mean'?"),
    "number is no switch": (
        {"merge_method": "linear", "models": ["a"], "parameters": {"normalize": 1}},
        "normalize: expected true or false, found 1",
    ),
    "only the base": ({**ARCEE, "models": ["science"]}, "needs at least 1 models beside the base, found 0"),
    "empty models": ({"merge_method": "linear", "models": []}, "needs at least 1 models, found 0"),
    "listed twice": ({**ARCEE, "models": ["math", "math"]}, "model 'math' is listed twice"),
    "model entry is a number": ({**ARCEE, "models": [3]}, "expected a model's name"),
    "misspelt model entry": (
        {**ARCEE, "models": [{"modle": "math"}]},
        "models: unknown key 'modle'; did you mean 'model'?",
    ),
    "misspelt required key": ({"merge_methd": "linear", "models": ["a"]}, "did you mean 'merge_method'?"),
    "step parameter on a model": (
        {**ARCEE, "models": [{"model": "math", "parameters": {"lambda": 1}}]},
        "'lambda' of arcee_fusion is not a model's: move it from 'math'",
    ),
    "weights that cancel": (
        {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0}},
        "the weights (0, 0) sum to 0",
    ),
    "unknown dtype": ({**ARCEE, "dtype": "float8"}, "dtype"),
    "slices": ({**ARCEE, "slices": []}, "'slices' is not supported"),
    "misspelt step key": (steps({**MID, "modles": []}, LAST), "step 'mid': unknown key 'modles'; did you mean"),
    "unnamed step": (steps(ARCEE, LAST), "every step but the last needs a name"),
    "two steps of one name": (steps(MID, {**LAST, "name": "mid"}), "two steps are named 'mid'"),
    "step reads a later one": (steps({**MID, "models": ["end"]}, {**LAST, "models": ["mid"]}), "made after it"),
    "step reads itself": (steps({**ARCEE, "name": "math"}), "step 'math' reads itself"),
    "unused step": (steps(MID, {**LAST, "models": ["math"]}), "no later step reads step 'mid'"),
    "step is also a source": (steps(MID, LAST, sources={"mid": "x"}), "'mid' is a step and an alias"),
    "no steps": (steps(), "steps"),
    "steps is no list": ({"steps": "mid"}, "steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes(name):
    recipe, message = BAD[name]
    with pytest.raises(UserError) as error:
        read_recipe(recipe)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("merge_method: [", "not valid YAML"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("merge_method: linear\nmerge_method: linear\n", "stands twice"),
        ("models: !!python/object:os.system [x]\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        read_recipe(path)
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["steps.mit.parameters.lambda=1", "parameters", "stepz=1"])
def test_bad_overrides(override):
    with pytest.raises(UserError):
        read_recipe(steps(MID, LAST), [override])
