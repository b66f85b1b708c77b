"""Is a response right? Three verdicts: right, wrong, and unjudged when this machine could not tell.

An error of the judge is never counted against the model. Answers are read after the last </think>; a number is
compared exactly, other mathematics by math-verify in a worker process with a time limit, multiple choice by the
last letter, programs by running them against their tests.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

from bmjax.chat.reasoning import answer_of
from bmjax.config import UserError, nearest
from bmjax.teach.judges import programs, symbolic

KINDS = ("math", "choice", "exact", "tests")

_LONGEST_ANSWER = 20_000
_LONGEST_NUMBER = 400
_KIND_OF_DOMAIN = {"math": "math", "science": "choice", "code": "exact"}

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?"
)
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
_LATEX_NOISE = re.compile(r"\\[,!;: ]|\{,\}|\\\$|\$|\\%|%|\\left|\\right|\\text\{[^{}]*\}|\\mathrm\{[^{}]*\}|\s")
_NEEDS_SYMBOLS = re.compile(r"[\\^√π∞]|sqrt|\bpi\b")
_LETTER = re.compile(r"(?<!\d )(?<![\w'’])([A-HJ])(?![\w'’])")
_BARE_LETTER = re.compile(r"\W*([A-Ja-j])\W*")


@dataclass(frozen=True)
class Verdict:
    """`verdict` about a response and the judge that gave it: number, math-verify, choice, exact, tests or none."""

    verdict: Literal["right", "wrong", "unjudged"]
    by: str


def verify(kind: str, reference: Any, response: str, run_programs: bool = False) -> Verdict:
    """The verdict on `response` (with or without its <think> part) against `reference`.

    `kind` is a domain (math, science, code, or any other name) or one of KINDS. A domain decides by what the
    reference is: a program for {"tests": [...]}, a choice for a single letter, mathematics for math and for plain
    numbers, else normalised text. Programs are model output: they run only with `run_programs`, else they are
    unjudged. Never raises for any response text; UserError for a reference of unknown shape.
    """
    kind = kind if kind in KINDS and kind != "math" else kind_of(kind, reference)
    answer = answer_of(response)
    if kind == "tests":
        return _verify_program(reference, answer) if run_programs else Verdict("unjudged", "none")
    reference = "" if reference is None else str(reference).strip()
    if not reference:
        return Verdict("unjudged", "none")
    if len(answer) > _LONGEST_ANSWER:
        answer = answer[-_LONGEST_ANSWER:]
    if kind == "choice":
        expected = choice_letter(reference)
        if expected is None:
            return Verdict("unjudged", "none")
        return _verdict(choice_letter(answer) == expected, "choice")
    if kind == "exact":
        return _verdict(_normalised(answer) == _normalised(reference), "exact")
    return _verify_math(reference, answer)


def kind_of(domain: str, reference: Any) -> str:
    """How a reference of this domain is judged: one of KINDS."""
    if isinstance(reference, dict):
        if "tests" not in reference:
            raise UserError(f"reference: found keys {sorted(reference)[:5]}, expected text or {{'tests': [...]}}")
        return "tests"
    if isinstance(reference, list):
        raise UserError("reference: found a list, expected text or {'tests': [...]}")
    text = "" if reference is None else str(reference).strip()
    if domain == "math":
        return "math"
    if _BARE_LETTER.fullmatch(text):
        return "choice"
    if domain == "code":
        return "exact"
    return "math" if _number(text) is not None else "exact"


def check_kind(kind: str | None) -> None:
    """UserError unless `kind` is None or a known one."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"verify: no such judge '{kind}'{nearest(kind, KINDS)}")


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...}, or None. One pass over the text."""
    open_braces: list[int] = []
    best = (-1, -1)
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            start = open_braces.pop()
            if start > best[0] and text.endswith("\\boxed", 0, start):
                best = (start, brace.start())
    return text[best[0] + 1 : best[1]] if best[0] >= 0 else None


def choice_letter(text: str) -> str | None:
    """The letter a multiple-choice answer names: in the last box, else the last letter that stands alone.

    A letter right after a number is a unit (`12 A`), and `I` counts only when nothing else is written.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        text = re.sub(r"\\[a-z]+", " ", boxed)
    if bare := _BARE_LETTER.fullmatch(text):
        return bare[1].upper()
    letters = _LETTER.findall(text)
    return letters[-1] if letters else None


def _verdict(right: bool, by: str) -> Verdict:
    return Verdict("right" if right else "wrong", by)


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text.strip().strip("`'\""))
    return re.sub(r"\s+", " ", text).strip()


def _number(text: str) -> Fraction | None:
    """The exact value of a text that is one plain number (1,234 · -0.5 · 3e4 · 1/2 · 10% as 10), else None."""
    text = _LATEX_NOISE.sub("", text.replace("−", "-")).rstrip(".")
    if not text or len(text) > _LONGEST_NUMBER or not _PLAIN.fullmatch(text):
        return None
    top, _, bottom = text.replace(",", "").partition("/")
    try:
        value = Fraction(Decimal(top))
        return value / int(bottom) if bottom else value
    except (ValueError, ZeroDivisionError, OverflowError, InvalidOperation):
        return None


def _last_number(text: str) -> Fraction | None:
    numbers = [match for match in _NUMBER.findall(text.replace("−", "-")) if match]
    return _number(numbers[-1]) if numbers else None


def _verify_math(reference: str, answer: str) -> Verdict:
    if "####" in reference:
        reference = reference.rpartition("####")[2].strip()
    reference = last_boxed(reference) or reference
    boxed = last_boxed(answer)
    expected = _number(reference)
    if expected is not None:
        if boxed is not None:
            found = _number(boxed)
            if found is not None:
                return _verdict(found == expected, "number")
        elif not _NEEDS_SYMBOLS.search(answer):
            found = _last_number(answer)
            return _verdict(found is not None and found == expected, "number")
    given = answer if boxed is None else boxed
    if not given or _normalised(given) == _normalised(reference):
        return _verdict(bool(given), "exact")
    try:
        equal = symbolic.equal(reference, answer if boxed is None else f"\\boxed{{{boxed}}}")
    except symbolic.JudgeError:
        return Verdict("unjudged", "math-verify")
    return _verdict(equal, "math-verify")


def _verify_program(reference: Any, answer: str) -> Verdict:
    tests = reference.get("tests") if isinstance(reference, dict) else None
    if not isinstance(tests, list) or not tests:
        return Verdict("unjudged", "none")
    program = programs.last_code_block(answer)
    if program is None:
        return Verdict("wrong", "tests")
    try:
        return _verdict(programs.passes(program, tests), "tests")
    except programs.JudgeError:
        return Verdict("unjudged", "tests")
