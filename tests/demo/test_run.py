"""The whole run on the tiniest config: what it writes, and that killing it anywhere changes nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import bmjax
from bmjax.config import UserError
from bmjax.demo.run import run_demo

TINY = Path(__file__).with_name("tiny.yaml")


def quiet(line: str) -> None:
    del line


def tiny_run(directory, overrides=(), log=quiet):
    return run_demo(directory, list(overrides), log, TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, report) of one undisturbed run."""
    directory = tmp_path_factory.mktemp("run") / "tiny"
    return directory, tiny_run(directory)


def scores(report):
    return {name: model["scores"] for name, model in report["models"].items()}


def test_report_json_holds_every_model_and_stage(finished):
    directory, report = finished
    assert json.loads((directory / "report.json").read_text()) == json.loads(json.dumps(report))
    assert list(report["models"]) == [
        "backbone", "branch/math", "branch/code", "merge/linear", "merge/fusion", "merge/learned", "merged", "mixture",
    ]  # fmt: skip
    for model in report["models"].values():
        assert (directory / model["hf"] / "model.safetensors").exists()
        for score in model["scores"].values():
            assert 0 <= score["ci95"][0] <= score["accuracy"] <= score["ci95"][1] <= 1
            assert score["n"] == 12 and score["loss"] > 0
    assert report["models"]["merged"]["scores"] == report["models"][f"merge/{report['chosen']['merge']}"]["scores"]
    assert report["models"]["mixture"]["tokens"] > report["models"]["branch/math"]["tokens"] > 0
    assert {"backbone", "teach/math", "branch/code", "mixture", "merged"} <= set(report["stages"])
    assert all(stage["seconds"] >= 0 and stage["peak_rss_mib"] > 0 for stage in report["stages"].values())
    assert (directory / "report.html").read_text().startswith("<!doctype html>")
    assert report["run"]["parameters"] > 0 and report["run"]["finished"].endswith("UTC")


def test_every_model_has_a_card_and_answers_as_it_was_scored(finished):
    directory, report = finished
    for name, model in report["models"].items():
        card = ModelCard.load(directory / model["hf"] / "README.md")
        results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
        for domain, score in model["scores"].items():
            assert results[f"{domain} (test)", "accuracy"] == round(score["accuracy"], 4)
        text = card.content
        assert "## Lineage" in text and "Teacher: `" in text and str(directory) not in text, name
        generation = json.loads((directory / model["hf"] / "generation_config.json").read_text())
        assert generation["do_sample"] is False
        tokenizer = json.loads((directory / model["hf"] / "tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == 256
    merged = ModelCard.load(directory / "merged" / "hf" / "README.md")
    assert merged.data.model_name == "merged" and "was chosen on the validation rows" in merged.content
    assert any(r.dataset_name == "math (validation)" for r in merged.data.eval_results)


def test_transformers_writes_the_merged_models_text(finished):
    folder = finished[0] / "merged" / "hf"
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = bmjax.load(folder)
    for question in ("Compute 3+4*2.", "What does this print?\nx = 3\nprint(x + 4)"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert model.tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
        out = network.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert bmjax.generate(model, [text], max_new_tokens=16)[0] == tokenizer.decode(out, skip_special_tokens=True)


def test_the_frozen_embedding_is_the_same_in_every_model(finished):
    directory, report = finished
    reference = np.asarray(bmjax.load(directory / "backbone" / "hf").params["embed"]["embedding"])
    for model in report["models"].values():
        np.testing.assert_array_equal(
            np.asarray(bmjax.load(directory / model["hf"]).params["embed"]["embedding"]), reference
        )


def test_finished_stages_are_not_redone_and_changed_ones_are(finished):
    directory, report = finished
    lines: list[str] = []
    card = directory / "merged" / "hf" / "README.md"
    state = card.stat().st_mtime_ns
    again = tiny_run(directory, log=lines.append)
    assert card.stat().st_mtime_ns == state and again["run"] == report["run"]
    assert not [line for line in lines if line.startswith("==")]
    assert scores(again) == scores(report)

    tiny_run(directory, ["evaluate.max_new_tokens=4"], lines.append)
    redone = {line.removeprefix("== ") for line in lines if line.startswith("==")}
    assert "evaluate/test/mixture" in redone and not {"backbone", "branch/math", "merge/linear"} & redone

    lines.clear()
    merges = "merges={linear: {merge_method: linear, models: [{model: math, parameters: {weight: 3}}, {model: code}]}}"
    tiny_run(directory, ["evaluate.max_new_tokens=4", merges], lines.append)
    redone = {line.removeprefix("== ") for line in lines if line.startswith("==")}
    assert {"merge/linear", "evaluate/test/merge/linear"} <= redone
    assert not {"backbone", "branch/math", "evaluate/test/mixture"} & redone
    assert scores(tiny_run(directory)) == scores(report)


def test_answers_of_a_teacher_outlive_every_change(tmp_path):
    few = ["merges={linear: {merge_method: linear, models: [{model: math}, {model: code}]}}"]
    directory = tmp_path / "run"
    tiny_run(directory, few)
    (answers,) = (directory / "teach" / "math").glob("answers-*")
    before = (answers / "traces.jsonl").read_bytes()

    def answered(*overrides):
        lines: list[str] = []
        tiny_run(directory, [*few, *overrides], lines.append)
        return {line.removeprefix("== ") for line in lines if line.startswith("==")}

    assert not answered("teacher.retries=3", "teacher.concurrency=2")
    assert "teach/math" in answered("problems.math.count=41")
    assert (answers / "traces.jsonl").read_bytes().startswith(before)
    assert "teach/math" in answered("mistakes.wrong=0.5")
    assert (answers / "traces.jsonl").read_bytes().startswith(before)
    assert len(list((directory / "teach" / "math").glob("answers-*"))) == 2


def test_requests_that_failed_stop_the_run_and_are_asked_again(tmp_path):
    overrides = ["mistakes.flaky=1", "teacher.retries=0"]
    with pytest.raises(UserError, match=r"teach/math: \d+ requests failed, see .*failures.jsonl") as error:
        tiny_run(tmp_path / "run", overrides)
    assert "\n" not in str(error.value)
    assert tiny_run(tmp_path / "run", ["mistakes.flaky=1"])["selection"]


def start(directory):
    program = f"from bmjax.demo.run import run_demo; run_demo({str(directory)!r}, config={str(TINY)!r})"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_with_kills(directory, kills, seed, whole):
    """Kill -9 the run at `kills` random moments of its `whole` seconds, then let it end; its report."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(directory)
        time.sleep(rng.uniform(2.0, whole / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(directory)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads((directory / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_runs_end_with_the_scores_of_an_undisturbed_one(tmp_path, kills):
    began = time.monotonic()
    undisturbed = run_with_kills(tmp_path / "whole", 0, 0, 0)
    disturbed = run_with_kills(tmp_path / "killed", kills, kills, time.monotonic() - began)
    assert scores(disturbed) == scores(undisturbed)
    assert disturbed["chosen"] == undisturbed["chosen"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["branch.lerning_rate=1"], "learning_rate"),
        (["branch.batch=many"], "branch.batch: expected a whole number"),
        (["problems.math.count=0"], "problems.math.count"),
        (["problems.math.levels=[4]"], "problems.math.levels.0: expected 1, 2 or 3"),
        (["merges.linear.merge_method=liner"], "linear"),
        (["student=DIR"], "'student'"),
        (["domains.code.branch={stps: 3}"], "stps"),
        (["mixture={accumulate: 3}"], "accumulate"),
        (["merges.linear.models=[mth, code]"], "^merges.linear: no model is named 'mth'; did you mean 'math'"),
        (["branch.freeze=[embedding]"], "^branch: freeze"),
        (["backbone.mesh={datta: 1}"], "^backbone: mesh: unknown axis 'datta'"),
        (["backbone.batch=3", "backbone.mesh={data: 2}"], "^backbone: batch: 3"),
        (["mixture.seq_len=512"], "^mixture: seq_len: 512"),
        (["branch.wandb=here"], "^branch: wandb: the package is not installed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, overrides, told):
    with pytest.raises(UserError, match=told) as error:
        tiny_run(tmp_path / "run", overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "data").exists()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path, finished):
    import fcntl

    directory = finished[0]
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = sorted(directory.rglob("*"))
        with pytest.raises(UserError, match="another run is writing"):
            tiny_run(directory, ["seed=1", "problems.science.count=9"])
        assert sorted(directory.rglob("*")) == before
