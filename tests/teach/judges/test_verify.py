import json
import threading
import time
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.teach.judges import symbolic
from bmjax.teach.judges.verify import Verdict, choice_letter, kind_of, last_boxed, verify

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
    found = verify(kind, reference, response)
    assert found.verdict == verdict
    assert found.by == by or {found.by, by} == {"number", "exact"}


def test_programs_run_only_when_asked() -> None:
    reference = {"tests": ["assert f(2) == 4", {"input": "", "output": "hi"}]}
    good = "<think>hm</think>Here:\n```python\ndef f(x):\n    return x * x\nprint('hi')\n```\n"
    assert verify("code", reference, good, run_programs=True) == Verdict("right", "tests")
    assert verify("code", reference, good.replace("x * x", "x"), run_programs=True) == Verdict("wrong", "tests")
    assert verify("code", reference, "no program", run_programs=True) == Verdict("wrong", "tests")
    assert verify("code", {"tests": [3]}, good, run_programs=True) == Verdict("unjudged", "tests")
    assert verify("code", {"tests": []}, good, run_programs=True) == Verdict("unjudged", "none")


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
        assert verify(kind, reference, text, run_programs=True).verdict in ("right", "wrong", "unjudged")
        assert time.monotonic() - begun < 15


def test_an_endless_comparison_is_killed_and_the_next_one_is_judged() -> None:
    with pytest.raises(symbolic.JudgeError):
        symbolic.equal("9", r"\boxed{9^{9^{9^{9}}}}", seconds=1.0)
    assert symbolic.equal("1+x", "$x+1$")


def test_mathematics_is_judged_off_the_main_thread() -> None:
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(verify("math", r"\frac{2}{4}", r"\boxed{\frac12}")))
    thread.start()
    thread.join()
    assert verdicts == [Verdict("right", "math-verify")]


def test_pieces() -> None:
    assert last_boxed(r"\boxed{a{b}c} {x} \boxed{unclosed") == "a{b}c"
    assert last_boxed("none } {") is None
    assert choice_letter("I") == "I"
    assert kind_of("math", "C") == "math"
    with pytest.raises(UserError, match="tests"):
        kind_of("code", {"test": 1})


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K file is not part of the repository")
def test_gsm8k_solutions_are_right_and_a_neighbour_is_wrong() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    for row in rows:
        answer = row["answer"].rpartition("#### ")[2]
        assert verify("math", row["answer"], f"<think>1 2 3</think>So the answer is {answer}.").verdict == "right", row
        off = str(int(answer.replace(",", "")) + 1)
        assert verify("math", row["answer"], off).verdict == "wrong", row
