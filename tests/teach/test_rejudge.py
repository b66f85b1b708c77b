"""Verdicts of existing traces made anew: what changes, what is kept, what is written, and that nothing is lost."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import bmjax
from bmjax.cli import main as cli
from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines
from bmjax.teach import rejudge as module
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.rejudge import rejudge, summary
from bmjax.teach.settings import JudgeSettings
from bmjax.teach.traces import trace_rows
from tests.conftest import write_rows

TESTS = {"tests": ["assert double(3) == 6"]}


def trace(number, response, reference="auto", verdict="unjudged", **changes):
    """A trace whose question is number + 1."""
    right = str(number + 1) if reference == "auto" else reference
    return {
        "id": f"t{number:04}", "domain": "sums", "prompt": f"What is {number} + 1?", "reference": right,
        "reasoning": "thought", "response": response, "finish_reason": "stop", "verdict": verdict,
        "verdict_by": "none", "logprobs": [0.5], "teacher": {"model": "m"},
    } | changes  # fmt: skip


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(traces, **keys):
    return rejudge(JudgeSettings.read({"traces": str(traces), **keys}))


@pytest.fixture
def rows():
    return [
        trace(1, "\\boxed{2}"),
        trace(2, "\\boxed{7}", verdict="right"),
        trace(3, "\\boxed{4}", verdict="wrong"),
        trace(4, "\\boxed{5}", verdict="right"),
        trace(5, "\\boxed{6}", None, verdict="right"),
        trace(6, "```python\ndef double(x): return 2 * x\n```", TESTS, verdict="right"),
    ]


def test_verdicts_are_made_anew_in_place_and_counted(tmp_path, rows):
    file = write_rows(tmp_path / "traces.jsonl", rows)
    counts = run(file)
    assert counts["before"] == {"right": 4, "wrong": 1, "unjudged": 1}
    assert counts["after"] == {"right": 5, "wrong": 1, "unjudged": 0}
    assert counts["changed"] == {"unjudged -> right": 1, "right -> wrong": 1, "wrong -> right": 1}
    assert counts["kept"] == {"no reference": 1, "programs run only with run_programs: true": 1}
    assert (counts["traces"], counts["references"], counts["no_problem"]) == (6, 0, 0)
    written = lines_of(file)
    assert [row["verdict"] for row in written] == ["right", "wrong", "right", "right", "right", "right"]
    changing = ("verdict", "verdict_by")
    assert [{k: v for k, v in row.items() if k not in changing} for row in written] == [
        {k: v for k, v in row.items() if k not in changing} for row in rows
    ]
    first, *others = summary(counts).splitlines()
    assert first.endswith("6 traces: right 4 -> 5, wrong 1 -> 1, unjudged 1 -> 0; 3 verdicts changed")
    assert "  right -> wrong: 1" in others and "  verdict kept, no reference: 1" in others
    assert run(file)["changed"] == {}


def test_verdicts_that_a_second_judge_sees_otherwise_are_counted(tmp_path, rows, monkeypatch):
    def second_opinion(reference, *_):
        return Verdict("right", "", "values", disagreement="math-verify" if reference in ("2", "3") else "")

    monkeypatch.setattr(module, "judge", second_opinion)
    counts = run(write_rows(tmp_path / "traces.jsonl", rows))
    assert counts["disputed"] == 2 and "  a second judge says otherwise: 2" in summary(counts).splitlines()


def test_programs_are_judged_when_they_may_run(tmp_path, rows):
    file = write_rows(tmp_path / "traces.jsonl", [rows[5], rows[5] | {"id": "x", "response": "```python\npass\n```"}])
    counts = run(file, run_programs=True)
    assert counts["changed"] == {"right -> wrong": 1} and not counts["kept"]


def test_references_come_from_the_problems(tmp_path, rows):
    file = write_rows(tmp_path / "traces.jsonl", rows[:5])
    problems = write_rows(
        tmp_path / "problems.jsonl",
        [{"question": " What is 1  + 1? ", "answer": "9"}, {"question": "What is 5 + 1?", "answer": "6"}],
    )
    counts = run(file, problems=str(problems), output=str(tmp_path / "new.jsonl"))
    assert (counts["references"], counts["no_problem"]) == (2, 3)
    assert [(row["reference"], row["verdict"]) for row in lines_of(tmp_path / "new.jsonl")] == [
        ("9", "wrong"), ("3", "wrong"), ("4", "right"), ("5", "right"), ("6", "right"),
    ]  # fmt: skip
    assert lines_of(file) == rows[:5]


def test_an_adapters_problems_fit_with_and_without_its_instruction(tmp_path):
    bare = {
        "problem": "What is 1 + 1?",
        "generations": ["<think>t</think>\\boxed{2}"],
        "correctness_math_verify": [False],
    }
    asked = trace(1, "\\boxed{2}", prompt="What is 1 + 1?\n\nPlease reason step by step, and put your final answer "
                  "within \\boxed{}.", reference="8")  # fmt: skip
    traces = [write_rows(tmp_path / "bare.jsonl", [bare]), write_rows(tmp_path / "asked.jsonl", [asked])]
    problems = write_rows(tmp_path / "problems.jsonl", [{"question": "What is 1 + 1?", "answer": "One more. #### 2"}])
    counts = rejudge(
        JudgeSettings.read({"traces": [str(t) for t in traces], "problems": str(problems), "adapter": "gsm8k",
                            "output": str(tmp_path / "out")})
    )  # fmt: skip
    assert counts["changed"] == {"wrong -> right": 1, "unjudged -> right": 1} and counts["no_problem"] == 0
    assert [row["reference"] for row in lines_of(tmp_path / "out" / "traces.jsonl")] == ["2", "2"]


def test_traces_of_data_sets_become_records_and_need_an_output(tmp_path):
    row = {"problem": "What is 1 + 1?", "answer": "2", "source": "s", "generations": ["<think>t</think>2", "3"],
           "correctness_math_verify": [False, False]}  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=r"not traces of `bmjax collect`.*give output: FILE.jsonl"):
        run(file)
    assert lines_of(file) == [row]
    mixed = write_rows(tmp_path / "mixed.jsonl", [trace(1, "2"), row])
    with pytest.raises(UserError, match=r"mixed.jsonl, row 2: not a trace of `bmjax collect`.*give output: FILE.jsonl"):
        run(mixed)
    assert lines_of(mixed) == [trace(1, "2"), row]
    assert run(file, output=str(tmp_path / "new.jsonl"))["after"] == {"right": 1, "wrong": 1, "unjudged": 0}
    first, second = lines_of(tmp_path / "new.jsonl")
    assert (first["verdict"], first["reasoning"], second["verdict"]) == ("right", "t", "wrong")
    assert run(tmp_path / "new.jsonl")["changed"] == {}


def test_files_of_other_forms_are_never_touched(tmp_path, rows):
    array, packed = tmp_path / "traces.json", tmp_path / "traces.jsonl.gz"
    array.write_text(json.dumps(rows, indent=1))
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for file in (array, packed):
        before = file.read_bytes()
        with pytest.raises(UserError, match=r"give output: FILE.jsonl"):
            run(file)
        assert file.read_bytes() == before
        assert run(file, output=str(tmp_path / "new.jsonl"))["traces"] == len(rows)


@pytest.mark.parametrize("keys", [{"shard": [0, 2]}, {"only": {"domain": "sums"}}])
def test_a_part_never_replaces_the_whole(tmp_path, rows, keys):
    file = write_rows(tmp_path / "traces.jsonl", rows)
    with pytest.raises(UserError, match="output: traces are replaced in place only where they are one whole file"):
        run(file, **keys)
    assert lines_of(file) == rows


def test_shards_join_to_the_whole(tmp_path):
    rows = [trace(n, f"\\boxed{{{n + n % 2}}}") for n in range(60)]
    file = write_rows(tmp_path / "traces.jsonl", rows)
    parts = [run(file, shard=[i, 3], output=str(tmp_path / f"part{i}.jsonl")) for i in range(3)]
    assert all(part["traces"] > 5 for part in parts) and sum(part["traces"] for part in parts) == 60
    joined = sorted((row for i in range(3) for row in lines_of(tmp_path / f"part{i}.jsonl")), key=lambda row: row["id"])
    run(file)
    assert joined == lines_of(file)
    with pytest.raises(UserError, match="shard: found \\[3, 3\\], expected \\[i, n\\] with i from 0"):
        run(file, shard=[3, 3], output="x")


def test_order_is_kept_and_few_traces_wait(tmp_path, monkeypatch):
    count = 600
    file = write_rows(tmp_path / "traces.jsonl", [trace(n, "x") for n in range(count)])
    running, most, ahead, lock = 0, 0, 0, threading.Lock()
    done = Counter()

    def counted(*arguments):
        for row in trace_rows(*arguments):
            done["read"] += 1
            yield row

    def slow(reference, answer, name, run_programs, finish_reason, seconds):
        nonlocal running, most, ahead
        with lock:
            running += 1
            most = max(most, running)
            ahead = max(ahead, done["read"] - done["judged"])
        time.sleep(0.001 * (int(reference) % 7))
        with lock:
            running -= 1
            done["judged"] += 1
        return Verdict("right", "", "math")

    monkeypatch.setattr(module, "judge", slow)
    monkeypatch.setattr(module, "trace_rows", counted)
    assert run(file)["after"]["right"] == count
    assert [row["id"] for row in lines_of(file)] == [f"t{n:04}" for n in range(count)]
    workers = (os.cpu_count() or 1) + 4
    assert 1 < most <= workers and ahead <= 10 * workers < count


def test_a_reference_that_no_judge_reads_names_the_row_and_changes_nothing(tmp_path):
    rows = [trace(1, "\\boxed{2}"), trace(2, "x", {"answers": [3]})]
    file = write_rows(tmp_path / "traces.jsonl", rows)
    with pytest.raises(UserError, match=r"traces.jsonl, row 2: reference: found keys"):
        run(file)
    assert lines_of(file) == rows and [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


def test_a_collector_that_writes_is_waited_for(tmp_path, rows):
    file = write_rows(tmp_path / "traces.jsonl", rows)
    with JsonLines(file), pytest.raises(UserError, match="another process is writing it"):
        run(file)


def test_a_torn_last_line_is_dropped_as_collect_does(tmp_path, rows):
    file = write_rows(tmp_path / "traces.jsonl", rows[:2])
    with file.open("a") as end:
        end.write('{"id": "t0')
    assert run(file)["traces"] == 2 and len(lines_of(file)) == 2


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"traces.jsonl: no such file"):
        run(tmp_path / "traces.jsonl")


def test_a_judge_by_name_wins(tmp_path):
    file = write_rows(tmp_path / "traces.jsonl", [trace(1, "2.0", "2")])
    assert run(file, judge="exact")["after"]["wrong"] == 1
    assert run(file, judge="math")["after"]["right"] == 1


def test_the_command_and_the_interface_say_the_same(tmp_path, rows, capsys):
    (tmp_path / "run").mkdir()
    file = write_rows(tmp_path / "run" / "traces.jsonl", rows)
    config = tmp_path / "judge.yaml"
    config.write_text(f"traces: {file}\noutput: {tmp_path / 'a.jsonl'}\n")
    assert cli.main(["judge", str(config)]) == 0
    out = capsys.readouterr().out
    assert "6 traces: right 4 -> 5, wrong 1 -> 1, unjudged 1 -> 0; 3 verdicts changed" in out
    assert bmjax.rejudge({"traces": str(file)}, f"output={tmp_path / 'b.jsonl'}")["traces"] == 6
    assert lines_of(tmp_path / "a.jsonl") == lines_of(tmp_path / "b.jsonl")
    assert cli.main(["judge", str(file.parent)]) == 0
    assert lines_of(file) == lines_of(tmp_path / "a.jsonl")


@pytest.mark.slow
def test_a_killed_run_leaves_the_traces_as_they_were(tmp_path):
    rows = [trace(n, "```python\nimport time; time.sleep(1)\n```", TESTS) for n in range(50)]
    file = write_rows(tmp_path / "traces.jsonl", rows)
    command = [sys.executable, "-m", "bmjax", "judge", str(file), "run_programs=true"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (written := [*tmp_path.glob(".traces.jsonl.*.tmp")]) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    assert written and process.poll() is None, "it was not killed on the way"
    process.kill()
    process.wait()
    assert lines_of(file) == rows
