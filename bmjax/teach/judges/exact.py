"""Judges text: equal up to Unicode form, runs of spaces and quotes around it."""

import re
import unicodedata

from bmjax.teach.judges.verdict import Verdict, compare


def judge(reference: object, answer: str) -> Verdict:
    """Compare the whole answer with the reference."""
    expected, actual = normalise(str(reference)), normalise(answer)
    return compare(actual == expected, expected, actual, "exact")


def normalise(text: str) -> str:
    """Return text without the differences that do not count."""
    text = unicodedata.normalize("NFC", text.strip().strip("`'\""))
    return re.sub(r"\s+", " ", text).strip()
