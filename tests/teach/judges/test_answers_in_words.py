"""Answers in words, in other notations, and answers that are ruled out, with the verdict that a person gives."""

from typing import Any

import pytest

from bmjax.teach.judges.judge import judge

NONE = {"answer": "D", "options": ["red", "green", "blue", "None of the above"]}
CASES = r"\begin{cases} x & x>0 \\ 0 & x \le 0\end{cases}"

ROWS: list[tuple[Any, str, bool]] = [
    # What is ruled out, or one of two, is no answer.
    ("12", "The answer is not 12.", False),
    ("12", "The answer isn't 12.", False),
    ("12", "Not 12.", False),
    ("12", "The answer is not 11, it is 12.", True),
    ("12", "The answer is not 13 but 12.", True),
    ("12", "It is 12 people (not 13).", True),
    ("160", "The total time is 160 minutes (2 hours and 40 minutes).", True),
    ("40", "The total time is 160 minutes (2 hours and 40 minutes).", False),
    ("(3,4)", "The point is (3, 4)", True),
    ("24", "24 is the final answer, found in 3 steps.", True),
    ("3", "24 is the final answer, found in 3 steps.", False),
    ("C", "Answer: not C", False),
    ("C", "Option C is incorrect.", False),
    ("B", "The answer is either A or B.", False),
    ("A", "The answer is A or maybe B.", False),
    ("B", "I'd pick B over A.", True),
    ("C", "A) is wrong. B) is wrong. C) fits. D) is wrong.", True),
    ("D", "A) is wrong. B) is wrong. C) fits. D) is wrong.", False),
    ("Paris", '{"answer": "Paris", "sure": true}', True),
    ("Paris", '{"answer": "Rome", "instead of": "Paris"}', False),
    (NONE, "none of these", True),
    (NONE, "red", False),
    (["A", "B", "D"], "bda", True),
    (["A", "B", "D"], "bd", False),
    ("D", "The answer is D: both A and C are true.", True),
    (["A", "C"], "The answer is D: both A and C are true.", False),
    ("18", "The value we want is 18, which is less than 20.", True),
    ("12", "<THINK>12", False),
    ("C", "Neither B nor C is correct; A is.", False),
    ("B", "The wrong answer is B.", False),
    ("7", "The answer is 8. Hmm, actually 7.", True),
    ("8", "The answer is 8. Hmm, actually 7.", False),
    ("8", "The answer is 8. Actually, there are 3 ways to see it.", True),
    ("7", "The answer is 7 because 7*2=14.", True),
    ("14", "The answer is 7 because 7*2=14.", False),
    ("7", "7x", False),
    ("7", "x^7", False),
    # Numbers in words.
    ("-3", "negative 3", True),
    ("3", "minus 3", False),
    ("2500000", "2.5 million", True),
    ("2.5 million", "2,500,000", True),
    ("2.5", "2.5 million", False),
    ("12", r"\boxed{\text{twelve}}", True),
    ("20", "The answer is twenty five.", False),
    ("5", r"\boxed{\mbox{5 apples}}", True),
    # Units, times of day, dates, ratios.
    (r"1.6\times 10^{-19}", "1.60 × 10^-19 C", True),
    (r"1.6\times 10^{-19}", "1.70 × 10^-19 C", False),
    ("25 °C", "25 degrees Celsius", True),
    ("25 °C", "25 °F", False),
    ("1 h 30 min", "90 min", True),
    ("5 feet 4 inches", "5'4\"", True),
    ("5 feet 4 inches", "5'5\"", False),
    ("9 a.m.", "9:00 AM", True),
    ("9 a.m.", "9:00 PM", False),
    ("15:30", "3:30 PM", True),
    ("2024-01-05", "January 5, 2024", True),
    ("2024-01-05", "2018", False),
    ("05/01/2021", "5/1/2021", True),
    ("July 4, 1776", "The fourth is 4 July 1776", True),
    ("July 4, 1776", "July 5, 1776", False),
    ("June 20", "June 20th", True),
    ("2:3", "2 to 3", True),
    ("2:3", "3 to 2", False),
    ("1/2", "1 : 2", True),
    ("204", "Final answer: 204 minutes = 3.4 hours", True),
    ("3.4", "Final answer: 204 minutes = 3.4 hours", True),
    ("3.5", "Final answer: 204 minutes = 3.4 hours", False),
    ("3e8", "3 x 10^8", True),
    (r"\sqrt{2}", "1.41421356237", True),
    (r"\sqrt{2}", "1.41421356238", False),
    # Notations.
    (r"\frac{7}{3}", r"\frac{7}{3} \approx 2.33", True),
    (r"\frac{7}{3}", r"\frac{8}{3} \approx 2.33", False),
    ("[0,1)", "[0, 1[", True),
    ("[0,1)", "]0, 1[", False),
    ("(-1,1)", "|x|<1", True),
    ("(-1,1)", r"|x| \le 1", False),
    (r"\{x \mid x > 2\}", r"(2,\infty)", True),
    (r"\{x \mid x > 2\}", r"[2,\infty)", False),
    (r"\mathbb{R}", "all real numbers", True),
    (r"\infty", "infinity", True),
    (r"-\infty", "infinity", False),
    (CASES, CASES.replace(r"\le", r"\leq"), True),
    (CASES, r"\begin{cases} -x & x>0 \\ 0 & x \le 0\end{cases}", False),
    ("x=1, y=2", r"\begin{cases} x=1 \\ y=2 \end{cases}", True),
    ("H_2O", "H₂O", True),
    ("DNE", "does not exist", True),
    # Text inside its sentence.
    ("George Washington", "The first president was George Washington, who served from 1789.", True),
    ("George Washington", "The first president was not George Washington, who served from 1789.", False),
    ("Tuesday", "The answer is: on Tuesday.", True),
    ("12", "Die endgültige Antwort ist 12. Schritt 3 war schwer.", True),
]


@pytest.mark.parametrize(("reference", "answer", "right"), ROWS)
def test_a_verdict_is_a_persons(reference: Any, answer: str, right: bool) -> None:
    verdict = judge(reference, answer)
    assert verdict.verdict == ("right" if right else "wrong"), verdict


SQUARE = {
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n",
    "entry_point": "square",
    "prompt": 'def square(x):\n    """Return the square."""\n',
}
CODE = "def square(x):\n    return x * x"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return x * x", True),
        ("    y = x * x\n    return y", True),
        ("```python\ny = x * x\nreturn y\n```", True),
        ("    return x + x", False),
        ("Sorry.", False),
        (f"[PYTHON]\n{CODE}\n[/PYTHON]", True),
        (f"<code>\n{CODE}\n</code>", True),
        (f"\\begin{{verbatim}}\n{CODE}\n\\end{{verbatim}}", True),
        ("So:\n\n    def square(x):\n        return x * x\n", True),
        ("So:\n\n    def square(x):\n        return x\n", False),
    ],
)
def test_code_in_other_markup_and_a_body_are_programs(answer: str, right: bool) -> None:
    verdict = judge(SQUARE, answer, run_programs=True)
    assert verdict.verdict == ("right" if right else "wrong"), verdict
