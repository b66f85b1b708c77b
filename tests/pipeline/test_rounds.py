"""Branches that are trained and merged in rounds: the outer step, tokens, the report, a killed run."""

import json

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.pipeline.phases import run
from bmjax.pipeline.settings import RunSettings
from tests.pipeline.two_domains import REGMEAN, write_domains

TASK_ARITHMETIC = {
    "merge_method": "task_arithmetic", "base_model": "backbone", "models": ["a", "b"], "parameters": {"weight": 0.6},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("rounds"), 40, dtype="bfloat16")


def settings(folder, **changes):
    source = lambda name: {"data": str(folder / f"{name}.jsonl"), "prompt": "{prompt}", "response": "{response}"}  # noqa: E731
    return RunSettings.read({
        "student": str(folder / "student"),
        "domains": {name: {"train": source(name), "test": source(f"{name}_test")} for name in ("a", "b")},
        "branch": {
            "seq_len": 128, "batch": 2, "steps": 6, "learning_rate": 3e-3, "compute_dtype": "float32", "remat": "none",
            "mesh": {"data": 1}, "save_every": 1, "freeze": ["embed/*"],
        },
        "merges": {"ta": TASK_ARITHMETIC},
        "evaluate": {"seq_len": 128, "batch": 8, "mesh": {"data": 1}},
    } | changes)  # fmt: skip


MOMENTUM = {"rounds": 3, "outer_rate": 0.8, "outer_momentum": 0.5}


@pytest.fixture(scope="module")
def finished(folder):
    """(directory, report) of an undisturbed run with momentum."""
    return folder / "whole", run(settings(folder, **MOMENTUM), folder / "whole", lambda line: None)


def weights(directory):
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name).astype(np.float64) for name in checkpoint.tensors}


def test_starts_are_nesterovs_outer_steps(finished, folder):
    directory, _ = finished
    start, velocity = weights(folder / "student"), None
    for number in (1, 2):
        part = directory / "rounds" / str(number)
        branches = [weights(part / name / "hf") for name in ("a", "b")]
        reached = weights(part / "start" / "hf")
        changes = {key: 0.6 * sum(branch[key] - value for branch in branches) for key, value in start.items()}
        velocity = changes if velocity is None else {key: changes[key] + 0.5 * velocity[key] for key in changes}
        for key, value in start.items():
            expected = value + 0.8 * (changes[key] + 0.5 * velocity[key])
            np.testing.assert_allclose(reached[key], expected, atol=3e-7, err_msg=key)
        assert np.abs(velocity["model.layers.0.mlp.up_proj.weight"]).max() > 1e-3
        # What no branch trains keeps its bits.
        name = "model.embed_tokens.weight"
        assert np.array_equal(reached[name], start[name])
        start = reached
    branches = [weights(directory / "branch" / name / "hf") for name in ("a", "b")]
    merged = weights(directory / "merges" / "ta" / "hf")
    for key, value in start.items():
        expected = value + 0.6 * sum(branch[key] - value for branch in branches)
        np.testing.assert_allclose(merged[key], expected, rtol=2**-8, atol=1e-7, err_msg=key)


def test_between_rounds_models_are_float32_and_the_result_is_as_the_backbone(finished):
    directory, _ = finished
    kinds = {
        name: {info.dtype for info in open_checkpoint(directory / name / "hf").tensors.values()}
        for name in ("rounds/1/a", "rounds/1/merged", "rounds/2/velocity", "rounds/2/start", "branch/a", "merges/ta")
    }
    assert kinds.pop("merges/ta") == {"BF16"} and all(types == {"F32"} for types in kinds.values())


def test_no_token_is_added_and_no_row_is_seen_twice_more(finished, folder):
    directory, report = finished
    single = run(settings(folder), folder / "single", lambda line: None)
    assert "rounds" not in single and not (folder / "single" / "rounds").exists()
    for name in ("branch/a", "branch/b", "merge/ta", "mixture"):
        assert report["models"][name]["tokens"] == single["models"][name]["tokens"]

    def curve(run_directory):
        lines = (run_directory / "branch" / "a" / "metrics.jsonl").read_text().splitlines()
        return [{key: json.loads(line)[key] for key in ("step", "targets", "learning_rate")} for line in lines]

    assert curve(directory) == curve(folder / "single")  # the same rows, in the same order, at the same rates


def test_report_tells_the_rounds(finished):
    directory, report = finished
    rounds = report["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    assert [entry["hf"] for entry in rounds] == ["rounds/1/start/hf", "rounds/2/start/hf", "merged/hf"]
    assert all(set(entry["validation"]) == {"a", "b"} for entry in rounds)
    tokens = [entry["tokens"] for entry in rounds]
    assert tokens == sorted(tokens) and tokens[-1] == report["models"]["merged"]["tokens"]
    assert abs(tokens[0] - tokens[-1] / 3) < 0.1 * tokens[-1] and {entry["looked_at"] for entry in rounds} == {0}
    scores = json.loads((directory / "scores" / "validation" / "merge-ta" / "scores.json").read_text())
    assert rounds[-1]["validation"]["a"]["loss"] == scores["a"]["loss"]
    page = (directory / "report.html").read_text()
    assert "Rounds" in page and f"{np.mean([s['loss'] for s in rounds[0]['validation'].values()]):.4f}" in page


def test_importances_of_the_branches_weigh_a_merge(folder):
    """In every round those of its own branches; a branch that writes none is named."""
    fisher = {
        "merge_method": "fisher", "base_model": "backbone",
        "models": [{"model": name, "parameters": {"importance": f"{name}_importances"}} for name in ("a", "b")],
    }  # fmt: skip
    plain = settings(folder, rounds=2, merges={"fisher": fisher})
    with pytest.raises(UserError, match=r"merges.fisher: .*a_importances"):
        run(plain, folder / "no_importances", lambda line: None)
    writing = RunSettings.read(plain.model_dump(mode="json", exclude_unset=True), ["branch.importances=true"])
    run(writing, folder / "importances", lambda line: None)
    for merged, part in (("rounds/1/merged", "rounds/1"), ("merges/fisher", "branch")):
        report = json.loads((folder / "importances" / merged / "hf" / "merge_report.json").read_text())
        for name in ("a", "b"):
            directory = folder / "importances" / part / name / "importances"
            assert str(directory) in json.dumps(report["recipe"]) and directory.is_dir()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "line",
    ["step 4/6", *(pytest.param(f"== {s}", marks=pytest.mark.slow) for s in ("rounds/2/b", "rounds/2", "branch/b"))],
)
def test_a_killed_run_ends_with_the_same_bytes(finished, folder, tmp_path, line):
    def log(said):
        if said.startswith(line):
            raise Killed

    with pytest.raises(Killed):
        run(settings(folder, **MOMENTUM), tmp_path / "run", log)
    report = run(settings(folder, **MOMENTUM), tmp_path / "run", lambda line: None)
    for name in ("rounds/1/start/hf", "rounds/2/start/hf", "branch/b/hf", "merged/hf"):
        files = [path / name / "model.safetensors" for path in (finished[0], tmp_path / "run")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert report["rounds"] == finished[1]["rounds"]


@pytest.mark.slow
def test_a_merge_that_looks_at_data_counts_its_tokens_in_every_round(folder):
    changes = {"rounds": 2, "merges": {"ta": TASK_ARITHMETIC, "rm": REGMEAN}, "round_merge": "rm"}
    report = run(settings(folder, **changes), folder / "regmean", lambda line: None)
    looked_at = []
    for name in ("rounds/1/merged", "merges/rm"):
        counted = json.loads((folder / "regmean" / name / "hf" / "merge_report.json").read_text())["tokens"]
        looked_at.append(sum(counted.values()))
    trained = sum(report["models"][f"branch/{name}"]["tokens"] for name in ("a", "b"))
    assert report["models"]["merge/ta"]["tokens"] == trained + looked_at[0]
    assert report["models"]["merge/rm"]["tokens"] == trained + sum(looked_at)
    assert report["rounds"][0]["looked_at"] == looked_at[0] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 0}, "rounds"),
        ({"outer_rate": 0.7}, "outer_rate: it is for several rounds"),
        ({"outer_momentum": 0.9}, "outer_momentum: it is for several rounds"),
        ({"round_merge": "ta"}, "round_merge: it is for several rounds"),
        ({"rounds": 2, "round_merge": "tta"}, "no merge is named 'tta'; did you mean 'ta'"),
        ({"rounds": 2, "merges": {"x": TASK_ARITHMETIC, "y": TASK_ARITHMETIC}}, "round_merge: which of x, y"),
        ({"rounds": 2, "outer_momentum": 1.0}, "outer_momentum"),
        ({"rounds": 7}, "rounds: 7, but branch 'a' has 6 steps"),
    ],
)
def test_mistakes_are_told(folder, changes, told):
    with pytest.raises(UserError, match=told) as error:
        settings(folder, **changes)
    assert "\n" not in str(error.value)


def test_loss_alone_asks_no_question(folder):
    source = {"data": str(folder / "a_test.jsonl"), "prompt": "{prompt}", "reference": "{response}"}
    both = settings(folder).model_dump(mode="json")
    for domain in both["domains"].values():
        domain["test"] = source | {"response": "{response}"}
    loss_only = {"evaluate": both["evaluate"] | {"accuracy": False}, "rounds": 2}
    report = run(RunSettings.read(both | loss_only), folder / "loss", lambda line: None)
    for model in report["models"].values():
        assert all("accuracy" not in score and score["loss"] > 0 for score in model["scores"].values())
    for domain in both["domains"].values():
        domain["test"] = source
    with pytest.raises(UserError, match=r"evaluate.accuracy: false, but the test rows of a have no texts"):
        run(RunSettings.read(both | loss_only), folder / "loss", lambda line: None)
