"""Tasks by name: their values, what of them a user may change, what is refused, and that real rows become questions."""

import gzip
import json
import re
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.evaluate.questions import read_questions, samples_of
from bmjax.evaluate.settings import EvalSettings
from bmjax.evaluate.tasks import TASKS
from bmjax.log import silent
from bmjax.pipeline.rows import read_source
from bmjax.pipeline.settings import DomainSettings, SourceSettings
from bmjax.teach.adapters.livecodebench import is_packed
from bmjax.teach.benchmarks import BENCHMARKS, benchmark_name
from bmjax.teach.contamination.benchmarks import read_benchmarks
from tests.conftest import SHARED, write_rows
from tests.evaluate.rows import gpqa_row, lcb_row

WINDOW = {"between": {"contest_date": ["2024-08-01", "2025-02-01"]}}


def settings(tasks, **changes) -> EvalSettings:
    return EvalSettings.read({"model": "m", "output": "o", "tasks": tasks, "run_programs": True} | changes)


def test_names_of_tasks_and_benchmarks_are_one_table():
    with_data = {name for name, task in TASKS.items() if not task.needs_traces}
    assert with_data <= {*BENCHMARKS} and {"aime24", "livecodebench", "gpqa_diamond", "humaneval"} <= with_data
    assert settings(["gsm8k"]).tasks["gsm8k"].questions == BENCHMARKS["gsm8k"].data
    assert [benchmark_name(name) for name in ("AIME-2024", "gpqa-diamond", "MATH500", "mine")] == [
        "aime24", "gpqa_diamond", "math500", "mine",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no benchmark 'aime2'; did you mean 'aime25'"):
        read_benchmarks(["aime2"])


def test_the_tasks_keys_win_over_the_evaluations_and_those_over_the_benchmarks():
    asked = settings({"aime24": None, "mine": {"task": "aime24", "k": 2, "temperature": 1.0}}, temperature=0.3)
    assert [asked.of_task("aime24", key) for key in ("samples", "temperature", "top_p", "max_new_tokens")] == [
        16, 0.3, 0.95, 32768,
    ]  # fmt: skip
    assert [asked.of_task("mine", key) for key in ("samples", "temperature", "seed")] == [2, 1.0, 0]
    assert asked.tasks["aime24"].metrics == ["maj@16"] and asked.tasks["mine"].metrics == []
    assert settings("aime24", samples=4).of_task("aime24", "samples") == 4
    plain = settings({"t": {"questions": "f"}})
    assert [plain.of_task("t", key) for key in ("samples", "temperature", "top_p", "max_new_tokens")] == [1, 0, 1, 2048]
    # A user's own templates win over the benchmark's adapter.
    own = settings({"aime24": {"data": "f", "prompt": "{q}", "reference": "{a}"}}).tasks["aime24"]
    assert (own.adapter, own.questions, own.judge) == (None, "f", "math")
    # A block that `bmjax run` makes is taken as it is.
    assert settings({"aime24": plain.tasks["t"]}).of_task("aime24", "samples") == 1


@pytest.mark.parametrize("tasks, problem", [
    (["gpqa_diamond"], r"tasks.gpqa_diamond: .*never fetched unasked; give your copy: .*.csv .*questions=FILE"),
    (["livecodebench"], r"tasks.livecodebench: .*test5.jsonl.*tasks.livecodebench.questions=FILE"),
    (["held_out_loss"], r"tasks.held_out_loss: give traces: FILE"),
    (["aime2024x"], r"tasks.aime2024x: give questions .* none; did you mean 'aime24'"),
    ({"t": {"task": "aime"}}, r"tasks.t.task: no such benchmark 'aime'; did you mean"),
    ({"t": {"questions": "f", "metrics": ["best@2"]}}, r"found 'best@2', expected pass@K, maj@K or avg@K"),
    ({"t": {"questions": "f", "metrics": ["pass@2"]}}, r"tasks.t.metrics: pass@2 needs more samples than 1"),
    ([], "tasks: empty"),
    (7, "tasks: expected a block of keys"),
    ({"t": 7}, "tasks.t: expected a block of keys"),
])  # fmt: skip
def test_mistakes_are_one_line(tasks, problem):
    with pytest.raises(UserError, match=problem) as error:
        settings(tasks)
    assert "\n" not in str(error.value)


def test_keys_that_would_have_no_effect_are_refused():
    tasks, url = {"t": {"questions": "f"}}, "http://localhost:1/v1"
    with pytest.raises(UserError, match="template: the server behind base_url has its own"):
        settings(tasks, base_url=url, template="chatml")
    with pytest.raises(UserError, match="extra: these are fields of requests"):
        settings(tasks, extra={"top_k": 20})


def test_the_page_lists_every_task():
    text = (Path(__file__).resolve().parents[2] / "docs" / "evaluating.md").read_text(encoding="utf-8")
    table = text.split("## Tasks", 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`([a-z]+_?[a-z0-9_]+)`", table.replace("`lcb_compat`", "").replace("`maj@16`", ""))) - {
        "math", "choice", "tests", "traces",
    } == {*TASKS}  # fmt: skip


def test_an_endpoint_gives_no_held_out_loss():
    with pytest.raises(UserError, match=r"tasks.t.traces: an endpoint gives no held-out loss"):
        settings({"t": {"traces": "f"}}, base_url="http://localhost:1/v1")


def test_a_domain_of_run_tests_by_name():
    domain = DomainSettings.read({"traces": "f", "test": "AIME24"})
    assert (domain.test.data, domain.test.adapter) == (BENCHMARKS["aime24"].data, "auto")
    copy = DomainSettings.read({"traces": "f", "test": {"benchmark": "gpqa_diamond", "data": "mine.csv"}}).test
    assert (copy.data, copy.adapter, copy.benchmark) == ("mine.csv", "gpqa", "gpqa_diamond")
    for name, problem in (
        ("gpqa_diamond", "give your copy.*as a block: {benchmark: gpqa_diamond, data: FILE}"),
        ("foo", "no bench"),
    ):
        with pytest.raises(UserError, match=problem):
            DomainSettings.read({"traces": "f", "test": name})


def read(tmp_path, name, rows=None, file=None, **changes):
    file = file or write_rows(tmp_path / f"{name}.jsonl", rows)
    asked = settings({name: {"questions": str(file)} | changes})
    lines = []
    questions = read_questions(asked, name, lines.append)
    return questions, samples_of(asked, name, questions, "m", {}), lines


def test_livecodebench_is_read_within_its_window_and_stays_packed(tmp_path):
    days = ["2024-07-31", "2024-08-01", "2025-02-01", "2025-02-02"]
    rows = [lcb_row(n, day, calls=n == 2) for n, day in enumerate(days)]
    questions, samples, lines = read(tmp_path, "livecodebench", rows)
    assert [question.problem for question in questions] == ["q1", "q2"] and len(samples) == 8
    assert all(is_packed(question.reference) and question.judge == "tests" for question in questions)
    assert "Read the inputs from stdin" in questions[0].prompt and "class Solution" in questions[1].prompt
    assert lines == ["tasks.livecodebench.questions: 2 of 4 rows left out by 'between'"]
    changed = read(tmp_path, "livecodebench", rows, between={"contest_date": ["2023-01-01", "2024-12-31"]})[0]
    assert [question.problem for question in changed] == ["q0", "q1"]
    with pytest.raises(UserError, match=r"none of 4 rows lies in between: contest_date \[2026-01-01, 2026-02-01\]"):
        read(tmp_path, "livecodebench", rows, between={"contest_date": ["2026-01-01", "2026-02-01"]})
    bad = [lcb_row(1, "2024-09-01", private="gASVBwAAAAAAAACMA2Fi")]
    with pytest.raises(UserError, match=r"livecodebench.jsonl, row 1: livecodebench: the private tests cannot be read"):
        read(tmp_path, "livecodebench", bad)


@pytest.mark.parametrize("release, numbers", [
    ("release_v1", [1]), ("release_v2", [1, 2]), ("release_v5", [1, 2, 3, 4, 5]), ("release_v6", [1, 2, 3, 4, 5, 6]),
    ("release_latest", [1, 2, 3, 4, 5, 6]), ("v1", [1]), ("v6", [6]), ("v2_v4", [2, 3, 4]),
    ("v1_v6", [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_a_release_of_livecodebench_is_its_files_of_a_folder(tmp_path, release, numbers):
    for number in range(1, 7):
        write_rows(tmp_path / f"test{number if number > 1 else ''}.jsonl", [lcb_row(number, "2024-09-01")])
    write_rows(tmp_path / "other.jsonl", [lcb_row(9, "2024-09-01")])
    questions, _, _ = read(tmp_path, "livecodebench", file=tmp_path, release=release)
    assert [question.problem for question in questions] == [f"q{number}" for number in numbers]
    # A window is of the release's rows.
    write_rows(tmp_path / f"test{numbers[-1] if numbers[-1] > 1 else ''}.jsonl", [lcb_row(7, "2023-09-01")])
    if len(numbers) > 1:
        questions, _, _ = read(tmp_path, "livecodebench", file=tmp_path, release=release)
        assert [question.problem for question in questions] == [f"q{number}" for number in numbers[:-1]]


@pytest.mark.parametrize("release", ["v7", "release_v0", "release_v7", "v4_v2", "5", "V5", "release_5", "v1_v2_v3", ""])
def test_a_name_of_no_release_is_told_in_one_line(release):
    with pytest.raises(UserError, match=r"tasks.livecodebench.release: found '.*', expected release_v1 to") as error:
        settings({"livecodebench": {"questions": "d", "release": release}})
    assert "\n" not in str(error.value)


def test_a_release_needs_its_files_and_is_livecodebenchs(tmp_path):
    file = write_rows(tmp_path / "test.jsonl", [lcb_row(1, "2024-09-01")])
    with pytest.raises(UserError, match=r"tasks.livecodebench.release: release_v2 needs .*test2.jsonl, which is not"):
        read(tmp_path, "livecodebench", file=tmp_path, release="release_v2")
    for wrong in (str(file), f"{tmp_path}/test*.jsonl", [str(file)]):
        asked = settings({"livecodebench": {"questions": wrong, "release": "v1"}})
        with pytest.raises(UserError, match=r"tasks.livecodebench.release: it chooses files of the folder"):
            read_questions(asked, "livecodebench", silent)
    with pytest.raises(UserError, match=r"tasks.gsm8k.release: only livecodebench has releases"):
        settings({"gsm8k": {"release": "v1"}})
    named = settings({"code": {"task": "livecodebench", "questions": str(tmp_path), "release": "v1"}})
    assert len(read_questions(named, "code", silent)) == 1


def test_a_run_keeps_tests_packed_until_they_are_judged(tmp_path):
    file = write_rows(tmp_path / "lcb.jsonl", [lcb_row(1, "2024-09-01"), lcb_row(2, "2025-09-01", calls=True)])
    source = SourceSettings.read({"data": str(file), "adapter": "livecodebench"} | WINDOW)
    rows = [row for _, _, row in read_source(source, "domains.code.test", silent)]
    (question,), _, _ = read(tmp_path, "code", rows, adapter="bmjax")
    assert is_packed(question.reference) and question.judge == "tests" and "Read the inputs" in question.prompt


def test_livecodebenchs_rules_are_refused_for_other_tests(tmp_path):
    rows = [{"prompt": "Write f.", "reference": {"tests": ["assert f() == 1"]}}]
    with pytest.raises(UserError, match=r"row 1: lcb_compat: its tests are no inputs with outputs"):
        read(tmp_path, "t", rows, lcb_compat=True)
    tests = {"tests": [{"input": "4", "output": "8"}]}
    for day in ({}, {"contest_date": ""}, {"contest_date": "August 2024"}):  # compute_scores would fail on them
        with pytest.raises(
            UserError, match=r"row 1: lcb_compat: contest_date is .*; LiveCodeBench's tools read a date"
        ):
            read(tmp_path, "t", [{"prompt": "Double.", "reference": tests} | day], lcb_compat=True)


def test_options_are_shuffled_by_seed_problem_and_sample_alone(tmp_path):
    rows = [gpqa_row(n) for n in range(2, 8)]
    questions, samples, _ = read(tmp_path, "gpqa_diamond", rows)
    orders = {(s.question.problem, s.sample): s.order for s in samples}
    assert len(samples) == 24 and len({s.id for s in samples}) == 24 and len(set(orders.values())) > 10
    for sample in samples:
        assert sample.reference["options"] == [sample.question.options[at] for at in sample.order]
        right = "ABCD".index(sample.reference["answer"])
        assert sample.reference["options"][right] == f"{int(sample.question.problem[3:]) ** 2} exactly"
        assert sample.prompt.count("B cells") == 1 and sample.prompt.endswith("your answer within \\boxed{}.")
    # Other rows, and their order, change nothing.
    again = read(tmp_path, "gpqa_diamond", rows[::-1][:3])[1]
    assert {(s.question.problem, s.sample): s.order for s in again}.items() <= orders.items()
    plain = read(tmp_path, "gpqa_diamond", rows, shuffle_options=False)[1]
    assert {s.order for s in plain} == {()} and len({s.prompt for s in plain}) == 6
    with pytest.raises(UserError, match="row 1: shuffle_options: its options are not known"):
        read(tmp_path, "t", [{"prompt": "Q?", "reference": "A"}], shuffle_options=True)
    assert len(questions) == 6


def test_options_that_are_letters_are_not_taken_for_each_other(tmp_path):
    row = {"question": "Which vitamin?", "choices": {"text": ["B", "A", "K", "C"], "label": list("ABCD")}}
    (question,), _, _ = read(tmp_path, "arc_challenge", [row | {"answerKey": "B"}])
    assert question.reference == "B" and question.options == ("B", "A", "K", "C")


def test_repeated_questions_count_twice_and_have_names_of_their_own(tmp_path):
    rows = [{"prompt": "Q?", "reference": "1"}] * 2 + [{"prompt": "R?", "reference": "2"}]
    questions, samples, _ = read(tmp_path, "t", rows)
    assert len({question.problem for question in questions}) == 3 and len({sample.id for sample in samples}) == 3
    assert questions[1].problem == f"{questions[0].problem}-2"
    # A row's own name is kept where it tells the rows apart.
    rows = [{"prompt": "Q?", "reference": "1", "id": n} for n in ("a", "b")]
    assert [question.problem for question in read(tmp_path, "t", rows)[0]] == ["a", "b"]


@pytest.mark.parametrize("name, file, count, judge", [
    ("aime24", "aime/aime24.jsonl", 30, "math"),
    ("aime25", "aime/aime25.jsonl", 30, "math"),
    ("math500", "math500/test.jsonl", 500, "math"),
    ("gsm8k", "gsm8k/test.jsonl", 1319, "math"),
    ("humaneval", "humaneval/HumanEval.jsonl.gz", 164, "tests"),
    ("mbpp", "mbpp/mbpp.jsonl", 974, "tests"),
])  # fmt: skip
def test_the_benchmarks_own_rows_become_questions(tmp_path, name, file, count, judge):
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = path.read_bytes()
    lines = (gzip.decompress(rows) if path.suffix == ".gz" else rows).splitlines()
    questions, samples, _ = read(tmp_path, name, file=path)
    assert len(questions) == len(lines) == count and {question.judge for question in questions} == {judge}
    assert len({question.problem for question in questions}) == count
    assert len({sample.id for sample in samples}) == count * TASKS[name].samples
    assert json.loads(lines[0]) == dict(questions[0].row)


def test_reading_is_silent_where_nothing_is_left_out(tmp_path):
    asked = settings({"t": {"questions": str(write_rows(tmp_path / "q.jsonl", [{"prompt": "Q", "reference": "1"}]))}})
    assert len(read_questions(asked, "t", silent)) == 1
