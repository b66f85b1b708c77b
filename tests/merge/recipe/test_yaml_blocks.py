import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.recipe.test_recipe import ARCEE, LAST, MID, steps


def test_an_override_of_the_type_wins_over_the_steps_own():
    recipe = read_recipe(steps(MID, {**LAST, "dtype": "bfloat16"}), ["dtype=float32", "seed=3"])
    assert recipe.dtype == "float32" and recipe.seed == 3
    assert read_recipe(ARCEE, ["seed=4", "compat=mergekit"]).seed == 4


def test_documents_are_steps(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: linear\nmodels: [one, two]\nseed: 7\nout_dtype: bfloat16\n---\n"
        "name: one\nmerge_method: slerp\nbase_model: a\nmodels: [a, b]\nsources: {a: A}\n---\n"
        "name: two\nmerge_method: linear\nmodels: [one, c]\nsources: {b: B}\n---\n"
    )
    recipe = read_recipe(path, ["steps.one.parameters.t=0.25"])
    assert [step.name for step in recipe.steps] == ["one", "two", "merged"]
    assert recipe.steps[2].branches == ("one", "two")
    assert recipe.inputs == ("a", "b", "c") and recipe.donor == "a"
    assert recipe.steps[0].arguments["t"] == 0.25
    assert (recipe.seed, recipe.dtype, recipe.sources) == (7, "bfloat16", {"a": "A", "b": "B"})


def test_the_last_of_named_documents_is_the_result(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nmerge_method: linear\nmodels: [a]\n---\nname: y\nmerge_method: linear\nmodels: [x]\n")
    assert [step.name for step in read_recipe(path).steps] == ["x", "y"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("merge_method: linear\nmodels: [a]\n---\nmerge_method: linear\nmodels: [b]\n", "2 documents have no name"),
        (
            "name: x\nmodels: [a]\n---\nmerge_method: linear\nmodels: [x]\n",
            "document 'x': key 'merge_method' is missing",
        ),
        ("name: x\nseed: 1\n---\nseed: 2\n", "'seed' is 1 in one document and 2 in another"),
        ("name: x\ntokenizer_source: union\n---\nmodels: [x]\n", "'tokenizer_source' belongs to the last document"),
        ("name: z\nsteps: []\n---\nmodels: [x]\n", "'steps' stands in one of 2 documents"),
    ],
)
def test_bad_documents(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_recipe(path)
    assert message in str(error.value) and "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    "override",
    ["steps.mit.parameters.lambda=1", "parameters", "stepz=1", "parameters.lambda=1", "steps.mid=1", "seed=x"],
)
def test_bad_overrides(override):
    with pytest.raises(UserError):
        read_recipe(steps(MID, LAST), [override])
