import json
import threading
import time
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.teach.judges import symbolic
from bmjax.teach.judges.choice import choice_letter
from bmjax.teach.judges.judge import JUDGES, choose, judge
from bmjax.teach.judges.verdict import JudgeError, Verdict, last_boxed
from bmjax.teach.settings import ProblemSettings


def verify(domain: str, reference: object, response: str, run_programs: bool = False) -> tuple[str, str]:
    """(verdict, judge) of a response in a domain; "choice" is the judge's name."""
    name = domain if domain == "choice" else choose(reference, domain)
    verdict = judge(reference, response, name, run_programs)
    assert verdict.reason and verdict.verdict in ("right", "wrong", "unjudged")
    return verdict.verdict, verdict.judge


GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"


@pytest.mark.parametrize(
    ("kind", "reference", "response", "verdict", "by"),
    [
        ("math", "12", "<think>\n3\n</think>\n12", "right", "number"),
        ("math", "3", "<think>\n3\n</think>\n12", "wrong", "number"),
        ("math", "12", "<think>a</think>13 <think>b</think>\nThe answer is 12.", "right", "number"),
        ("math", "1234", "so it is 1,234.", "right", "number"),
        ("math", "1234", r"\boxed{1{,}234}", "right", "number"),
        ("math", "34", "3,4", "wrong", "number"),
        ("math", "0.5", "1/2", "right", "number"),
        ("math", "1/3", "0.333", "wrong", "number"),
        ("math", "0.1", "0.10000000000000000001", "wrong", "number"),
        ("math", "-3", "x = −3", "right", "number"),
        ("math", "3", "5-3", "right", "number"),
        ("math", "30000", "about 3e4", "right", "number"),
        ("math", "42", r"\boxed{41} no, \boxed{42}, said 7 people", "right", "number"),
        ("math", "10", r"$2^{10}$ is not it: \boxed{\text{ 10 } }", "right", "math-verify"),
        ("math", 12, "12", "right", "number"),
        ("math", "Worked out.\n#### 1,200", "The total is $1200", "right", "number"),
        ("math", "5", "", "wrong", "number"),
        ("math", "5", "five", "wrong", "number"),
        ("math", "", "5", "unjudged", "none"),
        ("math", None, "5", "unjudged", "none"),
        ("math", r"\frac{1}{2}", r"\boxed{0.5}", "right", "math-verify"),
        ("math", "x^2+1", "$1+x^2$", "right", "math-verify"),
        ("math", "x^2+1", "$1-x^2$", "wrong", "math-verify"),
        ("math", r"2\sqrt{3}", r"The result is \boxed{\sqrt{12}}.", "right", "math-verify"),
        ("math", "(1,2)", "(2,1)", "wrong", "math-verify"),
        ("math", "Monday", "Monday", "right", "exact"),
        ("science", "C", "C", "right", "choice"),
        ("science", "C", "c", "right", "choice"),
        ("science", "C", "<think>Answer: A</think>First B, but no: (C) 12 A", "right", "choice"),
        ("science", "C", r"\boxed{\text{C}}", "right", "choice"),
        ("science", "B", "I would say A", "wrong", "choice"),
        ("science", "B", "no idea", "wrong", "choice"),
        ("science", "12.5", "It is 12.5 m", "right", "number"),
        ("choice", "nothing", "A", "unjudged", "none"),
        ("code", "14", " 14\n", "right", "exact"),
        ("code", "[1, 2]", "`[1,  2]`", "right", "exact"),
        ("code", "True", "true", "wrong", "exact"),
        ("law", "Paris", "Paris", "right", "exact"),
        ("law", "D", "D)", "right", "choice"),
        ("code", {"tests": ["assert f() == 1"]}, "```python\ndef f(): return 1\n```", "unjudged", "none"),
    ],
)
def test_verdicts(kind: str, reference: object, response: str, verdict: str, by: str) -> None:
    actual, judged_by = verify(kind, reference, response)
    assert actual == verdict
    assert judged_by == by or {judged_by, by} == {"number", "exact"}


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("12", "math"),
        (12.5, "math"),
        ("1,200", "math"),
        (r"\frac{1}{2}", "math"),
        ("Worked out.\n#### 1,200", "math"),
        (r"So it is \boxed{x}", "math"),
        ("x^2 + 1", "math"),
        ("C", "choice"),
        ("(d)", "choice"),
        ("Paris", "exact"),
        (r"C:\Users", "exact"),
        ("[1, 2]", "exact"),
        ("", "exact"),
        (None, "exact"),
        ({"tests": []}, "tests"),
    ],
)
def test_the_shape_of_a_reference_chooses_its_judge(reference: object, name: str) -> None:
    assert choose(reference) == name
    assert choose(reference, "any domain") == name


def test_verdicts_say_why_and_by_which_judge() -> None:
    assert judge("5", "It is 6") == Verdict("wrong", "expected '5', found '6'", "number")
    assert judge(5, "<think>6</think> 5") == Verdict("right", "equals the reference", "number")
    assert judge("", "5") == Verdict("unjudged", "there is no reference", "none")
    assert judge({"tests": ["assert 1"]}, "") == Verdict(
        "unjudged", "programs run only with run_programs: true", "none"
    )
    assert judge("5", "five", judge="exact") == Verdict("wrong", "expected '5', found 'five'", "exact")


def test_a_cut_answer_counts_only_where_it_is_named() -> None:
    assert judge("12", "5 + 7 = 12, so I", finish_reason="length").verdict == "wrong"
    assert judge("12", "5 + 7 = 12, so I", finish_reason="stop").verdict == "right"
    assert judge("12", r"\boxed{12}, for", finish_reason="length").verdict == "right"
    assert judge("B", "Not B, as", finish_reason="length").verdict == "wrong"
    assert judge("12", "12", finish_reason="length").verdict == "right"
    assert judge("", "12", finish_reason="length").verdict == "unjudged"


def test_unknown_judges_and_references_are_one_line() -> None:
    with pytest.raises(UserError, match="judge: no such judge 'maths'; did you mean 'math'"):
        judge("5", "5", judge="maths")
    with pytest.raises(UserError, match="reference: found a list"):
        judge(["5"], "5", judge="exact")
    with pytest.raises(UserError, match="judge 'exact' expects text"):
        judge({"tests": ["assert 1"]}, "5", judge="exact")
    assert judge("5", "```\n1\n```", judge="tests", run_programs=True).verdict == "unjudged"
    assert set(JUDGES) == {"math", "choice", "exact", "tests"}


@pytest.mark.parametrize("name", JUDGES)
def test_settings_know_every_judge_of_the_table(name: str) -> None:
    assert ProblemSettings.read({"judge": name}).judge == name
    with pytest.raises(UserError, match=f"judge: expected .*'{name}'.*, found text 'maths'"):
        ProblemSettings.read({"judge": "maths"})


def test_programs_run_only_when_asked() -> None:
    reference = {"tests": ["assert f(2) == 4", {"input": "", "output": "hi"}]}
    good = "<think>hm</think>Here:\n```python\ndef f(x):\n    return x * x\nprint('hi')\n```\n"
    assert verify("code", reference, good, run_programs=True) == ("right", "tests")
    assert verify("code", reference, good.replace("x * x", "x"), run_programs=True) == ("wrong", "tests")
    assert verify("code", reference, "no program", run_programs=True) == ("wrong", "tests")
    assert verify("code", {"tests": [3]}, good, run_programs=True) == ("unjudged", "tests")
    assert verify("code", {"tests": []}, good, run_programs=True) == ("unjudged", "none")


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 30_000,
        "\\boxed{" + "{" * 50_000 + "}" * 49_999,
        "</think>" * 10_000,
        "9" * 1_000_000,
        "1," * 200_000,
        "1e999999 7e999",
        "-" * 100_000 + "5/0",
        "\ud800 \x00 ٥ ²",
        "A" * 500_000,
        "```" * 50_000,
    ],
)
def test_hostile_text_neither_crashes_nor_hangs(text: str) -> None:
    for kind, reference in (("math", "5"), ("science", "A"), ("code", "5"), ("code", {"tests": ["assert 0"]})):
        begun = time.monotonic()
        assert verify(kind, reference, text, run_programs=True)[0] in ("right", "wrong", "unjudged")
        assert time.monotonic() - begun < 15


def test_an_endless_comparison_is_killed_alone() -> None:
    with pytest.raises(JudgeError):
        symbolic.equal("9", r"\boxed{9^{9^{9^{9}}}}", seconds=1.0)
    assert symbolic.equal("1+x", "$x+1$")


def test_mathematics_is_judged_off_the_main_thread() -> None:
    verdicts: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: verdicts.append(verify("math", r"\frac{2}{4}", r"\boxed{\frac12}")))
    thread.start()
    thread.join()
    assert verdicts == [("right", "math-verify")]


def test_boxes_and_letters() -> None:
    assert last_boxed(r"\boxed{a{b}c} {x} \boxed{unclosed") == "a{b}c"
    assert last_boxed("none } {") is None
    assert choice_letter("I") == "I"
    assert choose("C", "math") == "math"
    with pytest.raises(UserError, match="tests"):
        choose({"test": 1}, "code")


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K file is not part of the repository")
def test_gsm8k_solutions_are_right_and_a_neighbour_is_wrong() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    for row in rows:
        answer = row["answer"].rpartition("#### ")[2]
        assert verify("math", row["answer"], f"<think>1 2 3</think>So the answer is {answer}.")[0] == "right", row
        off = str(int(answer.replace(",", "")) + 1)
        assert verify("math", row["answer"], off)[0] == "wrong", row
