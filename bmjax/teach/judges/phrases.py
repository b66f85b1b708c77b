"""Reads the value that a sentence names: "18 dollars for 1 day" names 18, "so 9 × 2 = 18." too."""

import re
from collections.abc import Sequence

from bmjax.teach.judges.notation import COUNTED
from bmjax.teach.judges.number_words import digits_of
from bmjax.teach.judges.units import read_unit
from bmjax.teach.judges.values import Equation, Quantity, Sequenced, Value, Words, read

_SIGN = r"(?:\b(?:[Nn]egative|[Mm]inus)\s(?=[\d$.])|(?<![\w)\]}$€£¥%])[-−–+±]|(?<=[\s(:=*])[-−–]\s?(?=[$€£¥₹]))?"
NUMBER = re.compile(
    _SIGN
    + r"(?:\\?[$€£¥₹]\s?[-−]?)?"
    + r"(?<!\d)(?:0x[0-9A-Fa-f]+(?!\w)|0b[01]+(?!\w)|\d+\s\d+/\d+(?!\d)|\d*\s?[¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
    + r"|(?:\d{1,3}(?:(?:,|\{,\}|\\,|[\u2009\u202f\u00a0']|,\\!)\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
    + r"(?:\s?(?:[×*xX·]|\\times|\\cdot)\s?10\s?"
    + r"(?:\^\s?\{?\s?[-−+]?\d+\}?|[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)|[eE][-+−]?\d{1,6}(?![\w.]))?"
    + r"(?:\s(?:hundred|thousand|million|billion|trillion)\b|(?:[kKMB]|bn|mn)(?![\w^*/(+-]))?"
    + r"(?:\s?/\s?\d+(?![\d/]))?(?:_\{?\d+\}?)?(?:\s?(?:\\?%|°|percent\b))?"
)
_SEGMENT = re.compile(
    r"\$\$(?P<display>.{1,2000}?)\$\$|(?<!\\)\$(?=[^\s$])(?P<inline>[^$\n]{1,1000}?)(?<=[^\s\\])\$(?!\d)"
    r"|\\\((?P<round>.{1,1000}?)\\\)|\\\[(?P<square>.{1,2000}?)\\\]",
    re.DOTALL,
)
_WORDS_IN_BRACKETS = re.compile(r"\s[(（][^()（）]*[A-Za-z]{2,}\s[^()（）]*[)）]\s*$")
_REASON = re.compile(r"\s(?:because|since|where|which|when)\b", re.IGNORECASE)
# A coefficient or an exponent, rather than a number: 7x, x^7.
_COEFFICIENT = re.compile(r"[xyznk](?!\w)(?!\s+(?:as|more|less|faster|the|larger|bigger)\b)")
_TUPLE = re.compile(r"[(\[](?:\s*[-−+]?\d+(?:\.\d+|/\d+)?\s*[,;](?!\d{3}(?!\d)))+\s*[-−+]?\d+(?:\.\d+|/\d+)?\s*[)\]]")
_BETWEEN = re.compile(r"\s*(?:,?\s*(?:and|or|和|或者?|与)\s*|[,，、;]\s*)\s*(?:also\s+)?(?:[a-z]\s*=\s*)?")
# Numbers that count lines of the text.
_LABEL = re.compile(
    r"(?:\b(?:steps?|equations?|eq|parts?|cases?|lines?|figures?|problems?|questions?|notes?|sections?|chapters?"
    r"|methods?|theorem|example|options?|items?)\.?|[第#])\s*\(?$",
    re.I,
)
_COMMENT = re.compile(
    r"\s*[(（\[](?!\s*[-−]?[\d\\$∞]).*[)）\]]\s*$"
    r"|\s+(?:because|since|as|when|where|which|if|for|per|in total|altogether|each)\b.*$",
    re.I | re.DOTALL,
)


_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{([^{}]*)\}")
_CLAUSE = re.compile(r", (?:which|where|whereas|while) [^\n]*$")
_REMARK = re.compile(
    r"(?<=[\w$°%]) [(（](?=[^()（）\n]*[A-Za-z]{2})(?![\s$\\]*[-−]?[\d.]+\s*,)[^()（）\n]*[)）][\s.*]*$"
)


def value_of(phrase: str, numeric: bool) -> str | None:
    """Return the part of a statement that is its value, or None where it names none.

    Arguments:
        phrase: "18 dollars for 1 day", "x = 5", "$\\frac{1}{2}$ of the cake".
        numeric: whether a number is expected, so that words and expressions with variables are no value.
    """
    phrase = phrase[:1000].strip().strip("\"'“”‘’{}" if phrase.count("{") != phrase.count("}") else "\"'“”‘’").strip()
    phrase = re.sub(r"^(?:[:：=]|is|are|=)\s+", "", phrase)
    without = _COMMENT.sub("", phrase)
    # The numbers of a reason are none of the value: 7 because 7*2 = 14.
    reasoned = _REASON.search(phrase) or _WORDS_IN_BRACKETS.search(phrase)
    for text in (without, phrase) if reasoned else (phrase, without):
        if numeric and COUNTED.fullmatch(text.strip(" .")):
            return text.strip(" .")
        readings = read(text, True)
        measured = any(
            isinstance(reading, Quantity) and reading.unit and not _variables(reading) for reading in readings
        )
        if text.strip() and readings and (measured or all(_is_value(reading, numeric) for reading in readings)):
            return text
    pieces = [span for span in _spans(phrase) if not numeric or _is_numeric(phrase[span[0] : span[1]])]
    if not pieces:
        return None
    # The first group of values joined by "and"; after an equals sign the last, which is the result.
    group = [pieces[0]]
    if re.search(r"\d\s*=", phrase):
        return _inside(phrase, *pieces[-1])
    for span in pieces[1:]:
        if span[0] - group[-1][1] > 40 or not _BETWEEN.fullmatch(phrase[group[-1][1] : span[0]]):
            break
        group.append(span)
    rest = phrase[group[-1][1] :]
    if (
        numeric
        and len(group) == 1
        and (unit := re.match(r"\s?(?:[a-zA-Z]+(?:\^?\d)?|°[CF]?|[\u4e00-\u9fff]{1,2})(?:/[a-z]+)?(?![\w])", rest))
    ):
        quantity = phrase[group[0][0] : group[0][1]] + unit[0]
        readings = read(quantity, True)
        if read_unit(unit[0]) and readings and isinstance(readings[0], Quantity):
            return quantity
    return ", ".join(_inside(phrase, *span) for span in group)


def number_word(phrase: str, noun: bool = True) -> str | None:
    """Return the digits of a phrase that is a number in words; `noun`: one noun may follow, as in five apples."""
    words = _TEXT.sub(r"\1", phrase).strip().strip("*.$!\"' ")
    percent = re.fullmatch(r"(.*\w)\s+per\s?cent", words, re.IGNORECASE)
    digits = digits_of(percent[1] if percent else words, noun and not percent)
    return f"{digits}%" if digits and percent else digits


def last_value(text: str, numeric: bool) -> str | None:
    """Return the last value of a text: a number, or mathematics between dollar signs."""
    spans = _spans(text)
    # A remark in brackets at the end says the value again, or another: 160 minutes (2 hours and 40 minutes).
    remark = _REMARK.search(text) or _CLAUSE.search(text)
    if remark and any(text.rfind("\n", 0, remark.start()) < start and end <= remark.start() for start, end in spans):
        spans = [span for span in spans if span[1] <= remark.start()]
    for start, end in reversed(spans):
        content = _inside(text, start, end)
        if not numeric:
            if text[start] in "$\\" and NUMBER.fullmatch(text[start:end]) is None:
                return content
            continue
        if NUMBER.fullmatch(content.strip()) and (
            _LABEL.search(text, max(0, start - 20), start) or re.match(r"(?:st|nd|rd|th)\b", text[end : end + 3])
        ):
            continue
        if _is_numeric(text[start:end]):
            return _listed(text, spans, (start, end)) or value_of(content, True) or content
    if not numeric:
        line = text.strip().rpartition("\n")[2]
        return line.rpartition("=")[2].strip() or None
    return None


def _listed(text: str, spans: list[tuple[int, int]], last: tuple[int, int]) -> str | None:
    """Return the list that ends in a value, where words such as "are" come before it: The solutions are 2, 3 and 5."""
    group = [last]
    for span in reversed(spans[: spans.index(last)]):
        if not _BETWEEN.fullmatch(text[span[1] : group[0][0]]) or not _is_numeric(text[slice(*span)]):
            break
        group.insert(0, span)
    if len(group) < 2 or not re.search(r"\b(?:are|were)(?:\s+[a-z]\s*=)?\s*:?\s*$", text[: group[0][0]]):
        return None
    return ", ".join(_inside(text, *span) for span in group)


def without_comment(phrase: str) -> str:
    """Return a phrase without what follows its value: a reason, or for which values it holds."""
    return _COMMENT.sub("", phrase)


def _spans(text: str) -> list[tuple[int, int]]:
    """Find the mathematics and, outside of it, the numbers of a text, in order."""
    spans = [segment.span() for segment in _SEGMENT.finditer(text)]
    # (3, 4) in plain text is one value.
    spans += [
        span.span() for span in _TUPLE.finditer(text) if not any(a < span.end() and span.start() < b for a, b in spans)
    ]
    spans.sort()
    spans = [
        span
        for span in spans
        if not re.search(
            r"[A-Za-z]{4,}\s+[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+(?:\{[^{}]*\})?", "", text[span[0] : span[1]])
        )
    ]
    inside = iter([*spans, (len(text), len(text))])
    start, end = next(inside)
    merged = list(spans)
    for number in NUMBER.finditer(text):
        while number.start() >= end and end < len(text):
            start, end = next(inside)
        if _COEFFICIENT.match(text, number.end()) or text[: number.start()].endswith("^"):
            continue
        if number.end() <= start or number.start() >= end:
            merged.append(number.span())
    return sorted(merged)


def _inside(text: str, start: int, end: int) -> str:
    """Strip the delimiters of mathematics, but not a currency's sign."""
    segment = _SEGMENT.fullmatch(text, start, end)
    return (
        next(group for group in segment.groups() if group is not None).strip() if segment else text[start:end].strip()
    )


def _is_value(reading: Value, numeric: bool) -> bool:
    if isinstance(reading, Words):
        return not numeric
    if isinstance(reading, Sequenced):
        chains = sum(isinstance(item, Equation) and not item.name for item in reading.items)
        return not chains and all(not isinstance(item, Words) or item.text == "∞" for item in reading.items)
    if isinstance(reading, Equation):
        if not reading.name:
            return not numeric
        return _is_value(reading.right, numeric) and len(reading.name) < 12
    return not (numeric and isinstance(reading, Quantity) and _variables(reading))


def _is_numeric(text: str) -> bool:
    """Return whether a piece of mathematics is a number or ends in one."""
    content = _inside(text, 0, len(text))
    if COUNTED.fullmatch(content):
        return True
    readings: Sequence[Value] = read(content, True)
    return bool(readings) and all(_is_value(reading, True) for reading in readings)


def _variables(quantity: Quantity) -> bool:
    from bmjax.teach.judges.expressions import names

    return bool(names(quantity.tree))
