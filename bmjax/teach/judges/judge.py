"""Is an answer right? Chooses a judge by what the reference is, or by name, and asks it.

Collecting, evaluation and `bmjax.judge` come here. A new judge is a file with `judge(reference, answer)` and a line of
JUDGES. What a domain or a task is called never decides anything.
"""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from bmjax.config import UserError, nearest
from bmjax.errors import missing_package
from bmjax.teach.judges import choice, math, programs, text
from bmjax.teach.judges.answer import Answer, after_reasoning, is_cut
from bmjax.teach.judges.verdict import Verdict

# The judges of answers in words. `tests` stands beside them, for it reads a program from the reply.
_OF_ANSWERS: Mapping[str, Callable[[Any, Answer], Verdict]] = {
    "math": math.judge, "choice": choice.judge, "text": text.judge_text, "exact": text.judge_exact,
}  # fmt: skip
JUDGES = (*_OF_ANSWERS, "tests")

# Modules that a judge imports only where it needs them: without one it would leave answers unjudged.
_MODULES = {"math": ("mpmath", "math_verify"), "choice": ("mpmath",), "tests": ("markdown_it",)}


def judge(
    reference: Any,
    answer: str,
    judge: str | None = None,
    run_programs: bool = False,
    finish_reason: str | None = None,
    program_seconds: float = programs.SECONDS,
) -> Verdict:
    """Judge an answer by its reference.

    Arguments:
        reference: text, a number, {"answer": "B", "options": [...]} or a list of letters for a choice,
            {"tests": [...]} for a program; None or empty when unknown.
        answer: a model's text, with or without its <think> part. There is no answer while a thought is open.
        judge: a name in JUDGES; None: `choose(reference)`.
        run_programs: whether programs, which are a model's output, may run on this machine; else they are unjudged.
        finish_reason: how the generation ended. A text that was cut off ("length") has no answer, for without its end
            nobody knows whether it is still the thought.
        program_seconds: CPU seconds that a test of a program may take, where the reference gives none.

    Returns:
        The verdict: right, wrong, or unjudged where this machine cannot tell.

    Raises:
        UserError: for an unknown judge and a reference of unknown shape. Never for any answer.
        ModuleNotFoundError: for a judge whose packages are not installed.
    """
    shaped = choose(reference)
    name = judge or shaped
    if name not in JUDGES:
        raise UserError(f"judge: no such judge '{name}'{nearest(name, JUDGES)}")
    if shaped == "tests" and name != "tests":
        raise UserError(f"reference: found tests of a program, judge '{name}' expects text")
    if name == "tests" and not run_programs:
        return Verdict("unjudged", "programs run only with run_programs: true", "none")
    if name != "tests" and (reference is None or not str(reference).strip()):
        return Verdict("unjudged", "there is no reference", "none")
    _check_installed(name)
    final = after_reasoning(answer)
    if final is None:
        return Verdict("wrong", "no answer: the thought never ends", signatures(name)[0])
    if is_cut(finish_reason):
        return Verdict("wrong", f"no answer: the text was cut off ({finish_reason})", signatures(name)[0])
    if name == "tests":
        return programs.judge(reference, final, program_seconds)
    return _OF_ANSWERS[name](reference, Answer(final))


@cache
def _check_installed(name: str) -> None:
    for module in _MODULES.get(name, ()):
        if importlib.util.find_spec(module) is None:
            error = ModuleNotFoundError(f"No module named '{module}'", name=module)
            raise ModuleNotFoundError(str(missing_package(error) or error), name=module)


def choose(reference: Any) -> str:
    """Return the name of the judge for a reference, by its shape.

    Tests are a program's, letters and answers among options a choice, a number or mathematical notation mathematics,
    and all else text. UserError for another list or mapping.
    """
    if programs.has_tests(reference):
        programs.check(reference)
        return "tests"
    if choice.is_choice(reference):
        choice.read_key(reference)
        return "choice"
    if isinstance(reference, dict):
        keys = sorted(map(str, reference))[:5]
        raise UserError(f"reference: found keys {keys}, expected text or {{'tests': [...]}} or {{'answer', 'options'}}")
    if isinstance(reference, list | tuple):
        raise UserError("reference: found a list, expected text, {'tests': [...]} or letters of a choice")
    shown = "" if reference is None or isinstance(reference, bool) else str(reference).strip()
    return "math" if math.is_mathematics(shown) else "text"


def signatures(name: str) -> tuple[str, ...]:
    """Return what a judge signs its verdicts with, so that one who keeps verdicts knows whose they are."""
    return math.NAMES if name == "math" else (name,)
