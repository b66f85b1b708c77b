"""Judges text: equal up to form, quotes, spaces and final punctuation. `text` ignores case, `exact` does not."""

import re
import unicodedata

from bmjax.teach.judges.answer import Answer, last_boxed, plain
from bmjax.teach.judges.number_words import digits_of
from bmjax.teach.judges.verdict import Verdict, compare

_QUOTES = str.maketrans("“”„«»‘’‚–—−", '"' * 5 + "'" * 3 + "-" * 3)
_YES, _NO = {"yes", "true", "是", "对", "正确"}, {"no", "false", "否", "不是", "不对", "错误"}
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|emph|ce)\s*\{([^{}]*)\}")
# What may follow an answer in its sentence.
_REST = re.compile(
    r"\s*(?:[,;:.!](?!\d)|[—–(\n]|-\s|because\b|since\b|as\b|which\b|who\b|where\b|due to\b|for\b|[，。；：（]|$)"
)
_NAMED = re.compile(
    r"(?:\b(?:is|are|was|were|be|called|named|means?|equals?|(?:falls|lands|fell) on|at)|[:=：]|[是为])\s*"
    r"(?:the\s+|an?\s+)?$",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?<![\d:.])(1[0-2]|0?[1-9])(?: ?[:.] ?([0-5]\d))? ?"
    r"(?:([apAP])\.? ?[mM]\b\.?|in the (morning|afternoon|evening)\b)"
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?P<day>0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_MONTH_FIRST = re.compile(rf"\b{_MONTH} {_DAY}\b(?:,? (?P<year>\d{{4}})\b)?", re.IGNORECASE)
_DAY_FIRST = re.compile(rf"(?<!\d){_DAY}(?: of)? {_MONTH}(?![a-z])(?:,? (?P<year>\d{{4}})\b)?", re.IGNORECASE)
_DATE = re.compile(r"(?<!\d)(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{4})(?!\d)")
_YEAR_FIRST = re.compile(r"(?<!\d)(\d{4}) ?[/年] ?(\d{1,2}) ?[/月] ?(\d{1,2})(?: ?日)?(?!\d)")
_WEEKDAY = re.compile(
    r"\b(?:mon|tues|wednes|thurs|fri|satur|sun)day,? (?=(?:\d{4}-)?\d{1,2}-\d{1,2}(?!\d))", re.IGNORECASE
)
_TWELVE = re.compile(r"\b(?:at )?(?:12(?::00)? )?(noon|midnight)\b", re.IGNORECASE)
_ABSENT = re.compile(
    r"^(?:dne|(?:it |the limit )?(?:does not|doesn't|do not) exist|nonexistent|non-existent)$", re.IGNORECASE
)
_NO_SOLUTION = re.compile(
    r"^(?:(?:there (?:is|are|exists?)|(?:(?:it|the (?:equation|system|inequality)) )?has) )?"
    r"no (real )?solutions?(?: exists?)?$"
    r"|^(?:\\emptyset|\\varnothing|∅)$",
    re.IGNORECASE,
)
_INFINITELY_MANY = re.compile(
    r"^(?:(?:there (?:is|are)|(?:it|the (?:equation|system)) has) )?"
    r"(?:infinite(?:ly many)?|an infinite number of)(?: solutions)?$"
    r"|^(?:\\infty|∞|infinity)$",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(r"^(?:on|in|at|by|it is|it's|this is|that is|called)\s+(?:the\s+|an?\s+)?", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|no|never|n't|neither|nor)\b|不", re.IGNORECASE)


def judge_text(reference: object, answer: Answer) -> Verdict:
    """Compare what an answer states with the reference, whatever the case of letters."""
    return _judge(reference, answer, folded=True)


def judge_exact(reference: object, answer: Answer) -> Verdict:
    """Compare what an answer states with the reference, upper and lower case apart."""
    return _judge(reference, answer, folded=False)


def _judge(reference: object, answer: Answer, folded: bool) -> Verdict:
    name = "text" if folded else "exact"
    text = str(reference)
    text = text.rpartition("####")[2] if "####" in text else last_boxed(text) or text
    expected = normalise(text, folded)
    if expected and _same(normalise(answer.tail, folded), expected, folded):
        return compare(True, text, answer.text, name)

    # A yes-or-no question is answered by the first word that says so.
    decision = _decision(expected)
    if decision is not None and folded:
        actual, stated = _decided(answer)
        return compare(actual == decision, text, stated, name)

    for statement in answer.statements:
        if statement.anchor == "whole":
            continue
        options = [normalise(option, folded) for option in (statement.text, statement.line)]
        options += [_LEAD_IN.sub("", option) for option in options]
        right = any(_same(option, expected, folded) for option in options) or any(
            _begins(option, expected) for option in options if statement.anchor != "box"
        )
        if right or statement.anchor != "bold":
            return compare(right, text, statement.text, name)
    # Without a statement: a short reply, or its last sentence, that ends by naming it: "The capital is Paris."
    lines = [line for line in plain(answer.tail).strip().splitlines() if line.strip()]
    last = normalise(lines[-1], folded) if lines else ""
    if answer.is_short:
        named = re.match(r"(?:is|was|are|were) (?:the|an?) ", last[len(expected) :].lstrip())
        whole = _begins(last, expected) or _begins(_LEAD_IN.sub("", last), expected)
        if whole or (last.startswith(f"{expected} ") and named and not _NEGATION.search(last)):
            return compare(True, text, last, name)
    at = last.rfind(expected) if expected else -1
    head = (
        last[:at]
        if at > 0 and (last.endswith(expected) or re.match(r"\s?[,;(（，]|\s-\s", last[at + len(expected) :]))
        else ""
    )
    right = bool(head) and _NAMED.search(head) is not None and not _NEGATION.search(head[-30:])
    return compare(right or (len(lines) > 1 and last == expected), text, lines[-1] if lines else answer.text, name)


def _same(stated: str, expected: str, folded: bool) -> bool:
    """Compare normal forms; folded: as lists, as numbers in words, as formulas without blanks too."""
    if not folded:
        return stated == expected
    # Thursday, 12 March
    if expected in (stated, _WEEKDAY.sub("", stated)):
        return True
    items, wanted = (re.split(r",? and |[,;] ?", form) for form in (stated, expected))
    if len(wanted) > 1 and (items == wanted or stated == expected.replace(",", "")):
        return True
    number = digits_of(expected, noun=False)
    if number is not None and number in (stated, digits_of(stated, noun=False)):
        return True
    if digits_of(stated, noun=False) == expected:
        return True
    return bool(re.search(r"[()\[\]^=+]", expected)) and stated.replace(" ", "") == expected.replace(" ", "")


def normalise(text: str, folded: bool = False) -> str:
    """Return text without the differences that do not count."""
    text = unicodedata.normalize("NFKC", text.strip()).translate(_QUOTES).replace("{:}", ":")
    for _ in range(2):
        text = _LATEX_TEXT.sub(r"\1", text)
    text = re.sub(r"\\[()\[\]]|\\displaystyle|\$", "", plain(text)).replace("\\ ", " ")
    text = re.sub(r"\s+", " ", text)
    previous = None
    while previous != text:
        previous = text
        text = text.strip().strip("`'\"").rstrip(".!。;,").strip()
    if folded:
        text = re.sub(r"(?<![\w.])(\d+)(?: ?: ?| to )(?=\d+(?!\w|\.\d))", r"\1:", _times(_dates(text)))
        text = re.sub(r"(?<=[A-Za-z)])_ ?\{?(\d+)\}?", r"\1", text)  # H_2O
        text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text, flags=re.IGNORECASE)
        text = _ABSENT.sub("does not exist", text)
        text = _NO_SOLUTION.sub(lambda none: f"no {none[1] or ''}solution", text)
        text = _INFINITELY_MANY.sub("infinitely many", text)
        text = re.sub(r"^(?:the|an?)\s+(?=\w)", "", text.casefold())
        text = re.sub(r"\b(?:[a-z]\.)+[a-z]\b", lambda letters: letters[0].replace(".", ""), text)  # U.S.A
        text = re.sub(r"\\(?=(?:log|ln|sin|cos|tan|exp|max|min|sqrt)(?![a-z]))", "", text).replace(" & ", " and ")
    return text


def _times(text: str) -> str:
    """Write times of day in 24 hours: 9 a.m. is 9:00, 3:30 PM 15:30."""
    text = _TIME.sub(_in_24_hours, text)
    text = _TWELVE.sub(lambda twelve: "12:00" if twelve[1].casefold() == "noon" else "0:00", text)
    return re.sub(r"(?<![\d:])0(?=\d:[0-5]\d(?!\d))", "", text)


def _in_24_hours(time: re.Match[str]) -> str:
    late = time[3] in ("p", "P") or (time[4] or "").casefold() in ("afternoon", "evening")
    return f"{int(time[1]) % 12 + 12 * late}:{time[2] or '00'}"


def _dates(text: str) -> str:
    """Write dates with a month's name as 2024-1-5 or 1-5, and drop leading zeros."""
    text = _YEAR_FIRST.sub(r"\1-\2-\3", text)
    for date in (_DAY_FIRST, _MONTH_FIRST):
        text = date.sub(
            lambda parts: "-".join(
                filter(
                    None, (parts["year"], str(_MONTHS.index(parts["month"][:3].casefold()) + 1), str(int(parts["day"])))
                )
            ),
            text,
        )
    return re.sub(r"(?<=[-/])0(?=\d\b)|(?<![\d.,])0(?=\d/\d)", "", text) if _DATE.search(text) else text


def is_date(reference: str) -> bool:
    """Return whether a reference is a date in digits, which is no difference and no fraction."""
    return any(date.fullmatch(reference.strip()) for date in (_DATE, _YEAR_FIRST, _DAY_FIRST, _MONTH_FIRST))


def is_ratio(reference: str) -> bool:
    """Return whether a reference is a ratio or a time of day: 3:4."""
    return re.fullmatch(r"\s*\d+\s*:\s*\d+\s*", reference) is not None


def _begins(text: str, expected: str) -> bool:
    """Return whether a sentence begins with the expected answer and goes on to something else."""
    return bool(expected) and text.startswith(expected) and _REST.match(text[len(expected) :]) is not None


def _decision(text: str) -> bool | None:
    word = text.casefold()
    return True if word in _YES else False if word in _NO else None


def _decided(answer: Answer) -> tuple[bool | None, str]:
    """Return the yes or no that an answer states, and its words."""
    texts = [statement.text for statement in answer.statements if statement.anchor != "whole"]
    lines = [line for line in plain(answer.tail).strip().splitlines() if line.strip()]
    if lines:
        texts += [answer.tail, lines[-1], re.split(r"(?<=[.!?])\s+", lines[-1])[-1]]
    for text in texts:
        words = normalise(text, folded=True)
        first = re.match(
            r"[\s\"'(]*(?:(?:so|therefore|thus|hence|that|it|this|indeed|definitely|clearly|is|,)\s+|,\s*)*(\w+|不?[是对])",
            words,
        )
        if first and (decision := _decision(first[1])) is not None:
            return decision, text
        if (end := re.search(r"\b(?:so|thus|therefore|hence),?\s+(yes|no)$", words)) is not None:
            return end[1] == "yes", text
        if (
            last := re.search(r"\b(?:is|are)\s+(true|false)(?:,?\s+(?:because|since|as)\b.*|[,;:].*)?$", words)
        ) is not None:
            return last[1] == "true", text
    return None, answer.text
