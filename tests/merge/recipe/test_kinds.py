"""What a recipe may say, for a method that looks at weights and for both that look at data: read by one reader."""

import pytest
import yaml

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe

KINDS = ("ties", "regmean", "learned")


def block(method, *models, **more):
    """A merge of models onto `base`; rows are given where the method looks at data."""
    entries = [name if method == "ties" else {"model": name, "data": f"{name}.jsonl"} for name in models or ("a", "b")]
    return {"merge_method": method, "base_model": "base", "models": entries, **more}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def message(*arguments, **options):
    with pytest.raises(UserError) as error:
        read_recipe(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_base_and_sources(kind):
    recipe = read_recipe(block(kind, "base", "a") if kind == "ties" else block(kind, "a"))
    (step,) = recipe.steps
    assert (step.base, step.branches, recipe.donor, recipe.inputs) == ("base", ("a",), "base", ("base", "a"))
    named = read_recipe(block(kind, sources={"a": "org/name@v2"}))
    assert named.revision("a") == "v2" and named.revision("b") is None
    assert recipe.is_calibrated == (kind != "ties")


def test_types(kind):
    assert read_recipe(block(kind, dtype="float16")).dtype == "float16"
    assert read_recipe(block(kind, dtype="float16", out_dtype="bfloat16")).dtype == "bfloat16"
    assert read_recipe(block(kind)).dtype is None


def test_seed(kind):
    assert read_recipe(block(kind, seed=7), ["seed=8"]).seed == 8
    assert "seed: expected a number greater than or equal to 0" in message(block(kind, seed=-1))


def test_tokenizer_keys(kind):
    assert read_recipe(block(kind, tokenizer_source="union")).tokenizer.source == "union"
    tokenizer = read_recipe(block(kind, tokenizer={"tokens": {"<x>": {"source": "a"}}})).tokenizer
    assert tokenizer.rules["<x>"].model == "a"
    assert "'c' is not a model here" in message(block(kind, tokenizer={"tokens": {"<x>": {"source": "c"}}}))
    assert "'tokenizer_source' and 'tokenizer' both" in message(block(kind, tokenizer_source="a", tokenizer={}))


def test_chat_template(kind):
    assert "<|im_start|>" in read_recipe(block(kind, chat_template="chatml")).chat_template
    assert "did you mean 'chatml'?" in message(block(kind, chat_template="chatlm"))


def test_named_steps_and_their_overrides(kind):
    parameters = {"density": 0.5} if kind == "ties" else {"rows": 4}
    steps = [{**block(kind), "name": "mid", "parameters": parameters}, block("ties", "mid", "a")]
    override = "steps.mid.parameters.density=0.25" if kind == "ties" else "steps.mid.parameters.rows=5"
    mid, end = read_recipe({"steps": steps}, [override, "dtype=bfloat16"]).steps
    assert (mid.arguments.get("density"), mid.calibration and mid.calibration.rows) in (((0.25, 0.25), None), (None, 5))
    assert end.branches == ("mid", "a")
    assert "no step is named 'mit'; did you mean 'mid'?" in message({"steps": steps}, ["steps.mit.seed=1"])


def test_a_step_of_each_kind_reads_one_of_the_other(kind):
    steps = [{**block("ties"), "name": "one"}, {**block(kind, "one", "b"), "name": "two"}, block("ties", "two", "a")]
    recipe = read_recipe({"steps": steps})
    assert recipe.inputs == ("base", "a", "b") and recipe.donor_of("two") == "base"
    assert "made after it" in message({"steps": [{**block(kind, "end", "a"), "name": "mid"}, block("ties", "mid")
                                                 | {"name": "end"}]})  # fmt: skip


def test_documents(kind, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump_all([block("ties", "mid", "a"), {**block(kind), "name": "mid"}]))
    assert [step.name for step in read_recipe(path).steps] == ["mid", "merged"]


def test_overrides_of_the_only_step(kind):
    value = "parameters.lambda=0.5" if kind == "ties" else "parameters.ridge=0.5"
    (step,) = read_recipe(block(kind), [value, "base_model=other"]).steps
    assert step.base == "other" and (step.calibration.ridge if step.calibration else step.arguments["lambda"]) == 0.5
    (step,) = read_recipe(block("ties"), ["merge_method=arcee_fusion", "models=[a]"]).steps
    assert step.method.name == "arcee_fusion"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"parameters": {"densty": 1, "stepps": 1}}, "unknown parameter 'densty' of {kind}"),
        ({"base_model": None}, "{kind} needs 'base_model': the model that changes are measured against"),
        ({"models": []}, "{kind} needs at least 1 model beside the base, found 0"),
        ({"modles": []}, "unknown key 'modles'; did you mean 'models'?"),
        ({"models": [3]}, "models: expected a model's name"),
        ({"models": [{"modle": "a"}]}, "models: unknown key 'modle'; did you mean 'model'?"),
        ({"dtype": "float8"}, "dtype: expected 'float32', 'bfloat16', 'float16' or 'auto'"),
        ({"compat": "mergekitty"}, "compat: expected 'mergekit'"),
    ],
)
def test_errors_read_alike(kind, change, words):
    assert words.format(kind=kind) in message({**block(kind), **change})


def test_a_model_listed_twice(kind):
    assert "model 'a' is listed twice; list it once" in message(block(kind, "a", "a"))


def test_a_step_parameter_at_a_model(kind):
    """Methods of mergekit's pass over it, as mergekit does, and say so."""
    if kind == "ties":
        models = [{"model": "a", "parameters": {"lambda": 0.5, "normalize": False}}, "b"]
        recipe = read_recipe({**block(kind), "models": models, "parameters": {"lambda": 2}})
        assert recipe.steps[0].arguments["lambda"] == 2 and recipe.steps[0].arguments["normalize"] is True
        for name in ("lambda", "normalize"):
            assert any(f"{name} of model 'a' has no effect, as in mergekit" in note for note in recipe.notes)
        return
    models = [{"model": "a", "data": "x", "parameters": {"steps": 1}}]
    words = f"parameter 'steps' of {kind} is not a model's: move it from 'a' to the step's own 'parameters'"
    assert words in message({**block(kind), "models": models})


def test_wrong_values_of_parameters():
    assert "steps: expected a whole number, found text 'x'" in message(block("learned", parameters={"steps": "x"}))
    assert "lambda: expected a number, found 'x'" in message(block("ties", parameters={"lambda": "x"}))


def test_models_without_rows():
    for method in ("regmean", "learned"):
        entries = [{"model": "a", "data": "a.jsonl"}, "b"]
        assert f"model 'b' has no 'data': {method} needs rows" in message({**block(method), "models": entries})
        recipe = read_recipe({**block(method), "models": entries}, data={"a": "other", "b": ["b1", "b2"]})
        assert recipe.steps[0].data == ("a.jsonl", ["b1", "b2"])
        assert recipe.text["steps"][0]["models"][1] == {"data": ["b1", "b2"], "model": "b"}
    entries = [{"model": "a", "data": "a.jsonl"}]
    assert "model 'a' has 'data', which ties does not read" in message({**block("ties"), "models": entries})
    assert read_recipe(block("ties"), data={"a": "x"}).steps[0].data == ()


def test_defaults_of_regmean():
    (regmean,), (learned,) = (read_recipe(block(method)).steps for method in ("regmean", "learned"))
    values = [(p.start, p.off_diagonal, p.steps) for p in (regmean.calibration, learned.calibration)]
    assert values == [(1.0, 0.9, 0), (1.4, 1.0, 32)]


def test_what_has_no_effect_on_methods_with_data():
    assert "compat has no effect" in read_recipe(block("regmean", compat="mergekit")).notes[0]
    slices = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    recipe = {"merge_method": "learned", "base_model": "base", "slices": slices}
    assert "learned merges whole models" in message(recipe)
    assert "'base' is the base_model" in message(block("learned", "base", "a"))


def test_the_hint_for_a_method_lists_all():
    words = message({**block("ties"), "merge_method": "qqqqq"})
    assert all(name in words for name in ("ties", "regmean", "learned", "arcee_fusion"))
    assert "did you mean 'regmean'?" in message({**block("ties"), "merge_method": "regmeen"})
