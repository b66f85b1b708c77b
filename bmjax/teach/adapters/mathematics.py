"""Rows of mathematics, and of science with an answer in a box: the question, and the final answer as reference."""

import re
from typing import Any

from bmjax.teach.adapters.adapter import LeftOut, Row, question_of, text_of
from bmjax.teach.judges.answer import last_boxed

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

LONGEST_ANSWER = 60  # characters of a solution that is nothing but the answer

# NuminaMath writes these words where a problem has no final answer.
_NO_ANSWER = {"", "notfound", "not found", "none", "null", "nan", "n/a"}
_EMPTY_BOX = re.compile(r"\\boxed\{\s*\}")
# The marks of a first and a second part, at the start of a line or of a sentence: a) b), (i) (ii), (1) (2).
_PARTS = [
    [re.compile(rf"(?:^[\W\d]{{0,8}}|[.;:?]\W{{1,4}}){mark}\)\**\s", re.MULTILINE) for mark in marks]
    for marks in (("a", "b"), (r"\(i", r"\(ii"), (r"\(1", r"\(2"))
]
_LETTER = re.compile(r"\W*(?:\\(?:text|textbf|mathrm)\W*)?[A-Ja-j]\W*")


def instruction(row: Row) -> str:
    """Return the instruction of DeepSeek-R1's model card for mathematics."""
    return BOXED


def gsm8k_reference(row: Row) -> str:
    """Return what follows the last `####` of the worked solution."""
    _, mark, answer = text_of(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise LeftOut("no answer")
    return answer.strip()


def problem(row: Row) -> str:
    """Return the question of a row of mathematics."""
    return question_of(row, "problem", "Problem", "question", "prompt")


def answer(row: Row) -> str:
    """Return the final answer: the column, else the last box of the solution, else a solution that is hardly more."""
    stated = text_of(row, "answer", "Answer", "expected_answer")
    if stated.lower() == "proof" or text_of(row, "question_type").lower() == "proof":
        raise LeftOut("a proof")
    if stated.lower() not in _NO_ANSWER:
        return stated
    solution = text_of(row, "solution", "Solution")
    if _EMPTY_BOX.search(solution):  # which stands for the end of a proof
        raise LeftOut("a proof")
    if (boxed := last_boxed(solution)) is not None:
        return boxed.strip()
    if not solution or len(solution) > LONGEST_ANSWER or "\n" in solution or solution.lower() in _NO_ANSWER:
        raise LeftOut("no answer")
    return solution


def competition_problem(row: Row) -> str:
    """Return the question of NuminaMath and OpenR1-Math. LeftOut for invalid rows and those of several parts."""
    question = problem(row)
    for column in ("problem_is_valid", "solution_is_valid"):
        if text_of(row, column) not in ("", "Yes"):
            raise LeftOut("marked as not valid")
    stated = text_of(row, "answer") or last_boxed(text_of(row, "solution")) or ""
    is_choice = text_of(row, "question_type") == "MCQ" or _LETTER.fullmatch(stated)
    if not is_choice and any(all(mark.search(question) for mark in marks) for marks in _PARTS):
        raise LeftOut("several parts")
    return question


def competition_judge(row: Row) -> str | None:
    """Return the judge that the question's type names: `B` is a variable in one question, an option in another."""
    if text_of(row, "question_type") != "MCQ":
        return "math" if "question_type" in row else None
    return "choice" if _LETTER.fullmatch(text_of(row, "answer")) else None


def as_mathematics(row: Row) -> str:
    """Return the name of the judge of mathematics."""
    return "math"


def verl_prompt(row: Row) -> str:
    """Return the last user turn of a prompt in the form of verl, a list of messages."""
    turns = row["prompt"]
    users = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    if not users or any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in turns):
        raise LeftOut("several turns" if users else "no question")
    return question_of(users[-1], "content")


def verl_reference(row: Row) -> Any:
    """Return `reward_model.ground_truth`."""
    reference = row["reward_model"].get("ground_truth")
    if reference is None or not str(reference).strip():
        raise LeftOut("no answer")
    return reference
