from pathlib import Path

import huggingface_hub
import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.merge.recipe.tokenizer import TokenizerSettings

ARCEE = {"merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]}
MID = {**ARCEE, "name": "mid"}
LAST = {"name": "end", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]}
CONFIGS = sorted((Path(__file__).parents[3] / "configs/merge").glob("*.yaml"))


def steps(*blocks, **top):
    return {"steps": list(blocks), **top}


def sliced(*parts, **more):
    """A linear merge of slices, each a list of [model, first layer, end]."""
    slices = [{"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in part]} for part in parts]
    return {"merge_method": "linear", "slices": slices, **more}


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
    expected = {"weight": (0.25, 2.0), "lambda": 0.5, "normalize": False, "rebase": None}
    assert expected.items() <= step.arguments.items()
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


def test_revisions_of_hub_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(
        {
            "merge_method": "linear",
            "models": ["org/m@v1.0", "org/m@main", "near", "x"],
            "sources": {"near": "org/n@a1b2"},
        }
    )
    assert recipe.inputs == ("org/m@v1.0", "org/m@main", "near", "x")
    assert [recipe.revision(name) for name in recipe.inputs] == ["v1.0", "main", "a1b2", None]
    (tmp_path / "runs" / "m@2").mkdir(parents=True)
    (tmp_path / "a+b").mkdir()
    local = read_recipe({"merge_method": "linear", "models": ["runs/m@2", "a+b"]})
    assert local.revision("runs/m@2") is None


def test_tokenizers():
    recipe = read_recipe({
        **ARCEE,
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 64,
            "tokens": {
                "<|im_start|>": {"source": "math"},
                "<|pad|>": {"source": {"kind": "zero"}},
                "<|a|>": {"source": {"kind": "model_token", "model": "science", "token_id": 5}, "force": True},
                "<|b|>": {"source": {"kind": "model_token", "model": "math", "token": "x"}},
                "<|c|>": None,
            },
        },
        "chat_template": "chatml",
    })  # fmt: skip
    tokenizer = recipe.tokenizer
    assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 64)
    rules = {t: (r.model, r.is_zero, r.force, r.model and r.token_of(t)) for t, r in tokenizer.rules.items()}
    assert rules == {
        "<|im_start|>": ("math", False, False, "<|im_start|>"),
        "<|pad|>": (None, True, False, None),
        "<|a|>": ("science", False, True, 5),
        "<|b|>": ("math", False, False, "x"),
        "<|c|>": (None, False, False, None),
    }
    assert "<|im_start|>" in recipe.chat_template
    assert recipe.text["tokenizer"]["pad_to_multiple_of"] == 64
    assert read_recipe({**ARCEE, "tokenizer_source": "math"}).tokenizer == TokenizerSettings(source="math")
    plain = read_recipe({**ARCEE, "chat_template": "auto"})
    assert plain.tokenizer is None and plain.chat_template == "auto"
    jinja = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert read_recipe({**ARCEE, "chat_template": jinja}).chat_template == jinja


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

    assert METHODS.keys() | set(CALIBRATED) <= {path.stem for path in CONFIGS}


BAD = {
    "unknown key": ({**ARCEE, "base_modle": "x"}, "unknown key 'base_modle'; did you mean 'base_model'?"),
    "unknown method": ({**ARCEE, "merge_method": "arce_fusion"}, "did you mean 'arcee_fusion'?"),
    "no method": ({"models": ["a"]}, "key 'merge_method' is missing"),
    "no models": ({"merge_method": "linear"}, "key 'models' is missing"),
    "no base": ({"merge_method": "arcee_fusion", "models": ["a"]}, "arcee_fusion needs 'base_model'"),
    "unknown parameter": ({**ARCEE, "parameters": {"lamda": 1}}, "'lamda' of arcee_fusion; did you mean 'lambda'?"),
    "wrong type": ({**ARCEE, "parameters": {"lambda": "big"}}, "lambda: expected a number, found 'big'"),
    "true is no number": ({**ARCEE, "parameters": {"lambda": True}}, "lambda: expected a number, found True"),
    "not finite": ({**ARCEE, "parameters": {"lambda": float("nan")}}, "lambda: expected a number"),
    "unknown choice": ({**ARCEE, "parameters": {"combine": "meen"}}, "found 'meen'; did you mean 'mean'?"),
    "number is no switch": (
        {"merge_method": "linear", "models": ["a"], "parameters": {"normalize": 2}},
        "normalize: expected true or false, found 2",
    ),
    "only the base": ({**ARCEE, "models": ["science"]}, "needs at least 1 model beside the base, found 0"),
    "empty models": ({"merge_method": "linear", "models": []}, "needs at least 1 model, found 0"),
    "listed twice": ({**ARCEE, "models": ["math", "math"]}, "model 'math' is listed twice"),
    "model entry is a number": ({**ARCEE, "models": [3]}, "expected a model's name"),
    "misspelt model entry": (
        {**ARCEE, "models": [{"modle": "math"}]},
        "models: unknown key 'modle'; did you mean 'model'?",
    ),
    "misspelt required key": ({"merge_methd": "linear", "models": ["a"]}, "did you mean 'merge_method'?"),
    "bad value of a step parameter on a model": (
        {**ARCEE, "models": [{"model": "math", "parameters": {"lambda": "x"}}]},
        "lambda: expected a number, found 'x'",
    ),
    "weights that cancel": (
        {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0}},
        "weight: 0, 0 sum to 0, which",
    ),
    "weights that nearly cancel": (
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": -0.3}}, {"model": "b", "parameters": {"weight": 0.3}}],
        },
        "weight: -0.3, 0.3 sum to 0, which",
    ),
    "weights too small": (
        {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 1e-30}},
        "weight: 1e-30, 1e-30 sum to 2e-30, too little for the merge to divide by; multiply all of them",
    ),
    "unknown dtype": ({**ARCEE, "dtype": "float8"}, "dtype"),
    "models and slices": (sliced([["a", 0, 2]], models=["a"]), "'models' and 'slices' both stand"),
    "no slices": ({"merge_method": "linear", "slices": []}, "slices"),
    "misspelt slice key": (
        {"merge_method": "linear", "slices": [{"source": []}]},
        "unknown key 'slices.0.source'; did you mean 'sources'?",
    ),
    "misspelt source key": (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_rnge": [0, 1]}]}]},
        "unknown key 'slices.0.sources.0.layer_rnge'; did you mean 'layer_range'?",
    ),
    "no layer range": (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "a"}]}]},
        "key 'slices.0.sources.0.layer_range' is missing",
    ),
    "backward range": (sliced([["a", 3, 2]]), "slices[0]: model 'a': layer_range [3, 2]"),
    "negative range": (sliced([["a", -1, 2]]), "slices[0]: model 'a': layer_range [-1, 2]"),
    "three bounds": (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1, 2]}]}]},
        "layer_range",
    ),
    "unequal ranges": (sliced([["a", 0, 2], ["b", 1, 4]]), "slices[0]: 'a' gives 2 layers, 'b' 3"),
    "model twice in a slice": (sliced([["a", 0, 2], ["a", 2, 4]]), "slices[0]: model 'a' is listed twice"),
    "too many in a slice": (
        {**sliced([["a", 0, 2]], [["a", 0, 2], ["b", 0, 2]]), "merge_method": "passthrough"},
        "slices[1]: passthrough needs 1 model, found 2",
    ),
    "parameter of a slice": (
        {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "parameters": {"weigth": 1}}],
        },
        "slices[0]: unknown parameter 'weigth' of linear; did you mean 'weight'?",
    ),
    "bad value in a filter": (
        {"merge_method": "linear", "models": ["a"], "parameters": {"weight": [{"filter": "mlp", "value": "x"}]}},
        "weight: expected a number, found 'x'",
    ),
    "filtered rebase": ({**ARCEE, "parameters": {"rebase": [{"value": "x"}]}}, "rebase: expected a model, found"),
    "misspelt parameter of the base": (
        {**ARCEE, "models": [{"model": "science", "parameters": {"lamda": 1}}, "math"]},
        "unknown parameter 'lamda'",
    ),
    "negative seed": ({**ARCEE, "seed": -1}, "seed: expected a number greater than or equal to 0"),
    "seed is no number": ({**ARCEE, "seed": "x"}, "seed: expected a whole number, found text 'x'"),
    "unknown compat": ({**ARCEE, "compat": "mergekitty"}, "compat: expected 'mergekit'"),
    "compat of a step": (steps({**MID, "compat": "mergekit"}, LAST), "'compat' is the whole recipe's, not a step's"),
    "method beside steps": (steps(MID, LAST, merge_method="linear"), "'merge_method' stands beside 'steps'"),
    "both tokenizers": (
        {**ARCEE, "tokenizer_source": "base", "tokenizer": {}},
        "'tokenizer_source' and 'tokenizer' both",
    ),
    "misspelt tokenizer key": (
        {**ARCEE, "tokenizer": {"sorce": "base"}},
        "unknown key 'tokenizer.sorce'; did you mean 'source'?",
    ),
    "misspelt token key": (
        {**ARCEE, "tokenizer": {"tokens": {"<x>": {"sorce": "math"}}}},
        "unknown key 'tokenizer.tokens.<x>.sorce'; did you mean 'source'?",
    ),
    "token of no model": (
        {**ARCEE, "tokenizer": {"tokens": {"<x>": {"source": "meth"}}}},
        "tokenizer.tokens: 'meth' is not a model here; did you mean 'math'?",
    ),
    "unknown kind": (
        {**ARCEE, "tokenizer": {"tokens": {"<x>": {"source": {"kind": "zeros"}}}}},
        "kind: expected zero or model_token, found 'zeros'; did you mean 'zero'?",
    ),
    "token and id": (
        {**ARCEE, "tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "math"}}}}},
        "tokenizer.tokens.<x>: source: expected one of 'token' and 'token_id'",
    ),
    "force without source": (
        {**ARCEE, "tokenizer": {"tokens": {"<x>": {"force": True}}}},
        "tokenizer.tokens.<x>: force needs a source",
    ),
    "pad to nothing": ({**ARCEE, "tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of"),
    "tokenizer of a step": (steps(MID, LAST, tokenizer_source="mid"), "tokenizer: 'mid' is a step"),
    "unknown template": ({**ARCEE, "chat_template": "chatlm"}, "neither jinja nor a name; did you mean 'chatml'?"),
    "bad jinja": ({**ARCEE, "chat_template": "{% if %}"}, "chat_template: line 1: not valid jinja"),
    "beyond floats": ({**ARCEE, "parameters": {"lambda": 10**390}}, "lambda: 10000000000000000000... is beyond"),
    "lines in a name": ({**ARCEE, "models": ["a\n\x1b[2Jb", "a\n\x1b[2Jb"]}, "model 'a  [2Jb' is listed twice"),
    "no number of a seed": ({**ARCEE, "seed": float("nan")}, "seed: expected"),
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


def soup(*models, **sources):
    return read_recipe({"merge_method": "linear", "models": list(models), "sources": sources})


def test_a_model_is_a_directory_or_an_alias_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/math").mkdir(parents=True)
    recipes = {name: soup(name, math="runs/math") for name in ("runs/math", "math")}
    assert len({recipe.directory(name) for name, recipe in recipes.items()}) == 1


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds org/here, already fetched, and org/there; what was asked of it."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(name, revision=None, local_files_only=False, **patterns):
        asked.append((name, revision, local_files_only))
        if name == "org/here" or (name == "org/there" and not local_files_only):
            return str(tmp_path / name.split("/")[1])
        raise OSError("nothing of that name\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_models_and_their_revisions(hub, tmp_path):
    recipe = soup("org/there@v2", "org/here", "gone", gone="org/gone@v1")
    assert recipe.directory("org/there@v2") == tmp_path / "there"
    assert recipe.directory("org/here", download=False) == tmp_path / "here"
    assert hub == [("org/there", "v2", False), ("org/there", "v2", False), ("org/here", None, True)]
    with pytest.raises(UserError, match=r"^org/there@v2: no such model directory; .* is not in the cache, so it"):
        recipe.directory("org/there@v2", download=False)
    message = r"^model 'gone': org/gone@v1: no such .*the Hugging Face Hub did not give it.*: nothing of that name$"
    with pytest.raises(UserError, match=message):
        recipe.directory("gone")


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "math").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    recipe = soup("org/mathe", "file", "a", "org/math@v1", "o/m@a@b", "o/m+o/adapter", a="nowhere")
    for name, message in (
        ("org/mathe", "org/mathe: no such model directory; did you mean 'org/math'?"),
        ("file", "file: is a file, expected a model directory"),
        ("a", "model 'a': nowhere: no such model directory"),
        ("org/math@v1", "org/math is a directory, which has no revisions; remove @v1"),
        ("o/m@a@b", "o/m@a@b: no such directory; a hub model's revision is given as org/name@revision"),
        ("o/m+o/adapter", "o/m: no such model directory"),
    ):
        with pytest.raises(UserError) as error:
            recipe.directory(name)
        assert str(error.value).startswith(message)
