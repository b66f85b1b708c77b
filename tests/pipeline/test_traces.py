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
