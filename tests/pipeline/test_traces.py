"""Traces of a run: an answer is asked for once; its verdict follows the reference and the judge."""

import json

import pytest

from bmjax.pipeline.rows import DomainRows
from bmjax.pipeline.settings import RunSettings
from bmjax.pipeline.traces import teach
from tests.conftest import write_rows
from tests.pipeline.endpoint import Endpoint


def verdicts(directory, url, reference, judge):
    """Teach a domain of two questions; (reference, verdict) of every trace."""
    names = ("problems", "test", "validation")
    domain = {name: {"data": str(directory / f"{name}.jsonl")} for name in names} | {"judge": judge}
    for name in names:
        rows = [{"prompt": f"A {name} question, {n}?", "reference": reference} for n in range(2)]
        write_rows(directory / f"{name}.jsonl", rows)
    settings = RunSettings.read(
        {
            "student": "DIR", "domains": {"d": domain, "other": domain}, "branch": {}, "merges": {"linear": {}},
            "teacher": {"base_url": url, "model": "m"}, "select": {"keep": ["right", "wrong"]},
        }
    )  # fmt: skip
    rows = DomainRows("d", settings, directory / "data", lambda line: None)
    rows.write_sources()
    teach(rows, directory / "teach")
    asked = [json.loads(line) for line in (directory / "teach" / "asked.jsonl").read_text().splitlines()]
    return [(record["reference"], record["verdict"]) for record in asked]


@pytest.mark.parametrize(
    ("reference", "judge", "verdict"), [("5", None, "wrong"), ("4.0", None, "right"), ("4.0", "exact", "wrong")]
)
def test_stored_answers_are_judged_by_the_reference_and_the_judge_of_now(tmp_path, reference, judge, verdict):
    with Endpoint(lambda prompt, seed: ("<think>\nI count.\n</think>\n4", "stop")) as endpoint:
        assert verdicts(tmp_path, endpoint.base_url, "4", None) == [("4", "right")] * 2
        assert verdicts(tmp_path, endpoint.base_url, reference, judge) == [(reference, verdict)] * 2
        assert len(endpoint.asked) == 2


def test_traces_of_a_data_set_are_judged_and_selected(tmp_path):
    rows = [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "source": source,
         "generations": [f"<think>t</think>\\boxed{{{n + 1}}}", "<think>t</think>\\boxed{0}"],
         "correctness_math_verify": None, "is_reasoning_complete": [True, True]}
        for n, source in enumerate(["olympiads", "olympiads", "olympiads", "cn_k12"] * 6)
    ]  # fmt: skip
    domain = {"traces": str(write_rows(tmp_path / "openr1.jsonl", rows)), "test_share": 0.3, "validation_share": 0.3,
              "only": {"source": "olympiads"}}  # fmt: skip
    settings = RunSettings.read(
        {"student": "DIR", "domains": {"sums": domain, "other": domain}, "branch": {}, "merges": {"linear": {}}}
    )
    lines = []
    teach(DomainRows("sums", settings, tmp_path / "data", lines.append), tmp_path / "teach")
    counts = json.loads((tmp_path / "teach" / "counts.json").read_text())
    assert {key: counts[key] for key in ("collected", "kept", "dropped")} == {
        "collected": 36, "kept": 18, "dropped": {"wrong": 18},
    }  # fmt: skip
    assert counts["verdicts"] == {"right": 18, "wrong": 18} and "asked" not in counts
    assert {"kept", "wrong"} <= counts["examples"].keys()
    asked = [json.loads(line) for line in (tmp_path / "teach" / "asked.jsonl").read_text().splitlines()]
    assert {(row["domain"], row["source"], row["teacher"]["model"]) for row in asked} == {
        ("sums", "olympiads", "deepseek-ai/DeepSeek-R1")
    }
    splits = [
        len((tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test", "validation")
    ]
    assert sum(splits) == 18 and min(splits) > 0
    assert "domains.sums.traces: 6 of 24 rows left out by 'only'" in lines


def test_problems_by_an_adapter_are_asked_and_judged_as_it_says(tmp_path):
    rows = [{"problem": f"Which letter, {n}?", "answer": "C", "question_type": kind, "source": "s", "solution": ""}
            for n, kind in enumerate(["MCQ", "math-word-problem"])]  # fmt: skip
    test = {"data": str(write_rows(tmp_path / "test.jsonl", [{"prompt": "t", "reference": "1"}]))}
    problems = {"data": str(write_rows(tmp_path / "problems.jsonl", rows)), "adapter": "numina_math"}
    with Endpoint(lambda prompt, seed: ("<think>\nI count.\n</think>\nThe answer is C.", "stop")) as endpoint:
        domain = {"problems": problems, "test": test, "validation": test}
        settings = RunSettings.read(
            {"student": "DIR", "domains": {"d": domain, "other": domain}, "branch": {}, "merges": {"linear": {}},
             "teacher": {"base_url": endpoint.base_url, "model": "m"},
             "select": {"keep": ["right", "wrong", "unjudged"]}}
        )  # fmt: skip
        domain_rows = DomainRows("d", settings, tmp_path / "data", lambda line: None)
        domain_rows.write_sources()
        teach(domain_rows, tmp_path / "teach")
        asked = [json.loads(line) for line in (tmp_path / "teach" / "asked.jsonl").read_text().splitlines()]
    by_prompt = {row["prompt"].split("\n")[0]: row["verdict_by"] for row in asked}
    assert by_prompt["Which letter, 0?"] == "choice" and by_prompt["Which letter, 1?"] != "choice"
