"""Tells in which scripts a text is written, to keep Chinese out of English reasoning and the other way round.

Letters decide; digits, signs and emoji belong to no language. Greek letters and mathematical alphabets are notation.
Languages that share a script, such as English and French, are not told apart.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bmjax.teach.settings import SCRIPTS

# (first code point, script); a range reaches to the next. Empty: no letters that tell a language.
_RANGES = (
    (0x00, ""), (0x41, "Latin"), (0x5B, ""), (0x61, "Latin"), (0x7B, ""), (0xC0, "Latin"), (0x2B0, ""),
    (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "other"), (0x590, "Hebrew"), (0x600, "Arabic"), (0x700, "other"),
    (0x750, "Arabic"), (0x780, "other"), (0x900, "Devanagari"), (0x980, "other"), (0xE00, "Thai"), (0xE80, "other"),
    (0x1100, "Hangul"), (0x1200, "other"), (0x1D00, ""), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, ""),
    (0x2C00, "other"), (0x2E80, "Han"), (0x3000, ""), (0x3005, "Han"), (0x3008, ""), (0x3041, "Kana"), (0x3100, "Han"),
    (0x3130, "Hangul"), (0x3190, ""), (0x31F0, "Kana"), (0x3200, ""), (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"),
    (0xA000, "other"), (0xAC00, "Hangul"), (0xD800, ""), (0xF900, "Han"), (0xFB00, ""), (0xFB1D, "Hebrew"),
    (0xFB50, "Arabic"), (0xFE00, ""), (0xFE70, "Arabic"), (0xFF00, ""), (0xFF21, "Latin"), (0xFF3B, ""),
    (0xFF41, "Latin"), (0xFF5B, ""), (0xFF66, "Kana"), (0xFFA0, "Hangul"), (0xFFE0, ""), (0x10000, ""),
    (0x20000, "Han"), (0x32000, ""),
)  # fmt: skip
_FIRST = np.array([first for first, _ in _RANGES], np.uint32)
_NAMES = [name for _, name in _RANGES]
_NOTATION = "Greek"
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_MAIN = 0.1  # share of letters that must be of a language which Latin formulas and programs may interrupt


def scripts(text: str) -> Counter[str]:
    """Return how many letters of each script a text has."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    letters: Counter[str] = Counter()
    # Most letters are of ASCII, which needs no search.
    if ascii_letters := int(np.count_nonzero((points | 32) - np.uint32(ord("a")) < 26)):
        letters["Latin"] = ascii_letters
    others = points[points >= 128]
    counts = np.bincount(np.searchsorted(_FIRST, others, side="right") - 1, minlength=len(_NAMES))
    for name, count in zip(_NAMES, counts.tolist(), strict=True):
        if name and count:
            letters[name] += count
    return letters


def foreign_script(text: str, prompt: str, languages: Sequence[str], limit: float) -> tuple[str, float] | None:
    """Return the script that a text should not be written in, and the share of its letters.

    Arguments:
        text: reasoning and response.
        prompt: what a prompt in one of the languages quotes in another script may be quoted again.
        languages: keys of SCRIPTS.
        limit: the share of letters of other scripts that is put up with.
    """
    wanted = {script for language in languages for script in SCRIPTS[language]}
    if "Latin" in wanted and text.isascii():
        return None
    letters = scripts(text if "Latin" in wanted else _COMMAND.sub("", text))
    total = letters.total()
    if not total:
        return None
    asked = scripts(prompt)
    quoted = {*asked} if asked and asked.most_common(1)[0][0] in wanted else set()
    foreign = Counter({s: n for s, n in letters.items() if s not in wanted | quoted | {_NOTATION, "Latin"}})
    if foreign and foreign.total() > limit * total:
        return foreign.most_common(1)[0][0], foreign.total() / total
    # Latin letters are in formulas and programs of every language, but not all there is.
    if "Latin" not in wanted and sum(letters[script] for script in wanted) < _MAIN * total:
        return "Latin", letters["Latin"] / total
    return None
