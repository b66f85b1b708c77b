"""Judges multiple choice by the letter that an answer names."""

import re

from bmjax.teach.judges.verdict import Verdict, compare, last_boxed

# A letter right after a number is a unit (`12 A`). `I` is mostly a word.
_LETTER = re.compile(r"(?<!\d )(?<![\w'’])([A-HJ])(?![\w'’])")
_BARE_LETTER = re.compile(r"\W*([A-Ja-j])\W*")


def judge(reference: object, answer: str) -> Verdict:
    """Compare the letter of an answer with the reference's."""
    expected = choice_letter(str(reference))
    if expected is None:
        return Verdict("unjudged", f"the reference {str(reference)[:80]!r} names no letter", "none")
    letter = choice_letter(answer)
    return compare(letter == expected, expected, letter, "choice")


def is_letter(text: str) -> bool:
    """Return whether a reference is nothing but a letter of a choice."""
    return _BARE_LETTER.fullmatch(text) is not None


def choice_letter(text: str) -> str | None:
    """Return the letter in the last box, else the last letter that stands alone; `I` counts only when it is all."""
    boxed = last_boxed(text)
    if boxed is not None:
        text = re.sub(r"\\[a-z]+", " ", boxed)
    if bare := _BARE_LETTER.fullmatch(text):
        return bare[1].upper()
    letters = _LETTER.findall(text)
    return letters[-1] if letters else None
