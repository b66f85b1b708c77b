import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.demo.problems import make_problems, solve
from bmjax.demo.teacher import BuiltinTeacher
from bmjax.teach.collect import collect
from bmjax.teach.judges.verify import verify
from bmjax.teach.record import read_records
from bmjax.teach.settings import CollectSettings


def settings(output: Path, problems: Any = None, **teacher: Any) -> CollectSettings:
    problems = problems or {"builtin": "math", "count": 60}
    return CollectSettings.read({"problems": problems, "output": str(output), "teacher": {"builtin": True, **teacher}})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_problem_becomes_one_judged_record(tmp_path: Path) -> None:
    counts = collect(settings(tmp_path, {"builtin": "math", "count": 400}))
    records = {r.prompt: r for r in read_records(tmp_path / "traces.jsonl")}
    problems = make_problems("math", 400)
    assert counts["wanted"] == counts["collected"] == len(records) == 400
    assert (counts["present"], counts["failed"]) == (0, 0)
    for problem in problems:
        record = records[problem.prompt]
        solution = solve(problem.prompt)
        assert (record.domain, record.reference, record.source) == (
            "math",
            problem.reference,
            f"builtin/math/{problem.level}",
        )
        if record.verdict == "right" and "<think>" not in record.response and record.reasoning:
            assert (record.reasoning, record.response) == (solution.reasoning, solution.answer)
    for verdict in ("right", "wrong", "unjudged"):
        assert counts[verdict] == sum(r.verdict == verdict for r in records.values())
    assert 0 < counts["truncated"] == sum(r.finish_reason == "length" for r in records.values())
    assert all(verify("math", r.reference, r.response).verdict == r.verdict for r in records.values())


def test_a_second_run_asks_nothing_and_a_longer_one_only_the_rest(tmp_path: Path) -> None:
    collect(settings(tmp_path))
    before = (tmp_path / "traces.jsonl").read_bytes()
    assert collect(settings(tmp_path))["present"] == 60
    assert (tmp_path / "traces.jsonl").read_bytes() == before
    counts = collect(settings(tmp_path, {"builtin": "math", "count": 90}, samples=2))
    assert (counts["wanted"], counts["present"], counts["collected"]) == (180, 60, 120)
    assert (tmp_path / "traces.jsonl").read_bytes().startswith(before)
    records = list(read_records(tmp_path / "traces.jsonl"))
    assert len({r.id for r in records}) == 180
    assert sorted(r.teacher["sample"] for r in records) == [0] * 90 + [1] * 90


def test_two_runs_collect_the_same(tmp_path: Path) -> None:
    for name, concurrency in (("a", 1), ("b", 16)):
        collect(settings(tmp_path / name, {"builtin": "science", "count": 150}, concurrency=concurrency))
    first, second = ({r.id: r for r in read_records(tmp_path / name / "traces.jsonl")} for name in ("a", "b"))
    assert first == second
    assert {r.verdict_by for r in first.values()} == {"number"}


def test_kill_9_loses_no_finished_line_and_a_restart_completes_it(tmp_path: Path) -> None:
    program = (
        "import sys; from bmjax.teach.collect import collect; from bmjax.teach.settings import CollectSettings\n"
        "collect(CollectSettings.read({'problems': {'builtin': 'code', 'count': 900}, 'output': sys.argv[1],"
        " 'teacher': {'builtin': True, 'concurrency': 8}}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    traces = tmp_path / "traces.jsonl"
    size = 0
    for more in (1, 60_000, 90_000):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if traces.exists() and traces.stat().st_size > size + more:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        size = traces.stat().st_size
    with traces.open("ab") as file:
        file.write(b'{"id": "torn", "prompt": "\xc3')
    survivors = [r.id for r in read_records(traces)]
    counts = collect(settings(tmp_path, {"builtin": "code", "count": 900}, concurrency=8))
    assert 0 < len(survivors) < 900
    assert (counts["wanted"], counts["present"]) == (900, len(survivors))
    ids = [r.id for r in read_records(traces)]
    assert ids[: len(survivors)] == survivors
    assert len(set(ids)) == len(ids) == 900


def test_a_file_with_templates_and_what_the_teacher_refuses(tmp_path: Path) -> None:
    rows = [
        {"task": "2 + 3", "answer": "5"},
        {"task": "4 * 4", "answer": "16"},
        {"task": "x", "answer": "1"},
        {"task": "2 + 3", "answer": "5"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    source = {
        "problems": str(path),
        "domain": "sums",
        "prompt": "Compute {task}.",
        "output": str(tmp_path / "out"),
        "teacher": {"builtin": True, "mistakes": {"wrong": 0, "truncated": 0, "malformed": 0}},
    }
    lines: list[str] = []
    counts = collect(CollectSettings.read(source), lines.append)
    assert (counts["wanted"], counts["collected"], counts["right"], counts["failed"]) == (3, 2, 2, 1)
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert (failure["prompt"], failure["status"], failure["attempts"]) == ("Compute x.", 400, 1)
    assert "does not know" in failure["error"]
    assert {r.source for r in read_records(tmp_path / "out" / "traces.jsonl")} == {f"{path}:1", f"{path}:2"}
    assert any("2 collected" in line for line in lines)
    assert collect(CollectSettings.read(source))["failed"] == 1


def test_an_outside_endpoint_gets_the_key_but_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with BuiltinTeacher() as teacher:
        source = {
            "problems": {"builtin": "math", "count": 30},
            "output": str(tmp_path),
            "teacher": {"base_url": teacher.base_url, "model": "r1", "api_key_env": "TEACHER_KEY", "seed": None},
        }
        assert collect(CollectSettings.read(source))["collected"] == 30
        assert teacher.requests >= 30
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in text and '"model": "r1"' in text


def test_what_a_user_gets_wrong_is_one_line(tmp_path: Path) -> None:
    def failing(**changes: Any) -> str:
        source = {
            "problems": {"builtin": "math", "count": 5},
            "output": str(tmp_path / "o"),
            "teacher": {"builtin": True},
        }
        with pytest.raises(UserError) as caught:
            collect(CollectSettings.read({**source, **changes}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Compute 1 + 1.", "answer": {"test": 1}}])
    empty = write_rows(tmp_path / "empty.jsonl", [])
    blank = write_rows(tmp_path / "blank.jsonl", [{"question": " ", "answer": "1"}])
    dead = {"base_url": "http://127.0.0.1:9/v1", "model": "r1", "retries": 0}
    assert "either base_url or builtin" in failing(teacher={})
    assert "teacher.model" in failing(teacher={"base_url": "http://127.0.0.1:9/v1"})
    assert "is the server running" in failing(teacher=dead)
    assert "NO_SUCH" in failing(teacher={**dead, "api_key_env": "NO_SUCH"})
    assert "key 'domain' is missing" in failing(problems=str(rows))
    assert "no such file" in failing(problems=str(tmp_path / "row.jsonl"), domain="x")
    assert "did you mean" in failing(problems=str(rows), domain="x", prompt="{questions}")
    assert "tests" in failing(problems=str(rows), domain="x")
    assert "holds no problem" in failing(problems=str(empty), domain="x")
    assert "prompt is empty" in failing(problems=str(blank), domain="x")
    assert "did you mean 'concurrency'" in failing(teacher={"builtin": True, "concurency": 3})
    assert "builtin" in failing(problems={"builtin": "maths"})
    with BuiltinTeacher() as teacher:
        wrong_path = {"base_url": teacher.base_url + "/x", "model": "r1"}
        assert "HTTP 404" in failing(teacher=wrong_path)
