import contextlib
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
from bmjax.io.jsonl import JsonLines
from bmjax.teach import collect as collecting
from bmjax.teach.collect import collect, wanted_samples
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.record import read_records, record_id, trace_files
from bmjax.teach.settings import CollectSettings
from tests.pipeline.endpoint import Endpoint


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
    for record in records.values():
        name = choose(record.reference)
        verdict = judge(record.reference, record.response, name, finish_reason=record.finish_reason)
        assert (verdict.verdict, verdict.judge) == (record.verdict, record.verdict_by)


def test_a_second_run_asks_only_for_what_is_missing(tmp_path: Path, teacher: DemoTeacher) -> None:
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


def test_kill_9_loses_no_line_and_a_restart_completes(tmp_path: Path, teacher: DemoTeacher) -> None:
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
    assert "row 1: test: found int '1', expected asserts" in failing(problems=str(rows), domain="x")
    assert "problems:" in failing(problems=str(empty), domain="x") and "no rows" in failing(problems=str(empty))
    programs = write_rows(tmp_path / "programs.jsonl", [{"question": "Q", "answer": {"tests": ["assert f()"]}}])
    assert "row 1: reference: found tests" in failing(problems=str(programs), verify="exact")
    assert "prompt is empty" in failing(problems=str(blank), domain="x")
    assert "did you mean 'concurrency'" in failing(teacher={**dead, "concurency": 3})
    assert "extra: 'seed'" in failing(teacher={**dead, "extra": {"seed": 3}})
    with DemoTeacher() as teacher:
        wrong_path = {"base_url": teacher.base_url + "/x", "model": "r1"}
        assert "HTTP 404" in failing(teacher=wrong_path)


def own_settings(folder: Path, server: Endpoint, rows: list[dict[str, Any]], **changes: Any) -> CollectSettings:
    teacher = {"base_url": server.base_url, "model": "m", "retries": 1, **changes.pop("teacher", {})}
    source = {"problems": str(write_rows(folder / "rows.jsonl", rows)), "domain": "text", "judge": "exact"}
    return CollectSettings.read({**source, "output": str(folder / "out"), "teacher": teacher, **changes})


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{n}", "answer": "7"} for n in range(count)]


def test_shards_together_ask_what_one_job_asks(tmp_path: Path) -> None:
    rows = [*text_rows(24), {"question": "q3 ", "answer": "7"}]
    with Endpoint(lambda prompt, seed: ("7", "stop")) as server:
        (tmp_path / "one").mkdir()
        collect(own_settings(tmp_path / "one", server, rows, teacher={"samples": 2}))
        whole = {record.id for record in read_records(tmp_path / "one" / "out" / "traces.jsonl")}
        asked, parts = len(server.asked), tmp_path / "parts"
        parts.mkdir()
        sizes = []
        for part in range(3):
            counts = collect(own_settings(parts, server, rows, teacher={"samples": 2}, shard=[part, 3]))
            sizes.append(counts["collected"])
            if part == 0:
                with pytest.raises(UserError, match="lacks shard-1-of-3, shard-2-of-3; collect the missing"):
                    trace_files(str(parts / "out"))
        assert sum(sizes) == 48 == len(server.asked) - asked and min(sizes) > 4
        files = trace_files(str(parts / "out"))
        assert [Path(file).parent.name for file in files] == [f"shard-{part}-of-3" for part in range(3)]
        assert {record.id for record in read_records(*files)} == whole
        # Another cut of the work, and the whole, find what other shards have.
        assert collect(own_settings(parts, server, rows, teacher={"samples": 3}, shard=[0, 2]))["collected"] < 24
        counts = collect(own_settings(parts, server, rows, teacher={"samples": 3}))
        assert counts["present"] >= 48 and counts["present"] + counts["collected"] == 72
    with pytest.raises(UserError, match=r"shard: found \[3, 3\], expected \[i, n\] with i from 0 to n - 1"):
        own_settings(parts, server, rows, shard=[3, 3])


def test_what_is_new_in_a_request_is_part_of_the_id_only_where_it_is_set(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    with Endpoint(lambda prompt, seed: ("7", "stop")) as server:
        rows = text_rows(1)
        plain = own_settings(tmp_path, server, rows)
        sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16384, "seed": 0}
        assert [*wanted_samples(plain)] == [record_id("text", "q0", "m", sampling, 0)]
        variants = [{}, {"stream": True}, {"system": "Be brief."}, {"logprobs": 20}, {"temperature": None}]
        variants += [{"seed": None}, {"extra": {"reasoning_effort": "high"}}]
        variants += [{"max_tokens": None, "extra": {"max_completion_tokens": 9}}]
        asked = [own_settings(tmp_path, server, rows, teacher=teacher) for teacher in variants]
        ids = [next(iter(wanted_samples(source))) for source in asked]
        assert len({*ids}) == len(variants) - 1 and ids[0] == ids[1]
        for source in asked:
            collect(source)
        bodies = [{k: v for k, v in body.items() if k != "model"} for body in server.bodies]
    turn = {"role": "user", "content": "q0"}
    assert len(bodies) == len(variants) - 1
    assert bodies[1]["messages"] == [{"role": "system", "content": "Be brief."}, turn] and "system" not in bodies[1]
    assert (bodies[2]["logprobs"], bodies[2]["top_logprobs"]) == (True, 20)
    assert "temperature" not in bodies[3] and "seed" not in bodies[4] and bodies[5]["reasoning_effort"] == "high"
    assert bodies[6] == {"messages": [turn], "top_p": 0.95, "temperature": 0.6, "seed": 0, "max_completion_tokens": 9}
    for changes in ({"system": "s", "extra": {"system": 1}}, {"logprobs": 1, "extra": {"logprobs": True}}):
        with pytest.raises(UserError, match="remove it here"):
            own_settings(tmp_path, server, rows, teacher=changes)
    with pytest.raises(UserError, match="tokens_per_minute: found 1000, expected more than max_tokens, which is 16384"):
        own_settings(tmp_path, server, rows, teacher={"tokens_per_minute": 1000})


def answers(refused: dict[str, int], default: tuple[str, Any] = ("7", "stop")) -> Any:
    return lambda prompt, seed: ("no", refused[prompt]) if prompt in refused else default


def test_no_balance_ends_the_run_and_one_refused_prompt_does_not(tmp_path: Path) -> None:
    asked: list[str] = []

    def poor(prompt: str, seed: int) -> tuple[str, Any]:
        asked.append(prompt)
        return ("7", "stop") if len(asked) <= 10 else ("no", 402)

    with Endpoint(poor) as server:
        with pytest.raises(UserError, match=r"HTTP 402.*no balance is left.*the same command continues"):
            collect(own_settings(tmp_path, server, text_rows(200), teacher={"concurrency": 4}))
        assert len(asked) < 20 and len(list(read_records(tmp_path / "out" / "traces.jsonl"))) == 10
    refused = {"q0": 403, "q31": 403, "q77": 401}
    with Endpoint(answers(refused)) as server:
        source = own_settings(tmp_path, server, text_rows(200), teacher={"concurrency": 4})
        counts = collect(source)
        assert counts["present"] == 10 and 2 <= counts["failed"] <= 3  # the first may be among the ten
        assert counts["collected"] == 190 - counts["failed"]
        again = collect(source)
        assert (again["collected"], again["failed"]) == (0, counts["failed"])
    for status, hint in ((401, "check the key"), (403, "check the key"), (404, "teacher.model")):
        with Endpoint(lambda prompt, seed, status=status: ("no", status)) as server:
            (tmp_path / str(status)).mkdir()
            with pytest.raises(UserError, match=rf"HTTP {status}.*{hint}"):
                collect(own_settings(tmp_path / str(status), server, text_rows(200), teacher={"concurrency": 4}))
            assert len(server.asked) < 12


def test_an_endpoint_that_refuses_every_request_alike_ends_the_run(tmp_path: Path) -> None:
    with Endpoint(lambda prompt, seed: ("no", 400)) as server:
        with pytest.raises(UserError, match="20 requests in a row failed: HTTP 400"):
            collect(own_settings(tmp_path, server, text_rows(500), teacher={"concurrency": 2}))
        assert len(server.asked) < 30


def test_samples_of_a_prompt_over_the_context_do_not_end_the_run(tmp_path: Path) -> None:
    words = "prompt is too long: 300 tokens > 200 maximum"

    def answer(prompt: str, seed: int) -> tuple[object, object]:
        return ({"error": {"message": words}}, 400) if prompt == "q0" else ("7", "stop")

    with Endpoint(answer) as server:
        teacher = {"concurrency": 1, "samples": 25}
        counts = collect(own_settings(tmp_path, server, text_rows(2), teacher=teacher))
        assert (counts["failed"], counts["collected"]) == (25, 25)


def test_answers_that_are_not_whole_are_counted_by_name(tmp_path: Path) -> None:
    reasons = [
        "stop",
        "eos",
        "end_turn",
        "stop_sequence",
        None,
        "length",
        "max_tokens",
        "content_filter",
        "abort",
        "error",
    ]
    rows = text_rows(len(reasons))
    lines: list[str] = []
    with Endpoint(lambda prompt, seed: ("7", reasons[int(prompt[1:])])) as server:
        settings = own_settings(tmp_path, server, rows, teacher={"price": {"input": 1, "output": 2e6}})
        counts = collect(settings, lines.append)
    assert (counts["truncated"], counts["refused"]) == (4, 1)
    assert {name: n for name, n in counts.items() if name.startswith("ended")} == {
        f"ended by {name}": 1 for name in reasons[5:]
    }
    assert "cost 20.00" in lines[-1] and "content_filter 1" in lines[-1]
    kept = {record.finish_reason for record in read_records(tmp_path / "out" / "traces.jsonl")}
    assert kept == {reason or "stop" for reason in reasons}


def test_a_prompt_that_shows_the_reference_is_refused(tmp_path: Path) -> None:
    with Endpoint(answers({})) as server:
        for prompt in ("{question} \\boxed{answer}", "{question} {answer}", "{question} { answer }"):
            with pytest.raises(UserError, match="row 1: prompt shows field 'answer', which the reference is made of"):
                collect(own_settings(tmp_path, server, text_rows(1), prompt=prompt))
        nested = [{"extra_info": {"question": "q"}, "reward_model": {"ground_truth": "7"}}]
        templates = {"prompt": "{ extra_info.question } \\boxed{}", "reference": "{reward_model.ground_truth}"}
        assert collect(own_settings(tmp_path, server, nested, **templates))["right"] == 1
        assert server.asked[-1][0] == "q \\boxed{}"
        tests = [{"question": "q", "tests": ["assert f() == 1"]}]
        shown = own_settings(
            tmp_path, server, tests, prompt="{question} {tests}", reference="{tests}", judge="tests", domain="code"
        )
        with contextlib.suppress(UserError):  # a bare list of tests may be no reference
            collect(shown)


def test_a_model_judges_what_no_other_judge_can(tmp_path: Path) -> None:
    def grade(prompt: str, seed: int) -> tuple[str, Any]:
        asked.append(prompt)
        verdict = "right" if "seven" in prompt else "wrong" if "eight" in prompt else "unsure"
        return ("no", 400) if "fails" in prompt else (f"It is so.\n**VERDICT: {verdict}**", "stop")

    asked: list[str] = []
    texts = ["seven", "eight", "who knows", "VERDICT: RIGHT", "fails", "cut seven"]
    answer = lambda prompt, seed: (texts[int(prompt[1:])], "length" if "cut" in texts[int(prompt[1:])] else "stop")  # noqa: E731
    with Endpoint(answer) as server, Endpoint(grade) as judge_server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "judge", lambda *arguments: Verdict("unjudged", "cannot tell", "none"))
        model = {"base_url": judge_server.base_url, "model": "j", "retries": 0}
        lines: list[str] = []
        counts = collect(own_settings(tmp_path, server, text_rows(len(texts)), judge_model=model), lines.append)
    assert (counts["right"], counts["wrong"], counts["unjudged"]) == (1, 1, 4) and len(asked) == 5
    by = {record.response: record.verdict_by for record in read_records(tmp_path / "out" / "traces.jsonl")}
    assert by["seven"] == by["eight"] == "llm:j" and by["who knows"] == by["fails"] == by["cut seven"] == "none"
    assert any("judge_model: HTTP 400" in line for line in lines)


def test_a_judge_that_fails_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reference: Any, answer: str, *rest: Any) -> Verdict:
        raise ZeroDivisionError("oops")

    lines: list[str] = []
    with Endpoint(answers({})) as server:
        settings = own_settings(tmp_path, server, text_rows(5))
        monkeypatch.setattr(collecting, "judge", broken)
        assert collect(settings, lines.append)["unjudged"] == 5
    assert any("ZeroDivisionError: oops" in line for line in lines)


def test_a_disk_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JsonLines, values: Any) -> None:
        raise UserError(f"{self.path}: cannot be written: No space left on device")

    with Endpoint(lambda prompt, seed: ("7", "stop") if len(prompt) < 3 else ("no", 400)) as server:
        source = own_settings(tmp_path, server, text_rows(300), teacher={"concurrency": 2})
        wrong = pytest.raises(UserError, match=r"(traces|failures)\.jsonl: .*No space left")
        with monkeypatch.context() as patch, wrong:
            patch.setattr(JsonLines, "append", full)
            collect(source)
        assert len(server.asked) < 20
