"""The real files of known data sets beside the checkout: every row is a problem, or is said to be none."""

import ast
import gzip
import json
from pathlib import Path

import pytest

from bmjax.teach.problems import Problem, read_problems
from bmjax.teach.settings import ProblemSettings

BESIDE = (parent / "shared" / "data" for parent in Path(__file__).resolve().parents)
DATA = next((folder for folder in BESIDE if folder.is_dir()), Path("absent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside this checkout")


def rows_of(name: str) -> list[dict]:
    file = DATA / name
    if file.suffix == ".json":
        return json.loads(file.read_text())
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


def read(name: str, adapter: str) -> tuple[list[Problem], list[str]]:
    lines: list[str] = []
    settings = ProblemSettings(adapter=adapter)
    return list(read_problems(str(DATA / name), "problems", settings, lines.append)), lines


@pytest.mark.parametrize(("name", "count"), [("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319)])
def test_gsm8k(name, count):
    problems, lines = read(name, "gsm8k")
    assert len(problems) == count and not lines
    for row, problem in zip(rows_of(name), problems, strict=True):
        assert problem.prompt.startswith(row["question"].strip())
        assert row["answer"].splitlines()[-1] == f"#### {problem.reference}"


@pytest.mark.parametrize("name", ["math500/test.jsonl", "math_train/rllm_data_train_math_math.json"])
def test_mathematics(name):
    problems, lines = read(name, "auto")
    answered = [row for row in rows_of(name) if row["answer"]]
    assert len(problems) == len(answered) >= 500
    assert all(p.reference == str(row["answer"]).strip() for row, p in zip(answered, problems, strict=True))
    without = len(rows_of(name)) - len(answered)
    assert lines[1:] == ([f"problems: {without} of 7,474 rows make no problem: no answer {without}"] if without else [])


@pytest.mark.parametrize("name", ["aime/aime24.jsonl", "aime/aime25.jsonl"])
def test_aime(name):
    problems, _ = read(name, "auto")
    assert [(p.prompt, p.reference) for p in problems] == [(row["prompt"], str(row["answer"])) for row in rows_of(name)]
    assert len(problems) == 30


def test_humaneval():
    problems, _ = read("humaneval/HumanEval.jsonl.gz", "auto")
    assert len(problems) == 164
    for row, problem in zip(rows_of("humaneval/HumanEval.jsonl.gz"), problems, strict=True):
        (tests,) = problem.reference["tests"]
        assert row["test"].strip() in tests and tests.endswith(f"check({row['entry_point']})")
        ast.parse(tests)
        assert row["prompt"].strip() in problem.prompt


def test_mbpp():
    problems, _ = read("mbpp/mbpp.jsonl", "auto")
    assert len(problems) == 974
    for row, problem in zip(rows_of("mbpp/mbpp.jsonl"), problems, strict=True):
        joined = "\n".join(problem.reference["tests"])
        assert joined == "\n".join([*filter(None, [row["test_setup_code"].strip()]), *row["test_list"]])


@pytest.mark.parametrize(
    ("name", "count"), [("rllm_data_test_code_code_contests.json", 165), ("rllm_data_test_code_codeforces.json", 408)]
)
@pytest.mark.parametrize("adapter", ["auto", "code_contests", "codeforces"])
def test_contests(name, count, adapter):
    problems, lines = read(f"code_contests/{name}", adapter)
    assert len(problems) == count and len(lines) == (adapter == "auto")
    for row, problem in zip(rows_of(f"code_contests/{name}"), problems, strict=True):
        tests = row["tests"]
        if isinstance(tests, dict):
            tests = [{"input": a, "output": b} for a, b in zip(tests["inputs"], tests["outputs"], strict=True)]
        assert problem.reference["tests"] == tests and problem.judge == "tests"
        assert problem.prompt.startswith(row["problem"].strip())


@pytest.mark.parametrize(("subject", "count"), [("physics", 200), ("chemistry", 207), ("biology", 210)])
def test_gaokao(subject, count):
    name = f"agieval_science/gaokao-{subject}.jsonl"
    problems, _ = read(name, "auto")
    assert len(problems) == count
    for row, problem in zip(rows_of(name), problems, strict=True):
        assert problem.reference == "".join(row["label"]) and problem.judge == "choice"
        options = [line for line in problem.prompt.splitlines() if line[:4] in ("(A) ", "(B) ", "(C) ", "(D) ")]
        assert [line[1] for line in options] == ["A", "B", "C", "D"]
