"""Is an answer right? Chooses a judge by what the reference is, or by name, and asks it.

Collecting, evaluation and `bmjax.judge` come here. A new judge is a file with `judge(reference, answer)` and a line of
JUDGES.
"""

from collections.abc import Callable, Mapping
from typing import Any

from bmjax.chat.reasoning import answer_of
from bmjax.config import UserError, nearest
from bmjax.teach.judges import choice, exact, math, programs
from bmjax.teach.judges.verdict import Verdict, last_boxed

JUDGES: Mapping[str, Callable[[Any, str], Verdict]] = {
    "math": math.judge, "choice": choice.judge, "exact": exact.judge, "tests": programs.judge,
}  # fmt: skip

# Domains whose references look like those of another judge: `C` in mathematics is no choice, `14` printed by a program
# is text. This is the only place where a domain's or a task's name decides anything.
_JUDGE_OF_DOMAIN = {"math": "math", "code": "exact"}
_LONGEST_ANSWER = 20_000  # characters; judges read the end


def judge(
    reference: Any, answer: str, judge: str | None = None, run_programs: bool = False, finish_reason: str | None = None
) -> Verdict:
    """Judge an answer by its reference.

    Arguments:
        reference: text, a number, or {"tests": [...]} for a program; None or empty when unknown.
        answer: a model's text, with or without its <think> part.
        judge: a name in JUDGES; None: `choose(reference)`.
        run_programs: whether programs, which are a model's output, may run on this machine; else they are unjudged.
        finish_reason: how the generation ended. One that was cut off ("length") has named its answer only in a box or
            as a whole: its last number or letter is no answer.

    Returns:
        The verdict: right, wrong, or unjudged where this machine cannot tell.

    Raises:
        UserError: for an unknown judge and a reference of unknown shape. Never for any answer.
    """
    shaped = choose(reference)
    name = judge or shaped
    if name not in JUDGES:
        raise UserError(f"judge: no such judge '{name}'{nearest(name, list(JUDGES))}")
    final = answer_of(answer)
    if name == "tests" and not run_programs:
        return Verdict("unjudged", "programs run only with run_programs: true", "none")
    if name == "tests":
        return programs.judge(reference, final)
    if shaped == "tests":
        raise UserError(f"reference: found tests of a program, judge '{name}' expects text")
    if reference is None or not str(reference).strip():
        return Verdict("unjudged", "there is no reference", "none")
    final = final[-_LONGEST_ANSWER:]
    verdict = JUDGES[name](reference, final)
    named = last_boxed(final) is not None or exact.judge(reference, final).verdict == "right"
    if finish_reason == "length" and verdict.verdict == "right" and not named:
        return Verdict("wrong", "cut off before it named its answer", verdict.judge)
    return verdict


def choose(reference: Any, domain: str = "") -> str:
    """Return the name of the judge for a reference: by its shape, and for some domains by their name.

    {"tests": [...]} is a program's, a single letter a choice, a number or mathematical notation mathematics, and all
    else exact text. UserError for a list, and a mapping without tests.
    """
    if isinstance(reference, dict):
        if "tests" not in reference:
            raise UserError(f"reference: found keys {sorted(reference)[:5]}, expected text or {{'tests': [...]}}")
        return "tests"
    if isinstance(reference, list):
        raise UserError("reference: found a list, expected text or {'tests': [...]}")
    text = "" if reference is None else str(reference).strip()
    by_domain = _JUDGE_OF_DOMAIN.get(domain)
    if by_domain != "math" and choice.is_letter(text):
        return "choice"
    return by_domain or ("math" if math.is_mathematics(text) else "exact")
