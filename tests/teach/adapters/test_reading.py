"""A row of every known data set, in its real shape and our own words, becomes the problem that a person would make."""

import base64
import json
import pickle
import zlib
from datetime import date, datetime
from typing import get_args

import pytest

from bmjax.config import UserError
from bmjax.teach.adapters.reading import adapted, matching, within
from bmjax.teach.adapters.table import ADAPTERS, AUTO
from bmjax.teach.judges.judge import JUDGES, judge
from bmjax.teach.problems import read_problems
from bmjax.teach.settings import AdapterName, CollectSettings, JudgeName, ProblemSettings
from tests.conftest import write_rows

GPQA = {
    "Question": "Which of these is a gas at 300 K?", "Correct Answer": "neon", "Incorrect Answer 1": "iron",
    "Incorrect Answer 2": "gold", "Incorrect Answer 3": "lead", "Subdomain": "Chemistry (general)",
    "High-level domain": "Chemistry", "Record ID": "r1",
}  # fmt: skip
STDIO = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
CALLS = json.dumps({"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"})
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7\n"}]
CODEFORCES = {
    "id": "1/A", "description": "Add two numbers.", "input_format": "Two integers.", "output_format": "Their sum.",
    "examples": [{"input": "1 2", "output": "3"}], "official_tests": PAIRS, "time_limit": 1.0, "note": None,
    "interaction_format": None, "input_mode": "stdio", "generated_checker": None, "contest_name": "Round 1",
}  # fmt: skip
CONTEST = {
    "name": "1_A. Sum", "description": "Add two numbers.", "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["3 4\n"], "output": ["7\n"]}, "generated_tests": {"input": [], "output": []},
    "time_limit": {"seconds": 3, "nanos": 500_000_000}, "source": 2, "input_file": "", "output_file": "",
}  # fmt: skip
NUMINA = {
    "problem": "What is 2 + 3?", "solution": "It is $\\boxed{5}$.", "answer": "5", "problem_type": "Algebra",
    "question_type": "math-word-problem", "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "olympiads",
    "synthetic": False,
}  # fmt: skip
AGIEVAL = {
    "passage": None, "question": "下列数中为偶数的是", "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": ["B", "D"],
    "answer": None, "other": {"source": "2021"},
}  # fmt: skip
OPENTHOUGHTS = {
    "problem": "What is 2 + 3?", "deepseek_reasoning": "Two and three.", "deepseek_solution": "\\boxed{5}",
    "ground_truth_solution": "Adding gives \\boxed{5}.", "domain": "math", "source": "numina", "test_cases": None,
    "starter_code": None,
}  # fmt: skip
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(PAIRS[1:])))).decode()
LIVECODEBENCH = {
    "question_title": "Sum", "question_content": "Add two numbers.", "platform": "atcoder", "question_id": "abc1_a",
    "contest_date": "2024-09-01T00:00:00", "starter_code": "", "difficulty": "easy", "metadata": "{}",
    "public_test_cases": json.dumps(PAIRS[:1]), "private_test_cases": PACKED,
}  # fmt: skip

# adapter: (row, reference, judge)
ROWS = {
    "bmjax": ({"prompt": "2 + 3?", "reference": "5", "judge": "math"}, "5", "math"),
    "openthoughts": (OPENTHOUGHTS, "5", None),
    "openr1_math": (NUMINA | {"generations": ["<think>a</think>5"], "correctness_math_verify": [True]}, "5", "math"),
    "gpqa": (GPQA, None, "choice"),
    "agieval": (AGIEVAL, "BD", "choice"),
    "arc": ({"id": "1", "question": "A gas?", "choices": {"text": ["iron", "neon"], "label": ["1", "2"]},
             "answerKey": "2"}, "B", "choice"),
    "mmlu_pro": ({"question": "A gas?", "options": ["iron", "lead", "tin", "neon", "N/A"], "answer": "D",
                  "answer_index": 3, "category": "chemistry", "src": "x", "question_id": 1}, "D", "choice"),
    "mmlu": ({"question": "A gas?", "subject": "chemistry", "choices": ["iron", "lead", "neon", "tin"], "answer": 2},
             "C", "choice"),
    "humaneval": ({"task_id": "T/0", "prompt": "import math\n\ndef half(x):\n    \"\"\"Halve.\"\"\"\n",
                   "entry_point": "half", "canonical_solution": "    return x / 2\n",
                   "test": "def check(candidate):\n    assert candidate(math.pi) == math.pi / 2\n"},
                  {"tests": ["import math\ndef check(candidate):\n    assert candidate(math.pi) == math.pi / 2\n"
                             "check(half)"]}, "tests"),
    "mbpp": ({"task_id": 1, "text": "Write a function to add.", "code": "def add(a, b): return a + b",
              "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "challenge_test_list": []},
             {"tests": ["assert add(1, 2) == 3"]}, "tests"),
    "taco": ({"question": "Add two numbers.", "input_output": CALLS, "raw_tags": "[]", "starter_code":
              "class Solution:", "solutions": "[]", "picture_num": "0", "time_limit": None},
             {"tests": {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}}, "tests"),
    "apps": ({"problem_id": 0, "question": "Add two numbers.", "input_output": STDIO, "solutions": "[]",
              "starter_code": "", "difficulty": "interview", "url": "https://x"}, {"tests": PAIRS}, "tests"),
    "livecodebench": (LIVECODEBENCH, {"livecodebench": {"public": json.dumps(PAIRS[:1]), "private": PACKED,
                                                       "fn_name": None}}, "tests"),
    "code_contests": (CONTEST, {"tests": PAIRS, "seconds": 10.5}, "tests"),
    "codeforces": (CODEFORCES, {"tests": PAIRS}, "tests"),
    "verl": ({"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "data_source": "dapo", "ability": "MATH",
              "reward_model": {"ground_truth": "5", "style": "rule"}}, "5", None),
    "s1k": ({"question": "What is 2 + 3?", "solution": "5", "cot_type": "math", "source_type": "aime",
             "metadata": "{}", "attempt": "5", "thinking_trajectories": ["t"]}, "5", None),
    "limo": ({"question": "What is 2 + 3?", "solution": "So \\boxed{5}", "answer": "5"}, "5", "math"),
    "gsm8k": ({"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, "1,005", "math"),
    "numina_math": ({"source": "cn_k12", "problem": "What is 2 + 3?", "solution": "So $\\boxed{\\frac{10}{2}}$.",
                     "messages": []}, "\\frac{10}{2}", None),
    "aime": ({"prompt": "What is 2 + 3?", "answer": 5}, "5", "math"),
    "math": ({"problem": "What is 2 + 3?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{5}$."}, "5",
             "math"),
}  # fmt: skip


def problems(rows, name, **options):
    """(problems, lines of the log) of rows."""
    lines = []
    located = ((f"rows, row {number}", row) for number, row in enumerate(rows, 1))
    return [p for _, _, p in adapted(located, name, "problems", log=lines.append, **options)], lines


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_row_of_every_data_set_becomes_its_problem(name):
    row, reference, judge = ROWS[name]
    (problem,), lines = problems([row], name)
    assert problem["judge"] == judge and (judge is None or judge in JUDGES) and not lines
    assert problem["prompt"].strip() and problem["question"] in problem["prompt"]
    if reference is not None:
        assert problem["reference"] == reference


@pytest.mark.parametrize("name", ADAPTERS)
def test_auto_recognises_it_and_says_so(name):
    (problem,), (line,) = problems([ROWS[name][0]], "auto")
    assert line == f"rows, row 1: adapter: {name}, recognised by its columns"
    assert problem == problems([ROWS[name][0]], name)[0][0]


def test_auto_names_the_form_of_every_file_and_refuses_what_it_does_not_know():
    gsm8k = ROWS["gsm8k"][0]
    rows = [gsm8k, gsm8k | {"id": 1}, gsm8k | {"answer": "five"}, ROWS["limo"][0], ROWS["math"][0], NUMINA]
    found, lines = problems(rows, "auto")
    assert len(found) == 5 and lines[4:] == ["problems: 1 of 6 rows make no problem: no answer 1"]
    assert [line.split(" ")[4] for line in lines[:4]] == ["gsm8k,", "limo,", "math,", "numina_math,"]
    with pytest.raises(UserError, match=r"row 1: no adapter knows a row with columns q, a; give `prompt`"):
        problems([{"q": "2 + 3?", "a": "5"}], "auto")


def test_a_wrong_adapter_names_the_right_one():
    with pytest.raises(UserError, match=r"'gsm8k' expects the columns question, answer, found .*'numina_math'"):
        problems([NUMINA], "gsm8k")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("numina_math", {"answer": "proof"}, "a proof"),
        ("numina_math", {"question_type": "proof"}, "a proof"),
        ("numina_math", {"answer": None, "solution": "Hence. $\\boxed{}$"}, "a proof"),
        ("numina_math", {"answer": "notfound", "solution": "We see it at once.\nIt is five."}, "no answer"),
        ("numina_math", {"answer": "", "solution": None}, "no answer"),
        ("numina_math", {"problem_is_valid": "Incomplete"}, "marked as not valid"),
        ("numina_math", {"solution_is_valid": "Problem not solved"}, "marked as not valid"),
        ("numina_math", {"problem": "See ![](https://cdn.mathpix.com/a.jpg?x=1). What is AB?"}, "an image"),
        ("openr1_math", {"problem": "See <image>. What is AB?"}, "an image"),
        ("numina_math", {"problem": "a) What is 2 + 3?\nb) What is 3 + 4?"}, "several parts"),
        ("numina_math", {"problem": "Let x = 1.\n(a) Find 2x.\n(b) Find 3x."}, "several parts"),
        ("numina_math", {"problem": "Let x = 1. (1) Find 2x; (2) find 3x."}, "several parts"),
        ("openr1_math", {"problem": "Let x = 1.\n**(i)** Find 2x.\n**(ii)** Find 3x."}, "several parts"),
        ("numina_math", {"problem": "10.1 a) Find 2x.\nb) Find 3x."}, "several parts"),
        ("numina_math", {"problem": " "}, "no question"),
        ("gsm8k", {"answer": "It is five."}, "no answer"),
        ("gsm8k", {"answer": "2 + 3 = 5\n####"}, "no answer"),
        ("arc", {"answerKey": ""}, "no answer"),
        ("mmlu", {"answer": -1}, "no answer"),
        ("mmlu", {"choices": []}, "no options"),
        ("mmlu_pro", {"answer": "J"}, "no answer"),
        ("gpqa", {"Correct Answer": None}, "no answer"),
        ("agieval", {"label": None, "answer": "12"}, "no answer"),
        ("mbpp", {"test_list": []}, "no tests"),
        ("humaneval", {"test": ""}, "no tests"),
        ("apps", {"input_output": ""}, "no tests"),
        ("apps", {"input_output": "{'inputs': []}"}, "tests that cannot be read"),
        ("apps", {"input_output": "1" * 5000}, "tests that cannot be read"),
        ("apps", {"input_output": json.dumps({"inputs": ["1"], "outputs": []})}, "tests that cannot be read"),
        ("taco", {"picture_num": "2"}, "an image"),
        ("codeforces", {"interaction_format": "You may ask."}, "interactive"),
        ("codeforces", {"input_mode": "file"}, "reads a file"),
        ("codeforces", {"generated_checker": "#include <x>\nint main() {"}, "a checker that is no Python program"),
        ("codeforces", {"official_tests": []}, "no tests"),
        ("code_contests", {"input_file": "in.txt"}, "reads a file"),
        ("openthoughts", {"ground_truth_solution": "A long story\nwithout a box."}, "no answer"),
        ("verl", {"reward_model": {"ground_truth": ""}}, "no answer"),
        ("s1k", {"solution": "First we see that. " * 10}, "no answer"),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_problem_is_counted_by_its_reason(name, changes, reason):
    row = NUMINA if name == "numina_math" else ROWS[name][0]
    found, lines = problems([row, row | changes, row], name)
    assert len(found) == 2 and lines == [f"problems: 1 of 3 rows make no problem: {reason} 1"]
    with pytest.raises(UserError, match=f"none of 1 rows makes a problem \\({reason}\\)"):
        problems([row | changes], name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mbpp", {"test_list": "assert add(1, 2) == 3"}), ("mmlu", {"choices": "iron, lead"}),
     ("codeforces", {"examples": ["1 2"]}), ("verl", {"reward_model": "5"}), ("arc", {"choices": 3}),
     ("code_contests", {"time_limit": {"seconds": "soon"}})],
)  # fmt: skip
def test_a_row_with_other_contents_is_an_error_that_names_it(name, changes):
    with pytest.raises(UserError, match=f"^rows, row 2: not a row for adapter '{name}': "):
        problems([ROWS[name][0], ROWS[name][0] | changes], name)


def test_reasons_are_counted_in_one_line():
    rows = [NUMINA, NUMINA | {"answer": "proof"}, NUMINA | {"answer": "Proof"}, NUMINA | {"problem": "<image>"}]
    assert problems(rows, "numina_math")[1] == ["problems: 3 of 4 rows make no problem: a proof 2, an image 1"]


def test_the_type_of_a_question_names_its_judge():
    choice = NUMINA | {"question_type": "MCQ", "answer": "B", "problem": "Which?\na) 1\nb) 5"}
    value, untyped = choice | {"answer": "5"}, {k: v for k, v in choice.items() if k != "question_type"}
    boxed = {"source": "amc", "problem": untyped["problem"], "solution": "So \\boxed{\\textbf{(B)}}."}
    judges = [p["judge"] for p in problems([NUMINA, choice, value, untyped, boxed], "numina_math")[0]]
    assert judges == ["math", "choice", None, None, None]


@pytest.mark.parametrize(
    "question",
    ["Solve x + y = 1 (1) and x - y = 3 (2).", "Let f(a) = 2 and f(b) = 3. Find f.", "Take A, B and C with (a, b) = 1.",
     "Which is right?\n(A) one\n(B) two", "There are (i) and maybe (ii) ways."],
)  # fmt: skip
def test_marks_of_other_things_are_no_parts(question):
    assert problems([NUMINA | {"problem": question}], "numina_math")[0][0]["question"] == question


def test_gpqa_has_the_same_order_in_every_run_and_the_letter_of_the_right_option():
    rows = [GPQA | {"Question": f"Which of these is gas number {n}?"} for n in range(400)]
    first, second = problems(rows, "gpqa")[0], problems(reversed(rows), "gpqa")[0][::-1]
    assert first == second
    for problem in first:
        lines = dict(line.split(") ", 1) for line in problem["prompt"].splitlines() if line.startswith("("))
        assert sorted(lines.values()) == ["gold", "iron", "lead", "neon"]
        assert lines[f"({problem['reference']}"] == "neon"
    letters = [problem["reference"] for problem in first]
    assert all(60 < letters.count(letter) < 140 for letter in "ABCD")


def test_agieval_asks_in_chinese_and_writes_the_letters_once():
    (problem,), _ = problems([AGIEVAL | {"passage": "甲"}], "agieval")
    lines = problem["prompt"].splitlines()
    assert lines[:7] == ["甲", "", "下列数中为偶数的是", "", "(A) 1", "(B) 2", "(C) 3"] and "字母" in lines[-1]
    cloze = {"passage": None, "question": "1 + 1 = ?", "options": None, "label": None, "answer": "2"}
    hub = {"query": "Q: A gas? Answer Choices: (A)iron (B)neon", "choices": ["(A)iron", "(B)neon"], "gold": [1]}
    found, _ = problems([cloze, hub], "agieval")
    assert [(p["reference"], p["judge"]) for p in found] == [("2", "math"), ("B", "choice")]
    assert found[1]["prompt"].startswith(hub["query"] + "\n\n")


def test_options_by_letters_and_answers_as_text():
    row = {"question": "A gas?", "options": {"A": "iron", "B": "neon"}, "answer": "neon", "answer_idx": "B"}
    table = {"question": "A gas?", "choices": '["iron", "neon"]', "answer": "1"}
    for values in (row, table):
        (problem,), _ = problems([values], "auto")
        assert problem["reference"] == "B" and "(A) iron\n(B) neon" in problem["prompt"]


def test_setups_run_before_the_asserts_that_need_them():
    row = ROWS["mbpp"][0] | {"test_setup_code": "one = 1", "test_imports": ["import math"]}
    assert problems([row], "mbpp")[0][0]["reference"] == {"tests": ["import math\none = 1\nassert add(1, 2) == 3"]}


def test_an_answer_may_leave_out_the_helpers_of_a_prompt():
    prompt = "def double(x):\n    return 2 * x\n\n\ndef halve(x):\n    '''Undo double.'''\n"
    test = "def check(candidate):\n    assert candidate(double(3)) == 3\n"
    row = ROWS["humaneval"][0] | {"prompt": prompt, "test": test, "entry_point": "halve"}
    (tests,) = problems([row], "humaneval")[0][0]["reference"]["tests"]
    exec("def halve(x):\n    return x / 2\n" + tests, {})
    with pytest.raises(AssertionError):
        exec("def halve(x):\n    return x\n" + tests, {})


@pytest.mark.parametrize(
    "tests",
    [
        PAIRS,
        json.dumps(PAIRS),
        {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]},
        STDIO,
        [pair | {"testtype": "stdin_stdout", "metadata": {"func_name": None}} for pair in PAIRS],
        [pair | {"type": "stdin_stdout", "fn_name": None} for pair in PAIRS],
    ],
)
def test_forms_of_tests_become_pairs(tests):
    (problem,), _ = problems([{"problem": "Add two numbers.", "tests": tests}], "code_contests")
    assert problem["reference"] == {"tests": PAIRS}


def test_calls_keep_the_name_of_their_function():
    tests = [{"input": "[1, 2]", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
    (problem,), _ = problems([{"problem": "Add.", "tests": tests, "starter_code": "class Solution:"}], "code_contests")
    assert problem["reference"] == {"tests": {"inputs": ["[1, 2]"], "outputs": ["3"], "fn_name": "add"}}
    assert "class Solution:" in problem["prompt"] and "standard input" not in problem["prompt"]


def test_instructions_are_added_once_replaced_or_left_out():
    row = ROWS["gsm8k"][0]
    (problem,), _ = problems([row], "gsm8k")
    assert problem["prompt"] == (
        "What is 2 + 3?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    asked = row | {"question": "What is 2 + 3? Write it in \\boxed{}."}
    assert problems([asked], "gsm8k")[0][0]["prompt"] == asked["question"]
    assert problems([row], "gsm8k", instruction="")[0][0]["prompt"] == "What is 2 + 3?"
    assert problems([row], "gsm8k", instruction="Briefly.")[0][0]["prompt"] == "What is 2 + 3?\n\nBriefly."


def read(tmp_path, rows, settings_class=ProblemSettings, **keys):
    file, lines = write_rows(tmp_path / "rows.jsonl", rows), []
    return list(read_problems(str(file), "problems", settings_class(**keys), lines.append)), lines


def test_templates_win_over_the_adapter(tmp_path):
    row = ROWS["gsm8k"][0]
    (problem,), _ = read(tmp_path, [row], adapter="gsm8k", prompt="Say: {question}")
    assert (problem.prompt, problem.reference) == ("Say: What is 2 + 3?", "1,005")
    (problem,), _ = read(tmp_path, [row | {"hint": "7"}], adapter="gsm8k", reference="{hint}")
    assert problem.reference == "7" and problem.prompt.endswith("\\boxed{}.")
    found, lines = read(tmp_path, [{"question": "2 + 3?", "answer": "five"}], adapter="gsm8k", reference="")
    assert found[0].reference is None and not lines


def test_collect_takes_the_adapter_where_its_templates_are_defaults(tmp_path):
    keys = {"problems": "unused", "output": "unused", "domain": "sums"}
    (problem,), _ = read(tmp_path, [NUMINA | {"answer": "6"}], CollectSettings, adapter="numina_math", **keys)
    assert (problem.reference, problem.judge, problem.source) == ("6", "math", "olympiads")
    assert problem.question == "What is 2 + 3?"


def test_the_limit_counts_problems(tmp_path):
    found, _ = read(tmp_path, [NUMINA | {"answer": "proof"}, NUMINA, NUMINA, NUMINA], adapter="auto", limit=2)
    assert [problem.location.rpartition(", ")[2] for problem in found] == ["row 2", "row 3"]


def test_only_keeps_rows_by_their_fields(tmp_path):
    rows = [NUMINA | {"source": source, "n": n} for n, source in enumerate(["olympiads", "cn_k12", "amc_aime"])]
    found, lines = read(tmp_path, rows, adapter="numina_math", only={"source": ["olympiads", "amc_aime"]})
    assert [problem.source for problem in found] == ["olympiads", "amc_aime"]
    assert lines == ["problems: 1 of 3 rows left out by 'only'"]
    assert len(read(tmp_path, rows, adapter="numina_math", only={"n": 1})[0]) == 1
    with pytest.raises(UserError, match=r"row 1: only: the row has no field 'sourc'; did you mean 'source'"):
        read(tmp_path, rows, adapter="numina_math", only={"sourc": "olympiads"})
    with pytest.raises(UserError, match=r"none of 1 rows matches only: \{'a': 2\}"):
        list(matching([("row 1", {"a": 1})], {"a": 2}, "problems"))


def test_an_instruction_without_an_adapters_prompt_is_refused():
    for keys in ({}, {"adapter": "gsm8k", "prompt": "{question}"}):
        with pytest.raises(UserError, match="instruction: it follows the prompt of an adapter; write it into"):
            ProblemSettings.read({"instruction": "Briefly."} | keys)


def test_an_unknown_adapter_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"adapter: expected .*'gsm8k'.*found text 'gsm9k'"):
        ProblemSettings.read({"adapter": "gsm9k"})


def test_the_names_in_settings_are_those_of_the_tables():
    assert get_args(AdapterName) == (AUTO, *ADAPTERS)
    assert get_args(JudgeName) == JUDGES


def test_a_problem_with_many_right_outputs_is_judged_by_its_checker():
    checker = "import sys\nprint(int(sorted(open(sys.argv[3]).read().split()) == ['1', '2']))"
    found, _ = problems([ROWS["codeforces"][0] | {"generated_checker": checker}], "codeforces")
    assert found[0]["reference"]["checker"] == checker
    for printed, verdict in (("2 1", "right"), ("2 2", "wrong")):
        reference = found[0]["reference"] | {"tests": [{"input": "", "output": "1 2"}]}
        assert judge(reference, f"```python\nprint('{printed}')\n```", run_programs=True).verdict == verdict


@pytest.mark.parametrize("between, expected", [
    ({"day": ("2024-08-01", "2025-02-01")}, ["a", "b", "c"]),  # the last day is in it, whatever the hour
    ({"day": ("2024-08-02", "2024-12-31")}, ["b"]),
    ({"rating": (800, 1200)}, ["a", "b"]),
    ({"rating": (800.0, 1200.0), "day": ("2024-12-01", "2024-12-31")}, ["b"]),
])  # fmt: skip
def test_rows_within_ranges_of_numbers_and_of_dates(between, expected):
    days = ["2024-08-01T10:00:00", date(2024, 12, 31), datetime(2025, 2, 1, 23, 59), "2025-02-02"]
    rows = [
        ("row", {"name": name, "day": day, "rating": rating})
        for name, day, rating in zip("abcd", days, (800, "1200", 1201, 3000), strict=True)
    ]
    lines = []
    assert [row["name"] for _, row in within(rows, between, "problems", lines.append)] == expected
    assert lines == [f"problems: {4 - len(expected)} of 4 rows left out by 'between'"]


@pytest.mark.parametrize("between, problem", [
    ({"day": ("2026", "2027")}, r"problems: none of 1 rows lies in between: day \[2026, 2027\]"),
    ({"year": (1, 2)}, "row 1: between: field 'year' is missing or no number"),
    ({"name": ("a", "b")}, "row 1: between: field 'name' is missing or no text"),
])  # fmt: skip
def test_a_range_that_fits_no_row_is_said(between, problem):
    with pytest.raises(UserError, match=problem):
        list(within([("row 1", {"day": "2024-08-01"})], between, "problems"))
