"""Other texts that a value may stand for: 70k is also 70,000, `3 and 1/2` one number, ¥ the yen or the yuan.

`values.read` reads them beside the text itself. Each is in the notation of `notation.normal_form`.
"""

import re

from bmjax.teach.judges.notation import COUNT_ZEROS, COUNTED

_MIXED = re.compile(r"(-?\d+) ?(?:and|«and»|&) ?(\d+) ?/ ?(\d+)( [A-Za-z]+)?")
_PREFIXED = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_BASES = {"x": 16, "b": 2, "o": 8}
_YEN = re.compile(r"(-?)¥ ?(\d+(?:\.\d+)?)")
_REALS_EXCEPT = re.compile(
    r"«?(?:x is )?(?:all )?real numbers except(?: for)?»? ?(?:x ?= ?)?(-?\d+(?:[./]\d+)?)»?", re.IGNORECASE
)
_REALS_BUT = re.compile(r"\\mathbb ?\{ ?R ?\} ?(?:∖|-) ?⦃ ?(-?[^⦃⦄,;]{1,40}) ?⦄")


def other_texts(form: str) -> list[str]:
    """Return the other texts that a value in the one notation may stand for."""
    if (counted := COUNTED.fullmatch(form)) and not counted["currency"]:
        return [f"{counted['sign']}{counted['number']}*10^{{{COUNT_ZEROS[counted['letter']]}}}{counted['rest'] or ''}"]
    if (mixed := _MIXED.fullmatch(form)) and int(mixed[2]) < int(mixed[3]):
        return [f"{mixed[1]} {mixed[2]}/{mixed[3]}{mixed[4] or ''}"]
    if prefixed := _PREFIXED.fullmatch(form):
        return [f"{prefixed[2].upper()}_{{{_BASES[prefixed[1].lower()]}}}"]
    if yen := _YEN.fullmatch(form):
        return [f"{yen[1]}{yen[2]} yen"]
    if reals := _REALS_BUT.fullmatch(form) or _REALS_EXCEPT.fullmatch(form):
        return [f"x≠{reals[1]}"]
    return []
