"""Reads numbers in words: forty-two, one hundred and five, two thirds, two and a half, a dozen.

`digits_of` gives the notation in digits of a phrase that is such a number, perhaps with one noun after it.
"""

import re
from fractions import Fraction

_SMALL = {word: value for value, word in enumerate((
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
))}  # fmt: skip
_TENS = {word: 20 + 10 * step for step, word in enumerate((
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
))}  # fmt: skip
_TENS["fourty"] = 40
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Parts by name: one half, two thirds. The plural needs a number above one, so that "twenty-third" is no fraction.
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
          "ninth": 9, "tenth": 10, "hundredth": 100}  # fmt: skip
_PLURAL_PARTS = {"halves" if name == "half" else f"{name}s": size for name, size in _PARTS.items()}
_OTHER = {"hundred", "dozen", "and", "or", "point", "of", "to", "times", "over", "per", "minus", "plus", "out",
          "hundreds", "thousands", "millions", "dozens", "percent", "more", "less"}  # fmt: skip
_NUMERAL = {*_SMALL, *_TENS, *_SCALES, *_PARTS, *_PLURAL_PARTS, *_OTHER}
_FIRST = re.compile(rf"(?:an?|negative|minus|{'|'.join([*_SMALL, *_TENS, 'half'])})\b", re.IGNORECASE)
_LONGEST = 200


def digits_of(phrase: str, noun: bool = True) -> str | None:
    """Return the digits of a number in words, such as -21 or 5/2, or None where the phrase is none.

    noun: whether one word may follow that says what is counted, as in "five apples".
    """
    phrase = phrase[: _LONGEST + 1].strip()
    if len(phrase) > _LONGEST or not _FIRST.match(phrase) or not re.fullmatch(r"[A-Za-z\s,-]+", phrase):
        return None
    words = re.sub(r"[-,\s]+", " ", phrase).casefold().split()
    negative = words[0] in ("negative", "minus")
    value, read = _number(words[1:] if negative else words)
    rest = words[read + negative :]
    # Two-dimensional counts nothing.
    counted = noun and len(rest) == 1 and len(rest[0]) > 2 and rest[0] not in _NUMERAL
    counted = counted and not phrase.casefold().endswith(f"-{rest[0]}")
    if value is None or (rest and not counted):
        return None
    return str(-value if negative else value)


def _number(words: list[str]) -> tuple[Fraction | None, int]:
    """Return a number at the start of some words and how many it takes."""
    if words[:1] == ["half"]:
        return (Fraction(6), 3) if words[1:3] == ["a", "dozen"] else (Fraction(1, 2), 1)
    whole, read = _whole(words)
    if whole is None:
        return None, 0
    following = words[read] if read < len(words) else ""
    if following == "dozen":
        return Fraction(12 * whole), read + 1
    if part := _PARTS.get(following) if whole == 1 else _PLURAL_PARTS.get(following):
        return Fraction(whole, part), read + 1
    if words[0] in ("a", "an") and read == 1:
        return None, 0
    if following == "point":
        digits = [_SMALL[word] for word in words[read + 1 :] if _SMALL.get(word, 10) < 10]
        if digits and len(digits) == len(words) - read - 1:
            return whole + Fraction(int("".join(map(str, digits))), 10 ** len(digits)), len(words)
    if following == "and":
        count, taken = _whole(words[read + 1 :])
        name = words[read + 1 + taken] if read + 1 + taken < len(words) else ""
        part = _PARTS.get(name) if count == 1 else _PLURAL_PARTS.get(name)
        if count and part and count < part:
            return whole + Fraction(count, part), read + taken + 2
    return Fraction(whole), read


def _whole(words: list[str]) -> tuple[int | None, int]:
    """Return a whole number at the start of some words and how many it takes: groups with ever smaller scales."""
    total, position, smallest = 0, 0, 10**15
    while True:
        start = position
        # "and" joins the groups of one number: one hundred and five, two thousand and six.
        if position and words[position : position + 1] == ["and"]:
            position += 1
        group, taken = _below_thousand(words[position:], first=not start)
        if group is None:
            break
        position += taken
        scale = _SCALES.get(words[position], 0) if position < len(words) else 0
        if (scale or 1) >= smallest:
            position = start
            break
        position += bool(scale)
        total, smallest = total + group * (scale or 1), scale or 1
        if smallest == 1:
            return total, position
    return (total, start) if start else (None, 0)


def _below_thousand(words: list[str], first: bool) -> tuple[int | None, int]:
    """Return a number of up to three digits, or of hundreds (fifteen hundred), and how many words it takes."""
    value, taken = _below_hundred(words)
    if value is None and first and words[:1] in (["a"], ["an"]):
        value, taken = 1, 1
    if value is None or words[taken : taken + 1] != ["hundred"]:
        return value, taken
    taken += 1
    joined = taken + (words[taken : taken + 1] == ["and"])
    rest, more = _below_hundred(words[joined:])
    # "One hundred and a half" goes on with a fraction, which is not for here.
    ends = joined + more
    if rest is None or (ends < len(words) and words[ends] in _PLURAL_PARTS | _PARTS):
        return 100 * value, taken
    return 100 * value + rest, ends


def _below_hundred(words: list[str]) -> tuple[int | None, int]:
    first = words[0] if words else ""
    if first in _SMALL:
        return _SMALL[first], 1
    if first not in _TENS:
        return None, 0
    unit = _SMALL.get(words[1], 0) if len(words) > 1 else 0
    return (_TENS[first] + unit, 2) if 0 < unit < 10 else (_TENS[first], 1)
