"""`bmjax run --check`: which stages are done, what the others take; it writes nothing. Sizes that branches share."""

import json

import pytest

from bmjax.config import UserError
from bmjax.pipeline import sizes
from bmjax.pipeline.check import describe
from bmjax.pipeline.phases import Experiment
from bmjax.pipeline.results import _shown
from bmjax.pipeline.settings import RunSettings
from bmjax.pipeline.stages import Stages
from tests.conftest import sums, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    for seed, name in enumerate(("a", "b")):
        write_rows(folder / f"{name}.jsonl", sums(60 - 30 * seed, seed))
    return folder


def settings(folder, model, **changes) -> RunSettings:
    def source(name):
        return {"data": str(folder / f"{name}.jsonl"), "prompt": "{prompt}"}

    domains = {
        "a": {"train": source("a") | {"response": "{response}"}, "test_share": 0.2},
        "b": {"problems": source("b") | {"reference": "{reference}"}, "test_share": 0.2},
    }
    merge = {"merge_method": "linear", "models": ["a", "b"]}
    return RunSettings.read({
        "student": str(model), "domains": domains, "merges": {"linear": merge},
        "teacher": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "samples": 2, "max_tokens": 100},
        "branch": {"epochs": 10, "remat": "none", "mesh": {"data": 1}},
    } | changes)  # fmt: skip


def stages_of(experiment) -> dict:
    return {stage.name: stage for stage in experiment.stages()}


def test_check_tells_stages_requests_and_steps(folder, student, tmp_path):
    given, run = settings(folder, student), tmp_path / "run"
    lines = describe(given, run)
    assert not run.exists()
    assert [line for line in lines if line.endswith(" data/a")] == ["to do  data/a"]
    assert any("30 problems, fewer once some are held out" in line for line in lines)
    assert any("60 requests of m at http://127.0.0.1:9/v1" in line for line in lines)
    assert any(line.strip() == "epochs: 10; more is known when its student and its rows are there" for line in lines)
    assert lines[-1] == f"{run}: 16 stages, 16 to do; nothing was written"
    # The rows of the domain without a teacher are there after its stage.
    run.mkdir()
    Stages(run, lambda line: None).run(stages_of(Experiment(given, run, lambda line: None))["data/a"])
    before = sorted(run.rglob("*"))
    lines = describe(given, run)
    assert "done   data/a" in lines and "to do  teach/b" in lines and "to do  merged" in lines
    assert sorted(run.rglob("*")) == before


def test_branches_and_mixture_share_sizes_that_are_chosen_once(folder, student, tmp_path):
    given = settings(folder, student)
    experiment = Experiment(given, tmp_path, lambda line: None)
    for name in ("a", "b"):
        rows = experiment.rows[name].file("train")
        rows.parent.mkdir(parents=True)
        write_rows(rows, sums(60 if name == "a" else 20, seed=3))
    said: list[str] = []
    experiment.log = said.append
    stage = stages_of(experiment)["sizes"]
    stage.work()
    chosen = json.loads((tmp_path / sizes.FILE).read_text())
    assert set(chosen) == {"seq_len", "batch"} and len(said) == 2
    for training in (given.branch_training("a"), given.branch_training("b"), given.mixture_training(5)):
        filled = sizes.filled(training, tmp_path / sizes.FILE)
        assert (filled.seq_len, filled.batch) == (chosen["seq_len"], chosen["batch"])
    # Sizes that are given need no stage.
    whole = settings(folder, student, branch={"seq_len": 128, "batch": 2, "steps": 3, "mesh": {"data": 1}})
    assert "sizes" not in stages_of(Experiment(whole, tmp_path, lambda line: None))


def test_random_weights_need_a_rate_of_their_own(folder):
    domain = {"train": {"data": str(folder / "a.jsonl")}, "test_share": 0.2}
    with pytest.raises(UserError, match=r"backbone.learning_rate: give it"):
        RunSettings.read({
            "domains": {"a": domain, "b": domain}, "merges": {"linear": {}}, "branch": {}, "model": {"tokenizer": "t"},
            "backbone": {"steps": 3},
        })  # fmt: skip


@pytest.mark.parametrize("key", ["traces", "test"])
def test_a_missing_file_is_told_before_anything_is_asked(folder, student, tmp_path, key):
    missing = str(folder / "missing.jsonl")
    domain = {"traces": missing, "test_share": 0.2} if key == "traces" else {
        "train": {"data": str(folder / "a.jsonl"), "prompt": "{prompt}", "response": "{response}"},
        "test": {"data": missing, "prompt": "{prompt}", "response": "{response}"},
    }  # fmt: skip
    given = settings(folder, student, domains={"b": settings(folder, student).domains["b"].model_dump(), "a": domain})
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        describe(given, tmp_path / "run")


def test_a_report_shows_no_password_of_the_teacher(folder, student):
    teacher = {"base_url": "http://me:hunter2@127.0.0.1:9/v1", "model": "m"}
    shown = _shown(settings(folder, student, teacher=teacher))
    assert shown["teacher"]["base_url"] == "http://127.0.0.1:9/v1"
