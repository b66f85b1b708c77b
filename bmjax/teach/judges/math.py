"""Judges mathematics: by exact arithmetic and 40 digits where it can be read, else by math-verify.

Most answers are the reference in another notation, or another number, which values.py and equality.py tell within a
millisecond. math-verify decides what they cannot read, and is a second opinion on what is not plain arithmetic. Where
the two differ, the verdict says so.
"""

import re
from functools import lru_cache

from bmjax.teach.judges import symbolic, text
from bmjax.teach.judges.answer import Answer, last_boxed
from bmjax.teach.judges.equality import equal
from bmjax.teach.judges.expressions import has, names
from bmjax.teach.judges.notation import LONGEST, normal_form
from bmjax.teach.judges.phrases import last_value, number_word, value_of, without_comment
from bmjax.teach.judges.values import Equation, Interval, Matrix, Quantity, Sequenced, Value, Words, read
from bmjax.teach.judges.verdict import JudgeError, Verdict, compare

# What the judge's verdicts may be signed with.
NAMES = ("number", "values", "math-verify", "text")

SECOND_OPINION_SECONDS = 3.0
_COSTLY = re.compile(r"\^[^ ]*\^|\d{30}|!|.{300}", re.DOTALL)  # what sympy may take long for
_LETTER_DIGITS = re.compile(r"(?:\\text\{(\w+)\}|(\w+))_ ?\{?(\d\d)\}?")
_CONSTANT, _SMALL_CONSTANT = re.compile(r"\+\s*C\s*$|^\s*C\s*\+"), re.compile(r"\+\s*[ck](?=\s*$)")
_INTEGER = re.compile(
    r"[,;(]?\s*(?:\\(?:text|quad|,|;)?\s*\{?\s*(?:where|for|with)?\s*\}?)?\s*\b([a-zA-Z])\s*(?:\\in(?![a-z])|∈)\s*(?:ℤ|\\mathbb\s*\{?\s*Z\s*\}?|\\Z)\)?"
)
_LONGEST_UNREAD = 400  # characters of an answer that only math-verify can read
_NOTATION = re.compile(
    r"####|\\(?:boxed|[dt]?frac|sqrt|pi|infty|cdot|times|pm|left|log|ln|sin|cos|tan|cot|sec|csc|begin|cup|cap|in|leq?|geq?"
    r"|neq?|circ|overline|binom|alpha|beta|theta|lambda|sum|int|lim|mathbb|vec|langle|emptyset|arc[a-z]+|exp)(?![a-zA-Z])"
    r"|\\\{|\\(?:pmod|equiv|bmod)(?![a-z])|\|[^|]+\||[\w)}]\^[\w({]|\$[^$]*[\d=\\][^$]*\$"
)


def judge(reference: object, answer: Answer) -> Verdict:
    """Compare the value that an answer states with the reference, which may be a worked solution."""
    expected = expected_value(str(reference))
    readings = read(expected)
    if readings and all(isinstance(reading, Words) for reading in readings):
        return text.judge_text(expected, answer)
    for form in _written_forms(expected):
        if (verdict := text.judge_text(form, answer)).verdict == "right":
            return verdict
    actual = stated_value(answer, numeric=any(map(_is_number, readings)))
    if not actual:
        reason = f"expected {expected[:80]!r}, found no answer"
        return Verdict("wrong", reason, "number")
    return _compare(expected, actual)


def expected_value(reference: str) -> str:
    """Return the answer of a reference: what follows `####` (GSM8K), what stands in the last box (MATH), or all."""
    reference = reference.strip()
    if "####" in reference:
        reference = reference.rpartition("####")[2].strip()
    boxed = last_boxed(reference)
    if boxed:
        return boxed
    whole = re.fullmatch(r"\$([^$]+)\$\.?|\\\((.+)\\\)\.?|\\\[(.+)\\\]\.?", reference, re.DOTALL)
    return next(group for group in whole.groups() if group).strip() if whole else reference


def _written_forms(expected: str) -> list[str]:
    """Return how a ratio and a number with letters for digits are written, which an answer may do as it stands."""
    if text.is_ratio(expected):
        return [expected]
    if (number := _LETTER_DIGITS.fullmatch(expected)) and read(expected):
        digits = number[1] or number[2]
        return [expected, digits, f"0x{digits}"] if number[3] == "16" else [expected, digits]
    return []


def is_mathematics(reference: str) -> bool:
    """Return whether a reference is a number, a list of numbers, or uses mathematical notation."""
    if text.is_date(reference):
        return False
    if _NOTATION.search(reference):
        return True
    readings = read(reference) if len(reference) <= 200 else ()
    if any(_is_number(reading) or isinstance(reading, Interval) for reading in readings):
        return True
    # p - q, x = 5, 2k+2: operators between digits and single letters.
    operators = (
        re.search(r"[\w)}]\s*[-+*/=<>]\s*(?:[\d_(\\-]|[A-Za-z](?![a-z]{2}))|\d[a-z(]|\)\(", reference) is not None
    )
    return operators and bool(readings) and not any(isinstance(reading, Words) for reading in readings)


def stated_value(answer: Answer, numeric: bool) -> str | None:
    """Return the value that an answer states, else its last; None where it has none."""
    begin = 0
    for statement in answer.statements:
        # A box is the answer, whatever it holds; words after "the answer is" may be none.
        named = numeric and statement.anchor != "bold"
        noun = statement.anchor != "whole" or not re.match(r"\W*(?:one|an?)\b", statement.text, re.IGNORECASE)
        if named and (digits := number_word(statement.text, noun)):
            return digits
        if statement.anchor == "box":
            words = re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{2,}", statement.text)
            if len(words) < 2 or read(statement.text, True):
                return statement.text
            return value_of(statement.text, numeric) or statement.text
        for part in dict.fromkeys((statement.text, statement.line)):
            if statement.anchor == "bold" and _conclusion(answer.tail, statement.start, numeric):
                continue
            if statement.anchor in ("whole", "bold") and not _is_little_more(part, numeric):
                continue
            if (value := value_of(part, numeric)) is not None:
                return value
        if statement.anchor == "stated":
            begin = max(begin, statement.start)
    value = last_value(answer.tail[begin:], numeric)
    if value is None and numeric:
        # Where no number is in digits, bold words may be one: She has **forty-two** apples.
        bold = (number_word(statement.text) for statement in answer.statements if statement.anchor == "bold")
        value = next(filter(None, bold), None)
    return value


def _is_little_more(part: str, numeric: bool) -> bool:
    """Return whether a text is a value with a few words around it, so that its number is no label and no step."""
    if re.match(r"\W*(?:step|part|case|note|example|equation|table|figure|day|week|year)\b", part, re.IGNORECASE):
        return False
    for text_of_part in dict.fromkeys((part, without_comment(part))):
        if any(not isinstance(reading, Words) for reading in read(text_of_part, True)):
            return True
    return numeric and len(re.findall(r"\d[\d,./]*", part)) == 1 and len(part.split()) <= 6


def _conclusion(tail: str, start: int, numeric: bool) -> bool:
    """Return whether a later sentence draws a conclusion with a number: "So she makes 18"."""
    after = tail[start:].partition("\n")[2]
    sentences = re.findall(
        r"(?:^|(?<=[.!?]\s)|\n)[ \t]*(?:so|therefore|thus|hence|in total|altogether|∴|因此|所以)[^\n]*", after, re.I
    )
    return any(last_value(sentence, numeric) for sentence in sentences)


def _compare(expected: str, actual: str) -> Verdict:
    if len(actual) > LONGEST:
        return compare(False, expected, actual, "values")  # prose, or hostile
    if "\\in" in f"{expected} {actual}" or "∈" in f"{expected} {actual}":
        expected, actual = _for_integers(expected), _for_integers(actual)
    # The constant of an integral may be written small.
    if _CONSTANT.search(expected):
        actual = _SMALL_CONSTANT.sub("+C", actual)
    if _squeezed(expected) == _squeezed(actual):
        return compare(True, expected, actual, "number" if any(map(_is_number, read(expected))) else "values")
    left, right = read(expected), read(actual, True)
    results = [equal(value, other) for value in left for other in right]
    quick: bool | None = None
    if results and (True in results or None not in results):
        quick = True in results
    plain = any(equal(value, other) for value in left for other in right if _is_rational(value) and _is_rational(other))
    if plain or (quick is not None and all(map(_is_rational, (*left, *right)))):
        return compare(quick is True, expected, actual, "number")
    # math-verify reads one branch of several.
    unread = quick is None and "\\begin{cases}" in expected + actual
    if unread or (quick is None and len(actual) > max(_LONGEST_UNREAD, 4 * len(expected))):
        return compare(False, expected, actual, "values")  # prose, or hostile
    # Of 3√13 and 3√14 both are misread or none, so a difference needs no second opinion.
    alike = quick is False and _form(expected) == _form(actual)
    if quick is not None and (alike or _COSTLY.search(f"{expected} {actual}")):
        return compare(quick, expected, actual, "values")
    try:
        # A second opinion must not cost more than the first one is worth.
        boxed = f"\\boxed{{{actual}}}"
        if quick is None:
            opinion = symbolic.equal(expected, boxed)
        else:
            opinion = symbolic.equal(expected, boxed, seconds=SECOND_OPINION_SECONDS)
    except JudgeError as error:
        if quick is None:
            return Verdict("unjudged", str(error), "math-verify")
        return compare(quick, expected, actual, "values")
    if quick is None:
        return compare(opinion, expected, actual, "math-verify")
    verdict = compare(quick, expected, actual, "values")
    if opinion == quick:
        return verdict
    other = "right" if opinion else "wrong"
    return Verdict(verdict.verdict, f"{verdict.reason}; math-verify says {other}", "values", disagreement="math-verify")


def _for_integers(value: str) -> str:
    """Drop "k ∈ ℤ" of all solutions, x = kπ, and call the whole number k."""
    integer = _INTEGER.search(value)
    if integer is None:
        return value
    rest = value[: integer.start()] + value[integer.end() :]
    return re.sub(rf"(?<![\\A-Za-z]){integer[1]}(?![A-Za-z])", "k", rest).strip(" ,;()")


@lru_cache(maxsize=8192)
def _squeezed(value: str) -> str:
    """Return the normal form without the spaces that part no numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", normal_form(value))


def _form(value: str) -> str:
    """Return the notation of a value, whatever its numbers are."""
    return re.sub(r"\d+(?:\.\d+)?", "0", _squeezed(value))


def _is_number(reading: Value) -> bool:
    """Return whether a reading is a number or several, without variables."""
    if isinstance(reading, Sequenced):
        return bool(reading.items) and all(map(_is_number, reading.items))
    return isinstance(reading, Quantity) and not names(reading.tree)


def _is_rational(reading: Value) -> bool:
    """Return whether a reading is plain arithmetic, in which no reader can err."""
    if isinstance(reading, Sequenced):
        return all(map(_is_rational, reading.items))
    if isinstance(reading, Equation):
        return bool(reading.name) and _is_rational(reading.right)
    if isinstance(reading, Matrix):
        return all(_is_rational(cell) for row in reading.rows for cell in row)
    if isinstance(reading, Quantity):
        return not has(reading.tree, "name", "constant", "call", "root", "|", "⌊", "⌈", "!", "binomial", "infinity")
    return False
