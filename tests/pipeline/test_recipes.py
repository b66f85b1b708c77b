"""What a run gives its merges: rows to judge by, a template, remarks; what it refuses before a branch is trained."""

import json
import shutil

import pytest

from bmjax.calibrate import dispatch
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.pipeline.check import describe
from bmjax.pipeline.phases import Experiment, run
from bmjax.pipeline.settings import RunSettings
from tests.conftest import sums, write_rows
from tests.pipeline.two_domains import REGMEAN, write_domains


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("recipes"), 60)


def settings(folder, merge=REGMEAN, branch=None, domain=None, **changes):
    source = lambda name: {"data": str(folder / f"{name}.jsonl"), "prompt": "{prompt}", "response": "{response}"}  # noqa: E731
    return RunSettings.read({
        "student": str(folder / "student"),
        "domains": {
            name: {"train": source(name), "test": source(f"{name}_test"), "validation_share": 0.3} | (domain or {})
            for name in "ab"
        },
        "branch": {
            "seq_len": 128, "batch": 2, "steps": 2, "learning_rate": 3e-3, "compute_dtype": "float32", "remat": "none",
            "mesh": {"data": 1}, **(branch or {}),
        },
        "merges": {"m": merge},
        "evaluate": {"seq_len": 128, "batch": 8, "mesh": {"data": 1}, "accuracy": False},
    } | changes)  # fmt: skip


def recipe_of(given, directory):
    return Experiment(given, directory, lambda line: None).recipes["m"]


def test_validation_rows_judge_a_merge_and_test_rows_are_not_read(folder, tmp_path):
    said: list[str] = []
    run(settings(folder, domain={"validation_share": 0.1}), tmp_path / "run", said.append)
    report = json.loads((tmp_path / "run/merges/m/hf/merge_report.json").read_text())
    for entry in report["recipe"]["steps"][0]["models"]:
        name = entry["model"]
        assert entry["data"] == str(tmp_path / f"run/data/{name}/train.jsonl")
        assert entry["held_out_data"] == str(tmp_path / f"run/data/{name}/validation.jsonl")
    assert not any("come from their data" in line for line in said)
    # What the rows lack is said before the branches are trained, and again with the merge.
    stages = [line for line in said if line.startswith("== ")]
    assert stages.index("== merge_rows") < stages.index("== branch/a")
    assert any(line.startswith("merge/m: step 'merged': ") and "judge little" in line for line in said)


def test_validation_rows_without_texts_judge_nothing(folder, tmp_path):
    given = settings(folder)
    recipe = recipe_of(given, tmp_path)
    assert all(recipe.steps[0].held_out_data)  # which rows there will be is not known yet
    write_rows(tmp_path / "validation.jsonl", [{"prompt": "1 + 1", "reference": "2"}])
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
    shutil.copy(tmp_path / "validation.jsonl", tmp_path / "data/a/validation.jsonl")
    write_rows(tmp_path / "data/b/validation.jsonl", sums(5))
    held_out = recipe_of(given, tmp_path).steps[0].held_out_data
    assert held_out == (None, str(tmp_path / "data/b/validation.jsonl"))


def test_a_model_with_rows_of_its_own_keeps_them(folder, tmp_path):
    models = [{"model": "a", "data": "mine.jsonl", "prompt": "{q}", "response": "{a}"}, "b"]
    step = recipe_of(settings(folder, REGMEAN | {"models": models}), tmp_path).steps[0]
    assert step.data[0] == "mine.jsonl" and step.held_out_data[0] is None and step.held_out_data[1] is not None


@pytest.mark.parametrize(
    ("parameters", "words"), [({"seq_len": 2}, "over seq_len 2"), ({"seq_len": 512}, "context of 256")]
)
def test_rows_that_a_merge_refuses_stop_a_run_before_a_branch_is_trained(folder, tmp_path, parameters, words):
    given = settings(folder, REGMEAN | {"parameters": REGMEAN["parameters"] | parameters})
    with pytest.raises(UserError, match=rf"merges\.m: .*{words}") as caught:
        run(given, tmp_path / "run", lambda line: None)
    assert "\n" not in str(caught.value) and not (tmp_path / "run/branch").exists()
    with pytest.raises(UserError, match=rf"merges\.m: .*{words}"):  # the rows are there by now
        describe(given, tmp_path / "run")


@pytest.mark.parametrize(("template", "of_run"), [("chatml", None), ("deepseek-r1", "chatml"), (None, "deepseek-r1")])
def test_the_template_of_the_branches_is_that_of_rows_and_result(folder, tmp_path, template, of_run):
    recipe = recipe_of(settings(folder, branch={"template": template}, template=of_run), tmp_path)
    expected = read_recipe({"merge_method": "linear", "models": ["x"], "chat_template": template or of_run})
    assert recipe.steps[0].calibration.template == (template or of_run)
    assert recipe.chat_template == expected.chat_template
    of_the_recipe = recipe_of(settings(folder, REGMEAN | {"chat_template": "alpaca"}, {"template": template}), tmp_path)
    assert "### Instruction" in of_the_recipe.chat_template


def test_branches_with_their_students_own_template_change_none(folder, tmp_path):
    recipe = recipe_of(settings(folder), tmp_path)
    assert recipe.chat_template is None and recipe.steps[0].calibration.template is None


@pytest.mark.parametrize("rounds", [1, 2])
def test_remarks_on_a_plain_recipe_are_said_by_run_and_check(folder, tmp_path, monkeypatch, rounds):
    slerp = {"merge_method": "slerp", "base_model": "a", "models": ["b"], "parameters": {"t": 0.5, "weight": 0.3}}
    given = settings(folder, slerp, rounds=rounds)
    note = next(line for line in recipe_of(given, tmp_path).notes if "weight has no effect" in line)
    assert sum(note in line for line in describe(given, tmp_path / "run")) == rounds
    said: list[str] = []
    monkeypatch.setattr(dispatch, "merge", lambda recipe, *a, log, **options: [log(line) for line in recipe.notes])
    stages = {stage.name: stage for stage in Experiment(given, tmp_path, said.append).stages()}
    for name in ("merge/m", *(f"rounds/{number}" for number in range(1, rounds))):
        said.clear()
        stages[name].work()
        assert note in said


def test_importances_name_the_key_that_makes_branches_write_them(folder, tmp_path):
    without = {"merge_method": "fisher", "base_model": "backbone", "models": ["a", "b"]}
    models = [{"model": name, "parameters": {"importance": f"{name}_importances"}} for name in "ab"]
    for merge in (without, without | {"models": models}):
        with pytest.raises(UserError, match=r"merges\.m: .*branch\.importances: true") as caught:
            recipe_of(settings(folder, merge), tmp_path)
        assert "\n" not in str(caught.value)
