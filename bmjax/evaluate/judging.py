"""Judges the answers to samples by teach's judges, whoever generated them, and says which answers are the same one."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bmjax.chat.replies import UNREADABLE
from bmjax.config import first_line
from bmjax.evaluate.livecodebench_form import judge_as_livecodebench
from bmjax.evaluate.questions import Asked
from bmjax.evaluate.settings import EvalSettings
from bmjax.teach import judges
from bmjax.teach.adapters.livecodebench import unpacked
from bmjax.teach.judges import choice, math
from bmjax.teach.judges.answer import Answer, after_reasoning, is_cut
from bmjax.teach.judges.expressions import names
from bmjax.teach.judges.judge import judge
from bmjax.teach.judges.values import Quantity, read
from bmjax.teach.judges.verdict import Verdict

OVER_CONTEXT = "over_context"  # the finish reason of a prompt that the model cannot read, which nobody answered


@lru_cache(maxsize=1)
def judges_version() -> str:
    """Return a hash of the judges' own source, so that verdicts of other judges are known as such."""
    folder = Path(judges.__path__[0])
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def judged_by(asked: Asked, settings: EvalSettings, lcb_compat: bool) -> str:
    """Return a hash of all that decides the verdict on an answer beside the answer."""
    limits = [settings.run_programs, settings.program_seconds] if asked.question.judge == "tests" else []
    reference = json.dumps(asked.reference, sort_keys=True, default=str)
    text = json.dumps([judges_version(), asked.question.judge, reference, limits, lcb_compat])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def judge_answer(
    asked: Asked, text: str, finish_reason: str, settings: EvalSettings, lcb_compat: bool
) -> dict[str, Any]:
    """Return the fields of a sample that its judge decides.

    Arguments:
        asked: the sample.
        text: the answer with its thought.
        finish_reason: as the engine or the endpoint says it.
        settings: of the evaluation.
        lcb_compat: whether LiveCodeBench's own verdict is wanted, too.

    Returns:
        verdict, verdict_by, reason, judged (`judged_by`) and, where it was wanted, lcb: true, false or null.
    """
    fields: dict[str, Any] = {"judged": judged_by(asked, settings, lcb_compat)}
    if finish_reason == OVER_CONTEXT:
        verdict = Verdict("wrong", "the prompt is longer than the model's context", "none")
        return fields | _of(verdict) | ({"lcb": False} if lcb_compat else {})
    if finish_reason == UNREADABLE:
        return fields | _of(Verdict("unjudged", "the endpoint's reply is no answer", "none"))
    try:
        reference = unpacked(asked.reference)
        name, seconds = asked.question.judge, settings.program_seconds
        verdict = judge(reference, text, name, settings.run_programs, finish_reason, seconds)
        if lcb_compat and settings.run_programs:
            fields["lcb"] = judge_as_livecodebench(reference, text, seconds)
    except Exception as error:  # an error of a judge is none of the model
        reason = f"the judge failed: {type(error).__name__}: {first_line(error)}"
        verdict = Verdict("unjudged", reason, "none")
    return fields | _of(verdict)


def _of(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.verdict, "verdict_by": verdict.judge, "reason": verdict.reason}


def votes(samples: Sequence[Asked], answers: Sequence[tuple[str, str]]) -> list[int | None]:
    """Return, for the samples of one problem, the number of the answer that each gave; None for one that gave none.

    Answers are the same where the problem's judge takes one for the other: 1/2 and 0.5 are, and letters stand for their
    options, whatever the order in which a sample saw them. Programs have no such judge: each is an answer of its own.

    Arguments:
        samples: of one problem.
        answers: (text, finish reason) of each.
    """
    groups: list[Any] = []
    numbers: list[int | None] = []
    for asked, (text, finish_reason) in zip(samples, answers, strict=True):
        value = _stated(asked, text, finish_reason)
        if value is None:
            numbers.append(None)
            continue
        same = (n for n, other in enumerate(groups) if other == value or _same(asked.question.judge, other, value))
        number = next(same, len(groups))
        if number == len(groups):
            groups.append(value)
        numbers.append(number)
    return numbers


def _stated(asked: Asked, text: str, finish_reason: str) -> Any:
    """Return the answer that a text states, as its judge reads it; None where it states none."""
    final = None if is_cut(finish_reason) else after_reasoning(text)
    if final is None:
        return None
    answer = Answer(final)
    name = asked.question.judge
    if name == "choice":
        key = choice.read_key(asked.reference)
        letters = None if key is None else choice.stated_letters(answer, key)
        if letters is None:
            return None
        # The letter stands for another option in every order.
        return frozenset(asked.order["ABCDEFGHIJ".index(letter)] for letter in letters) if asked.order else letters
    if name == "math":
        expected = read(math.expected_value(str(asked.reference)))
        numeric = any(isinstance(value, Quantity) and not names(value.tree) for value in expected)
        return math.stated_value(answer, numeric)
    if name in ("text", "exact"):
        statements = answer.statements
        return statements[0].text if statements else (final or None)
    return final or None


def _same(name: str, value: Any, other: Any) -> bool:
    """Return whether the judge of that name takes an answer for another one."""
    if not (isinstance(value, str) and isinstance(other, str)) or name == "tests":
        return False
    return judge(value, f"\\boxed{{{other}}}", name).verdict == "right"
