import json
import threading
import time
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.teach.judges import symbolic
from bmjax.teach.judges.answer import last_boxed
from bmjax.teach.judges.judge import JUDGES, choose, judge
from bmjax.teach.judges.verdict import JudgeError, Verdict
from bmjax.teach.settings import ProblemSettings


def verify(name: str | None, reference: object, response: str, run_programs: bool = False) -> tuple[str, str]:
    """Return (verdict, judge) of a response by a judge's name, or by the one that the reference chooses."""
    verdict = judge(reference, response, name, run_programs)
    assert verdict.reason and verdict.verdict in ("right", "wrong", "unjudged")
    return verdict.verdict, verdict.judge


CITIES = {"answer": "B", "options": ["Berlin", "Paris", "Rome"]}
GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"


@pytest.mark.parametrize(
    ("name", "reference", "response", "verdict", "by"),
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
        ("math", "2", "5-3", "right", "number"),
        ("math", "30000", "about 3e4", "right", "number"),
        ("math", "42", r"\boxed{41} no, \boxed{42}, said 7 people", "right", "number"),
        ("math", "10", r"$2^{10}$ is not it: \boxed{\text{ 10 } }", "right", "number"),
        ("math", 12, "12", "right", "number"),
        ("math", "Worked out.\n#### 1,200", "The total is $1200", "right", "number"),
        ("math", "5", "", "wrong", "number"),
        ("math", "5", "five", "right", "number"),
        ("math", "", "5", "unjudged", "none"),
        ("math", None, "5", "unjudged", "none"),
        ("math", r"\frac{1}{2}", r"\boxed{0.5}", "right", "number"),
        ("math", "x^2+1", "$1+x^2$", "right", "values"),
        ("math", "x^2+1", "$1-x^2$", "wrong", "values"),
        ("math", r"2\sqrt{3}", r"The result is \boxed{\sqrt{12}}.", "right", "values"),
        ("math", "(1,2)", "(2,1)", "wrong", "number"),
        ("math", "Monday", "Monday", "right", "text"),
        (None, "C", "C", "right", "choice"),
        (None, "C", "c", "right", "choice"),
        (None, "C", "<think>Answer: A</think>First B, but no: (C) 12 A", "right", "choice"),
        (None, "C", r"\boxed{\text{C}}", "right", "choice"),
        (None, "B", "I would say A", "wrong", "choice"),
        (None, "B", "no idea", "wrong", "choice"),
        (None, "12.5", "It is 12.5 m", "right", "number"),
        ("choice", "nothing", "A", "unjudged", "none"),
        ("exact", "14", " 14\n", "right", "exact"),
        ("exact", "[1, 2]", "`[1,  2]`", "right", "exact"),
        ("exact", "True", "true", "wrong", "exact"),
        (None, "Paris", "Paris", "right", "text"),
        (None, "D", "D)", "right", "choice"),
        (None, {"tests": ["assert f() == 1"]}, "```python\ndef f(): return 1\n```", "unjudged", "none"),
    ],
)
def test_verdicts(name: str | None, reference: object, response: str, verdict: str, by: str) -> None:
    assert verify(name, reference, response) == (verdict, by)


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
        ("Paris", "text"),
        ("yes", "text"),
        (True, "text"),
        (r"C:\Users", "text"),
        ("[1, 2]", "math"),
        ("p - q", "math"),
        ("x = 5", "math"),
        ("(3, 4)", "math"),
        ("AC", "choice"),
        (["A", "C"], "choice"),
        ("(B) Paris", "choice"),
        (r"\text{(C)}", "choice"),
        ({"answer": "B", "options": ["x", "y"]}, "choice"),
        ("", "text"),
        (None, "text"),
        ({"tests": []}, "tests"),
    ],
)
def test_the_shape_of_a_reference_chooses_its_judge(reference: object, name: str) -> None:
    assert choose(reference) == name


def test_verdicts_say_why_and_by_which_judge() -> None:
    assert judge("5", "It is 6") == Verdict("wrong", "expected '5', found '6'", "number")
    assert judge(5, "<think>6</think> 5") == Verdict("right", "equals the reference", "number")
    assert judge("", "5") == Verdict("unjudged", "there is no reference", "none")
    assert judge({"tests": ["assert 1"]}, "") == Verdict(
        "unjudged", "programs run only with run_programs: true", "none"
    )
    assert judge("5", "five", judge="exact") == Verdict("wrong", "expected '5', found 'five'", "exact")


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "max_tokens", "error"])
def test_a_text_that_was_cut_off_has_no_answer(finish_reason: str) -> None:
    # A thought that the prompt had opened shows no mark, so that any box may be a guess.
    program = "```python\nprint(2 * int(input()))\n```"
    tests = {"tests": [{"input": "4", "output": "8"}]}
    for reference, answer in [
        ("12", "5 + 7 = 12, so I"), ("12", r"\boxed{12}, for"), ("12", "12"), ("B", "The answer is B. But"),
        ("Paris", "Paris"), (tests, program), ("12", r"<think>a</think> \boxed{12} as"),
    ]:  # fmt: skip
        assert judge(reference, answer, run_programs=True, finish_reason="stop").verdict == "right", answer
        cut = judge(reference, answer, run_programs=True, finish_reason=finish_reason)
        assert cut.verdict == "wrong" and cut.reason == f"no answer: the text was cut off ({finish_reason})"
    assert judge("", "12", finish_reason=finish_reason).verdict == "unjudged"


def test_unknown_judges_and_references_are_one_line() -> None:
    with pytest.raises(UserError, match="judge: no such judge 'maths'; did you mean 'math'"):
        judge("5", "5", judge="maths")
    with pytest.raises(UserError, match="reference: found a list"):
        judge(["5"], "5", judge="exact")
    with pytest.raises(UserError, match="judge 'exact' expects text"):
        judge({"tests": ["assert 1"]}, "5", judge="exact")
    assert judge("5", "```\n1\n```", judge="tests", run_programs=True).verdict == "unjudged"
    assert set(JUDGES) == {"math", "choice", "text", "exact", "tests"}
    with pytest.raises(UserError, match="is none of the options A, B"):
        judge({"answer": "C", "options": ["x", "y"]}, "A")


@pytest.mark.parametrize("name", JUDGES)
def test_settings_know_every_judge_of_the_table(name: str) -> None:
    assert ProblemSettings.read({"judge": name}).judge == name
    with pytest.raises(UserError, match=f"judge: expected .*'{name}'.*, found text 'maths'"):
        ProblemSettings.read({"judge": "maths"})


def test_programs_run_only_when_asked() -> None:
    reference = {"tests": ["assert f(2) == 4", {"input": "", "output": "hi"}]}
    good = "<think>hm</think>Here:\n```python\ndef f(x):\n    return x * x\nprint('hi')\n```\n"
    assert verify(None, reference, good, run_programs=True) == ("right", "tests")
    assert verify(None, reference, good.replace("x * x", "x"), run_programs=True) == ("wrong", "tests")
    assert verify(None, reference, "no program", run_programs=True) == ("wrong", "tests")
    with pytest.raises(UserError, match="tests: found int '3', expected asserts"):
        verify(None, {"tests": [3]}, good, run_programs=True)
    assert verify(None, {"tests": []}, good, run_programs=True) == ("unjudged", "none")


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
        "the answer is " * 20_000,
        "\\boxed{1} and " * 20_000,
        "\\boxed{10^{10^{10^{10}}}}",
        "\\boxed{" + "(" * 3_000 + "1" + ")" * 3_000 + "}",
        "\\boxed{" + "\\frac{1}{" * 500 + "1" + "}" * 501,
        "\\boxed{" + "1,2," * 900 + "}",
        "\\boxed{" + "1\\pm " * 300 + "}",
        "\\boxed{" + "x" * 3_900 + "}",
        "\\boxed{" + "\\text{" * 200 + "}" * 201,
        "\\boxed{" + "9" * 3_000 + "!}",
        "**" * 30_000 + "a" * 10_000,
        "$" * 50_000,
        "$5 " * 50_000,
        "answer" + " " * 19_000 + ":",
        "A, " * 50_000,
        "(A" * 50_000,
        "<answer>" * 20_000,
        "No" + ", no" * 50_000,
        "x" * 1_000_000 + " answer is 5",
        "答案" * 50_000,
    ],
)
def test_hostile_text_neither_crashes_nor_hangs(text: str) -> None:
    begun = time.process_time()
    for reference in ("5", "A", "yes", r"\sqrt{2}", "x+1", CITIES, {"tests": ["assert 0"]}):
        assert verify(None, reference, text, run_programs=True)[0] in ("right", "wrong", "unjudged")
    assert time.process_time() - begun < 30


def test_an_endless_comparison_is_killed_alone() -> None:
    with pytest.raises(JudgeError):
        symbolic.equal("9", r"\boxed{9^{9^{9^{9}}}}", seconds=1.0)
    assert symbolic.equal("1+x", "$x+1$")


def test_mathematics_is_judged_off_the_main_thread() -> None:
    verdicts: list[tuple[str, str]] = []
    limit = (r"\int_0^1 2x\,dx", r"\boxed{\int_0^1 2x\,dx + 0}")
    threads = [threading.Thread(target=lambda: verdicts.append(verify("math", *limit))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [("right", "math-verify")] * 8


def test_boxes_and_letters() -> None:
    assert last_boxed(r"\boxed{a{b}c} {x} \boxed{unclosed") == "a{b}c"
    assert last_boxed("none } {") is None
    with pytest.raises(UserError, match="test: found int"):
        choose({"test": 1})


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K file is not part of the repository")
def test_gsm8k_solutions_are_right_and_a_neighbour_is_wrong() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    for row in rows:
        answer = row["answer"].rpartition("#### ")[2]
        assert verify("math", row["answer"], f"<think>1 2 3</think>So the answer is {answer}.")[0] == "right", row
        off = str(int(answer.replace(",", "")) + 1)
        assert verify("math", row["answer"], off)[0] == "wrong", row
