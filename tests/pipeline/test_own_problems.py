"""A user's own problems, traces and rows through `bmjax run`, with a small student and a local endpoint."""

import json
import re
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.pipeline.phases import run
from bmjax.pipeline.settings import RunSettings
from tests.conftest import sums, write_rows, write_student
from tests.pipeline.endpoint import Endpoint

TRAINING = {
    "seq_len": 256, "batch": 2, "steps": 2, "compute_dtype": "float32", "remat": "none", "mesh": {"data": 1},
}  # fmt: skip
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "own_problems.yaml"


def gsm8k(first, last):
    return [
        {
            "question": f"What is {n} + {n + 1}?",
            "answer": f"{n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>\n#### {2 * n + 1}",
        }
        for n in range(first, last)
    ]


def mbpp(first, last):
    return [
        {
            "text": f"Write a function f{n} that adds {n}.", "code": f"def f{n}(x):\n    return x + {n}", "task_id": n,
            "test_list": [f"assert f{n}(1) == {n + 1}", f"assert f{n}(0) == {n}"], "test_setup_code": "",
        }
        for n in range(first, last)
    ]  # fmt: skip


def teacher(prompt, seed):
    """Solve a problem; every fifth is wrong, of the next fifth the answer is cut, and of the next malformed."""
    if match := re.match(r"What is (\d+) \+ (\d+)\?", prompt):
        n = int(match[1])
        answer = f"The sum is \\boxed{{{n + int(match[2]) + (n % 5 == 0)}}}."
    else:
        n = int(re.search(r"that adds (\d+)\.", prompt)[1])
        answer = f"```python\ndef f{n}(x):\n    return x + {n + (n % 5 == 0)}\n```"
    thought = "<think>\nI add.\n</think>\n"
    if n % 5 == 1:
        return (thought + answer)[:-4], "length"
    if n % 5 == 2:
        return thought + thought + answer, "stop"
    return thought + answer, "stop"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides that make the config small: files instead of hub names, a random student, two steps."""
    folder = tmp_path_factory.mktemp("own")
    for name, rows in {
        "gsm8k": gsm8k(0, 30), "gsm8k_test": gsm8k(25, 35), "mbpp": mbpp(0, 20), "mbpp_validation": mbpp(20, 24),
        "mbpp_test": mbpp(24, 30),
    }.items():  # fmt: skip
        write_rows(folder / f"{name}.jsonl", rows)
    student = write_student(folder / "student", max_position_embeddings=512)
    return folder, [
        f"student={student}", "template=chatml", "teacher.concurrency=4", "teacher.samples=1", "teacher.model=solver",
        f"domains.math.problems.data={folder}/gsm8k.jsonl", f"domains.math.test.data={folder}/gsm8k_test.jsonl",
        "domains.math.validation_share=0.2",
        f"domains.code.problems.data={folder}/mbpp.jsonl", f"domains.code.test.data={folder}/mbpp_test.jsonl",
        f"domains.code.validation.data={folder}/mbpp_validation.jsonl", f"branch={json.dumps(TRAINING)}",
        "evaluate={max_new_tokens: 4, batch: 8, seq_len: 256, mesh: {data: 1}}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(small):
    """(directory, report, log lines, endpoint) of a run of the config."""
    folder, overrides = small
    lines: list[str] = []
    with Endpoint(teacher) as endpoint:
        settings = RunSettings.read(CONFIG, [*overrides, f"teacher.base_url={endpoint.base_url}"])
        report = run(settings, folder / "run", lines.append)
    return folder / "run", report, lines, endpoint


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_right_answers_become_the_branches_rows(finished):
    directory, report, _, _ = finished
    for domain in ("math", "code"):
        problems = read(directory / "data" / domain / "problems.jsonl")
        rows = read(directory / "data" / domain / "train.jsonl")
        numbers = [int(re.search(r"(\d+)\s?(\+|\.)", row["prompt"])[1]) for row in problems]
        right = sum(n % 5 > 2 for n in numbers)
        counts = report["selection"][domain]
        assert counts["collected"] == len(problems) and counts["kept"] == len(rows) == right > 0
        assert counts["dropped"] == {
            "truncated": sum(n % 5 == 1 for n in numbers),
            "malformed": sum(n % 5 == 2 for n in numbers),
            "wrong": sum(n % 5 == 0 for n in numbers),
        }
        assert all(row["reasoning"] == "I add." for row in rows)


def test_every_model_is_scored_by_accuracy_in_both_domains(finished):
    directory, report, _, _ = finished
    names = ["backbone", "branch/math", "branch/code", "merge/linear", "merge/task_arithmetic", "merge/fusion"]
    assert list(report["models"]) == [*names, "merged", "mixture"]
    for model in report["models"].values():
        assert {domain: score["n"] for domain, score in model["scores"].items()} == {"math": 10, "code": 6}
        assert all("accuracy" in score and "loss" not in score for score in model["scores"].values())
    assert report["models"]["backbone"]["tokens"] == 0 and report["models"]["backbone"]["metrics"] is None
    assert (directory / "merged" / "hf" / "config.json").exists()
    assert (directory / "report.html").read_text().startswith("<!doctype html>")
    samples = read(directory / "scores" / "test" / "mixture" / "samples" / "code.jsonl")
    assert {sample["verdict"] for sample in samples} == {"wrong"}  # programs were looked for, and none was there


def test_held_out_prompts_are_neither_asked_nor_trained_on(finished):
    directory, _, lines, endpoint = finished
    asked = {prompt for prompt, _ in endpoint.asked}
    assert asked == {row["prompt"] for d in ("math", "code") for row in read(directory / "data" / d / "problems.jsonl")}
    for domain in ("math", "code"):
        held_out = {
            row["prompt"] for s in ("validation", "test") for row in read(directory / "data" / domain / f"{s}.jsonl")
        }
        assert held_out and not held_out & asked
    assert any("left out: 5 in validation or test" in line for line in lines)


def test_a_resumed_run_at_another_port_asks_nothing(finished, small):
    directory, report, _, _ = finished
    lines: list[str] = []
    with Endpoint(teacher) as endpoint:
        overrides = [*small[1], f"teacher.base_url={endpoint.base_url}"]
        assert run(RunSettings.read(CONFIG, overrides), directory, lines.append)["models"] == report["models"]
        assert not [line for line in lines if line.startswith("==")]
        (directory / "teach" / "math" / "counts.json").unlink()
        run(RunSettings.read(CONFIG, overrides), directory, lines.append)
        assert "== teach/math" in lines and not endpoint.asked


def mixed(folder, **changes):
    """A run of stored traces and of rows as they are."""
    traces_domain = {key: changes.pop(key) for key in ("traces", "judge") if key in changes}
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in sums(40, seed=5)
    ]
    values = {
        "student": str(write_student(folder / "student", max_position_embeddings=512)),
        "domains": {
            "code": {"test_share": 0.3, "validation_share": 0.5, **traces_domain},
            "talk": {"train": {"data": str(write_rows(folder / "talk.jsonl", rows))}, "test_share": 0.3},
        },
        "branch": TRAINING, "merges": {"linear": {"merge_method": "linear", "models": ["code", "talk"]}},
        "evaluate": {"max_new_tokens": 4, "batch": 8, "seq_len": 256, "mesh": {"data": 1}},
    }  # fmt: skip
    return RunSettings.read(values | changes)


def test_stored_traces_and_rows_as_they_are(finished, tmp_path):
    sources = [
        str(file) for d in ("math", "code") for file in (finished[0] / "teach" / d).glob("answers-*/traces.jsonl")
    ]
    lines: list[str] = []
    report = run(mixed(tmp_path, traces=sources, run_programs=True), tmp_path / "run", lines.append)
    assert report["selection"]["code"]["dropped"] == finished[1]["selection"]["code"]["dropped"]
    assert any("traces of math left out" in line for line in lines)
    rows = {split: read(tmp_path / "run/data/code" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert sum(map(len, rows.values())) == report["selection"]["code"]["kept"]
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    scores = report["models"]["merged"]["scores"]
    assert {"accuracy", "loss"} <= scores["code"].keys() and "accuracy" not in scores["talk"] and scores["talk"]["loss"]


def test_traces_nobody_judged_are_judged(finished, tmp_path):
    (source,) = (finished[0] / "teach" / "math").glob("answers-*/traces.jsonl")
    traces = [row | {"verdict": "unjudged", "verdict_by": "none"} for row in read(source)]
    settings = mixed(tmp_path, traces=str(write_rows(tmp_path / "traces.jsonl", traces)), judge="math")
    report = run(settings, tmp_path / "run", lambda line: None)
    assert report["selection"]["code"]["dropped"] == finished[1]["selection"]["math"]["dropped"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["teacher.base_url=null"], "domains.math.problems are asked of a teacher: set teacher.base_url"),
        (["teacher.api_key_env=NOBODY_SET_THIS"], "variable NOBODY_SET_THIS is not set"),
        (["teacher.base_url=http://127.0.0.1:9/v1", "teacher.retries=0"], "is the server running"),
        (["run_programs=false"], "mbpp.*, row 1: .* set run_programs: true"),
        (["domains.code.problems.reference=null"], "row 1: no reference, so no answer can be judged"),
        (["domains.code.problems.reference={solutions: '{test_list}'}"], "row 1: reference: found keys .'solutions'."),
        (["domains.math.problems.prompt='{qestion}'"], "did you mean 'question'"),
        (["domains.math.judge=maths"], "domains.math.judge: expected 'math'"),
        (["domains.math.test_share=0.1"], "give exactly one of 'test' and 'test_share'"),
        (["domains.math.traces=x.jsonl"], "give exactly one of 'problems', 'traces' and 'train'"),
        (["domains.math.test={data: x, prompt: '{question}'}"], "reference or response is missing"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(small, tmp_path, overrides, told):
    with pytest.raises(UserError, match=told) as error:
        base = "teacher.base_url=http://127.0.0.1:9/v1"
        run(RunSettings.read(CONFIG, [*small[1], base, *overrides]), tmp_path / "run", lambda line: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "branch").exists()


def test_unanswered_requests_stop_a_run_unless_it_may_lack_them(small, tmp_path):
    def refusing(prompt, seed):
        if prompt.startswith("What is 3 +"):
            return "", 400
        return teacher(prompt, seed)

    with Endpoint(refusing) as endpoint:
        keys = [*small[1], f"teacher.base_url={endpoint.base_url}", "teacher.retries=0", "teacher.concurrency=1"]
        with pytest.raises(UserError, match=r"teach/math: 1 requests failed, .*failed_share"):
            run(RunSettings.read(CONFIG, keys), tmp_path / "run", lambda line: None)
        report = run(RunSettings.read(CONFIG, [*keys, "failed_share=0.1"]), tmp_path / "run", lambda line: None)
    selection = report["selection"]["math"]
    assert selection["failed"] == 1 and selection["asked"] == selection["collected"] + 1
    assert sum(selection["verdicts"].values()) == selection["collected"]
