import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.demo.problems import make_problems, solve
from bmjax.demo.teacher import MODEL, DemoTeacher
from bmjax.teach.collect import collect
from bmjax.teach.judges.verify import verify
from bmjax.teach.record import read_records
from bmjax.teach.settings import CollectSettings


@pytest.fixture(scope="module")
def teacher() -> Iterator[DemoTeacher]:
    with DemoTeacher() as server:
        yield server


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem_file(folder: Path, domain: str, count: int) -> str:
    rows = [{"question": problem.prompt, "answer": problem.reference} for problem in make_problems(domain, count)]
    folder.mkdir(exist_ok=True)
    return str(write_rows(folder / f"{domain}{count}.jsonl", rows))


def settings(
    output: Path, server: DemoTeacher, domain: str = "math", count: int = 60, **teacher: Any
) -> CollectSettings:
    source = {"problems": problem_file(output, domain, count), "domain": domain, "output": str(output)}
    return CollectSettings.read({**source, "teacher": {"base_url": server.base_url, "model": MODEL, **teacher}})


def test_every_problem_becomes_one_judged_record(tmp_path: Path, teacher: DemoTeacher) -> None:
    counts = collect(settings(tmp_path, teacher, "math", 400))
    records = {r.prompt: r for r in read_records(tmp_path / "traces.jsonl")}
    problems = make_problems("math", 400)
    assert counts["wanted"] == counts["collected"] == len(records) == 400
    assert (counts["present"], counts["failed"]) == (0, 0)
    for number, problem in enumerate(problems, 1):
        record = records[problem.prompt]
        solution = solve(problem.prompt)
        assert (record.domain, record.reference, record.source) == (
            "math",
            problem.reference,
            f"{tmp_path / 'math400.jsonl'}, row {number}",
        )
        if record.verdict == "right" and "<think>" not in record.response and record.reasoning:
            assert (record.reasoning, record.response) == (solution.reasoning, solution.answer)
    for verdict in ("right", "wrong", "unjudged"):
        assert counts[verdict] == sum(r.verdict == verdict for r in records.values())
    assert 0 < counts["truncated"] == sum(r.finish_reason == "length" for r in records.values())
    assert all(verify("math", r.reference, r.response).verdict == r.verdict for r in records.values())


def test_only_what_is_not_there_is_asked(tmp_path: Path, teacher: DemoTeacher) -> None:
    collect(settings(tmp_path, teacher))
    before = (tmp_path / "traces.jsonl").read_bytes()
    assert collect(settings(tmp_path, teacher))["present"] == 60
    assert (tmp_path / "traces.jsonl").read_bytes() == before
    counts = collect(settings(tmp_path, teacher, "math", 90, samples=2))
    assert (counts["wanted"], counts["present"], counts["collected"]) == (180, 60, 120)
    assert (tmp_path / "traces.jsonl").read_bytes().startswith(before)
    records = list(read_records(tmp_path / "traces.jsonl"))
    assert len({r.id for r in records}) == 180
    assert sorted(r.teacher["sample"] for r in records) == [0] * 90 + [1] * 90


def test_two_runs_collect_the_same(tmp_path: Path, teacher: DemoTeacher) -> None:
    for name, concurrency in (("a", 1), ("b", 16)):
        collect(settings(tmp_path / name, teacher, "science", 150, concurrency=concurrency))
    first, second = ({r.id: r for r in read_records(tmp_path / name / "traces.jsonl")} for name in ("a", "b"))
    assert {key: replace(record, source="") for key, record in first.items()} == {
        key: replace(record, source="") for key, record in second.items()
    }
    assert {r.verdict_by for r in first.values()} == {"number"}


def test_kill_9_loses_no_finished_line(tmp_path: Path, teacher: DemoTeacher) -> None:
    program = (
        "import sys; from bmjax.teach.collect import collect; from bmjax.teach.settings import CollectSettings\n"
        "collect(CollectSettings.model_validate_json(sys.argv[1]))"
    )
    asked = settings(tmp_path, teacher, "code", 900, concurrency=8)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    traces = tmp_path / "traces.jsonl"
    size = 0
    for more in (1, 60_000, 90_000):
        process = subprocess.Popen([sys.executable, "-c", program, asked.model_dump_json()], env=environment)
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
    counts = collect(asked)
    assert 0 < len(survivors) < 900
    assert (counts["wanted"], counts["present"]) == (900, len(survivors))
    ids = [r.id for r in read_records(traces)]
    assert ids[: len(survivors)] == survivors
    assert len(set(ids)) == len(ids) == 900


def test_a_file_with_templates_and_what_the_teacher_refuses(tmp_path: Path, teacher: DemoTeacher) -> None:
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
        "teacher": {
            "base_url": teacher.base_url,
            "model": MODEL,
            "extra": {"mistakes": {"wrong": 0, "truncated": 0, "malformed": 0}},
        },
    }
    lines: list[str] = []
    counts = collect(CollectSettings.read(source), lines.append)
    assert (counts["wanted"], counts["collected"], counts["right"], counts["failed"]) == (3, 2, 2, 1)
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert (failure["prompt"], failure["status"], failure["attempts"]) == ("Compute x.", 400, 1)
    assert "does not know" in failure["error"]
    assert {r.source for r in read_records(tmp_path / "out" / "traces.jsonl")} == {f"{path}, row 1", f"{path}, row 2"}
    assert any("2 collected" in line for line in lines)
    assert collect(CollectSettings.read(source))["failed"] == 1


def test_extra_fields_are_sent_and_tell_answers_apart(tmp_path: Path, teacher: DemoTeacher) -> None:
    always = {"mistakes": {"wrong": 1, "truncated": 0, "malformed": 0}}
    assert collect(settings(tmp_path, teacher))["right"] > 40
    counts = collect(settings(tmp_path, teacher, extra=always))
    assert (counts["present"], counts["right"]) == (0, 0)


def test_an_outside_endpoint_gets_the_key_but_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with DemoTeacher() as teacher:
        source = {
            "problems": problem_file(tmp_path, "math", 30),
            "domain": "math",
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
            "problems": problem_file(tmp_path, "math", 5),
            "domain": "math",
            "output": str(tmp_path / "o"),
            "teacher": {"base_url": "http://127.0.0.1:9/v1", "model": "r1"},
        }
        with pytest.raises(UserError) as caught:
            collect(CollectSettings.read({**source, **changes}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Compute 1 + 1.", "answer": {"test": 1}}])
    empty = write_rows(tmp_path / "empty.jsonl", [])
    blank = write_rows(tmp_path / "blank.jsonl", [{"question": " ", "answer": "1"}])
    dead = {"base_url": "http://127.0.0.1:9/v1", "model": "r1", "retries": 0}
    assert "teacher.base_url" in failing(teacher={"model": "r1"})
    assert "teacher.model" in failing(teacher={"base_url": "http://127.0.0.1:9/v1"})
    assert "is the server running" in failing(teacher=dead)
    assert "NO_SUCH" in failing(teacher={**dead, "api_key_env": "NO_SUCH"})
    assert "no such file" in failing(problems=str(tmp_path / "row.jsonl"), domain="x")
    assert "did you mean" in failing(problems=str(rows), domain="x", prompt="{questions}")
    assert "tests" in failing(problems=str(rows), domain="x")
    assert "holds no problem" in failing(problems=str(empty), domain="x")
    assert "prompt is empty" in failing(problems=str(blank), domain="x")
    assert "did you mean 'concurrency'" in failing(teacher={**dead, "concurency": 3})
    assert "extra: 'seed'" in failing(teacher={**dead, "extra": {"seed": 3}})
    with DemoTeacher() as teacher:
        wrong_path = {"base_url": teacher.base_url + "/x", "model": "r1"}
        assert "HTTP 404" in failing(teacher=wrong_path)
