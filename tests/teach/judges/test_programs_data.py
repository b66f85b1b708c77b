"""HumanEval, MBPP and contest problems: solutions are right, mutants are wrong. Needs the data beside the checkout."""

# ruff: noqa: E501  programs stay as they are

import ast
import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bmjax.teach.judges.programs import check, judge

DATA = Path(__file__).parents[4] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets are not part of the repository")

# A solution that ends early, six ways: {0} is the program with a wrong answer.
EXITS = {
    "exits at import": "{0}\nimport sys\nif __name__ != 'x': sys.exit(0)",
    "ends at import": "import os\n{0}\nos._exit(0)",
    "raises at import": "{0}\nraise SystemExit",
    "quits at import": "{0}\nquit()",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\n{0}",
    "exits in the function": "import os\n{1}",
}


def human_eval() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(id, reference, solution) of every problem."""
    with gzip.open(DATA / "humaneval/HumanEval.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            reference = {key: row[key] for key in ("test", "entry_point", "prompt")}
            yield row["task_id"], reference, row["prompt"] + row["canonical_solution"]


def mbpp() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(id, reference, solution) of every problem."""
    with (DATA / "mbpp/mbpp.jsonl").open() as file:
        for row in map(json.loads, file):
            yield f"MBPP/{row['task_id']}", {key: row[key] for key in ("test_list", "test_setup_code")}, row["code"]


def with_bodies(source: str, body: str) -> str:
    """Return a program all of whose functions do nothing but `body`."""
    tree = ast.parse(source.replace("\r\n", "\n"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(body).body
    return ast.unparse(tree)


def verdicts(cases: list[tuple[str, Any, str]]) -> dict[str, str]:
    def of(case: tuple[str, Any, str]) -> str:
        check(case[1])
        verdict = judge(case[1], f"So:\n```python\n{case[2]}\n```\n")
        return verdict.verdict if verdict.verdict != "unjudged" else verdict.reason

    with ThreadPoolExecutor(8) as pool:
        return dict(zip([name for name, _, _ in cases], pool.map(of, cases), strict=True))


def assert_judged(problems: list[tuple[str, dict[str, Any], str]]) -> None:
    rights = verdicts(problems)
    assert {name: verdict for name, verdict in rights.items() if verdict != "right"} == {}
    mutants = []
    for number, (name, reference, solution) in enumerate(problems):
        nothing = with_bodies(solution, "return object()")
        mutants.append((f"{name} returns nothing of use", reference, nothing))
        # Every problem gets one way to exit, all ways are had in turn.
        way = list(EXITS)[number % len(EXITS)]
        mutants.append((f"{name} {way}", reference, EXITS[way].format(nothing, with_bodies(solution, "os._exit(0)"))))
    wrongs = verdicts(mutants)
    assert {name: verdict for name, verdict in wrongs.items() if verdict != "wrong"} == {}


@needs_data
def test_some_solutions_are_right_and_their_mutants_wrong() -> None:
    assert_judged([*human_eval()][::24] + [*mbpp()][::120])


@needs_data
@pytest.mark.slow
def test_all_solutions_of_humaneval_are_right_and_their_mutants_wrong() -> None:
    problems = [*human_eval()]
    assert len(problems) == 164
    assert_judged(problems)


@needs_data
@pytest.mark.slow
def test_all_solutions_of_mbpp_are_right_and_their_mutants_wrong() -> None:
    problems = [*mbpp()]
    assert len(problems) == 974
    assert_judged(problems)


def contest_tests() -> list[Any]:
    files = sorted((DATA / "code_contests").glob("*.json"))
    return [row["tests"] for file in files for row in json.loads(file.read_text())]


# Programs that look their answer up, and read stdin in one of the ways in which contest solutions do.
READS = {
    "input()": "lines = []\ntry:\n    while True: lines.append(input())\nexcept EOFError: pass\ntext = '\\n'.join(lines)",
    "sys.stdin": "import sys\ntext = ''.join(line for line in sys.stdin)",
    "sys.stdin.buffer": "import sys\ntext = sys.stdin.buffer.read().decode()",
    "open(0)": "text = open(0).read()",
    "os.read(0)": "import os\nparts = []\nwhile part := os.read(0, 65536): parts.append(part)\ntext = b''.join(parts).decode()",
}
MAINS = {
    "straight": "print(ANSWERS[key(text)])",
    "main guard": "if __name__ == '__main__':\n    print(ANSWERS[key(text)])",
    "sys.exit": "import sys\nprint(ANSWERS[key(text)])\nsys.exit(0)",
    "globals": "result = None\ndef solve():\n    global result\n    result = ANSWERS[key(text)]\nsolve()\nprint(result)",
    "threads": "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(2**27)\n"
    "thread = threading.Thread(target=lambda: print(ANSWERS[key(text)]))\nthread.start()\nthread.join()",
}


def lookup_program(tests: Any, number: int) -> str:
    """Return a right program for tests in either shape of the data; reading and ending differ with the number."""
    pairs = (
        [(test["input"], test["output"]) for test in tests]
        if isinstance(tests, list)
        else [*zip(tests["inputs"], tests["outputs"], strict=True)]
    )
    answers = {" ".join(text.split()): output for text, output in pairs}
    read, main = list(READS.values())[number % 5], list(MAINS.values())[number // 5 % 5]
    return f"ANSWERS = {answers!r}\ndef key(text): return ' '.join(text.split())\n{read}\n{main}"


@needs_data
def test_all_contest_problems_load() -> None:
    tests = contest_tests()
    assert len(tests) == 573
    for number, suite in enumerate(tests):
        check(suite)
        check({"tests": suite})
        check(json.dumps(suite) if number % 2 else {"tests": json.dumps(suite)})


def assert_contests(tests: list[Any]) -> None:
    cases = [(str(number), suite, lookup_program(suite, number)) for number, suite in enumerate(tests)]
    assert {name: verdict for name, verdict in verdicts(cases).items() if verdict != "right"} == {}
    wrong = [(name, suite, program.replace("print(ANSWERS", "print(7, ANSWERS")) for name, suite, program in cases]
    wrong = [case for case in wrong if "print(7" in case[2]]
    assert {name: verdict for name, verdict in verdicts(wrong).items() if verdict != "wrong"} == {}


@needs_data
def test_some_contest_programs_are_right_and_their_mutants_wrong() -> None:
    assert_contests([suite for suite in contest_tests() if len(suite) < 3][::20])


@needs_data
@pytest.mark.slow
def test_all_contest_programs_are_right_and_their_mutants_wrong() -> None:
    assert_contests(contest_tests())
