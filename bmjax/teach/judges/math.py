"""Judges mathematics: numbers exactly, all else by math-verify in a worker process."""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from bmjax.teach.judges import symbolic
from bmjax.teach.judges.exact import normalise
from bmjax.teach.judges.verdict import JudgeError, Verdict, compare, last_boxed

_LONGEST_NUMBER = 400

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?"
)
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
_LATEX_NOISE = re.compile(r"\\[,!;: ]|\{,\}|\\\$|\$|\\%|%|\\left|\\right|\\text\{[^{}]*\}|\\mathrm\{[^{}]*\}|\s")
_NEEDS_SYMBOLS = re.compile(r"[\\^√π∞]|sqrt|\bpi\b")
_NOTATION = re.compile(r"####|\\(?:boxed|d?frac|sqrt|pi|infty|cdot|times|pm|left|log|ln|sin|cos|tan)\b|[\w)}]\^[\w({]")


def judge(reference: object, answer: str) -> Verdict:
    """Compare the boxed answer, else the last number, else the whole answer with the reference.

    A reference may be a worked solution: what follows `####` (GSM8K) or stands in the last \\boxed{...} counts.
    """
    text = str(reference).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    text = last_boxed(text) or text
    boxed = last_boxed(answer)

    # Numbers are compared exactly, without math-verify, which rounds.
    expected = number_of(text)
    if expected is not None:
        if boxed is not None:
            number = number_of(boxed)
            if number is not None:
                return compare(number == expected, text, boxed, "number")
        elif not _NEEDS_SYMBOLS.search(answer):
            last = next(reversed(_NUMBER.findall(answer.replace("−", "-"))), None)
            return compare(last is not None and number_of(last) == expected, text, last, "number")

    final = answer if boxed is None else boxed
    if not final or normalise(final) == normalise(text):
        return compare(bool(final), text, final, "exact")
    try:
        equal = symbolic.equal(text, answer if boxed is None else f"\\boxed{{{boxed}}}")
    except JudgeError as error:
        return Verdict("unjudged", str(error), "math-verify")
    return compare(equal, text, final, "math-verify")


def is_mathematics(text: str) -> bool:
    """Return whether a reference is a number or uses mathematical notation."""
    return number_of(text) is not None or _NOTATION.search(text) is not None


def number_of(text: str) -> Fraction | None:
    """Return the exact value of a text that is one plain number (1,234 · -0.5 · 3e4 · 1/2 · 10% as 10), else None."""
    text = _LATEX_NOISE.sub("", text.replace("−", "-")).rstrip(".")
    if not text or len(text) > _LONGEST_NUMBER or not _PLAIN.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    try:
        value = Fraction(Decimal(numerator))
        return value / int(denominator) if denominator else value
    except (ValueError, ZeroDivisionError, OverflowError, InvalidOperation):
        return None
