"""Judges multiple choice: by the letters that an answer states, or by an option's text where the options are known.

A reference is "B", "(B)", "B. its text", "AC", ["A", "C"], or {"answer": "B", "options": ["...", ...]}. The article A
and the word I are no letters of options.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError
from bmjax.teach.judges.answer import Answer, Statement, last_boxed, plain
from bmjax.teach.judges.equality import equal
from bmjax.teach.judges.text import normalise
from bmjax.teach.judges.values import Words, read
from bmjax.teach.judges.verdict import Verdict, compare

LETTERS = "ABCDEFGHIJ"
_ANSWER_KEYS = ("answer", "label", "correct", "answers", "answer_key", "answerKey")
_OPTION_KEYS = ("options", "choices")

# (i) counts parts of a question, so only a capital I is an option.
_BARE = re.compile(r"[\s(（\[{.\"'*$]*([A-Ja-hj])[\s)）\]}.:。\"'*$]*")
_LABELLED = re.compile(
    r"\s*(?:[(（\[]\s*([A-Ja-hj])\s*[)）\]]|([A-J])\s*(?:[)．、：]|[.:](?=\s))|([a-hj])\s*\))\s*(\S.*)", re.DOTALL
)
_SEVERAL = re.compile(r"[(（\[]?[A-J][)）\]]?(?:\s*(?:,|，|、|;|/|&|\band\b|和|与)\s*[(（\[]?[A-J][)）\]]?)+")
_FULL_WIDTH = re.compile("[Ａ-Ｊ]")
_JOINED = re.compile(r"[A-H]{2,8}")


@dataclass(frozen=True)
class Key:
    """What a reference says: the right letters, the options' texts by letter, the last letter that counts."""

    letters: frozenset[str]
    options: tuple[tuple[str, str], ...] = ()
    last: str = "H"


def judge(reference: object, answer: Answer) -> Verdict:
    """Compare the letters that an answer states with the reference's."""
    key = read_key(reference)
    if key is None:
        return Verdict("unjudged", f"the reference {str(reference)[:80]!r} names no letter", "none")
    if _FULL_WIDTH.search(answer.text):
        answer = Answer(_FULL_WIDTH.sub(lambda letter: unicodedata.normalize("NFKC", letter[0]), answer.text))
    letters = stated_letters(answer, key)
    expected = "".join(sorted(key.letters))
    return compare(letters == key.letters, expected, "".join(sorted(letters)) if letters else None, "choice")


def is_choice(reference: Any) -> bool:
    """Return whether a reference has the shape of a choice: letters, or an answer among options."""
    if isinstance(reference, Mapping):
        return any(key in reference for key in _OPTION_KEYS) and any(key in reference for key in _ANSWER_KEYS)
    if isinstance(reference, list | tuple):
        return bool(reference) and all(isinstance(item, str) and _BARE.fullmatch(item) for item in reference)
    return isinstance(reference, str) and read_key(reference) is not None


def read_key(reference: Any) -> Key | None:
    """Read a reference; None where it names no letter. UserError for options that do not hold its answer."""
    if isinstance(reference, Mapping):
        return _key_of_options(reference)
    if isinstance(reference, list | tuple):
        letters = [_BARE.fullmatch(str(item)) for item in reference]
        return _key(letter[1] for letter in letters if letter) if letters and all(letters) else None
    text = re.sub(r"\\(?:text(?:bf)?|math(?:rm|bf))\s*\{([^{}]*)\}", r"\1", str(reference).strip())
    text = last_boxed(text) or text.rpartition("####")[2].strip()
    text = re.sub(r"^\s*(?:答案|故选|the answer is|answer)\s*[是为:：]?\s*", "", text, flags=re.IGNORECASE)
    if bare := _BARE.fullmatch(text):
        return _key(bare[1])
    stripped = text.strip(" .。()（）[]")
    if _JOINED.fullmatch(stripped) and list(stripped) == sorted(set(stripped)):
        return _key(stripped)
    if _SEVERAL.fullmatch(text.strip(" .。")):
        return _key(re.findall(r"[A-J]", text))
    if labelled := _LABELLED.fullmatch(text):
        letter = (labelled[1] or labelled[2] or labelled[3]).upper()
        return Key(frozenset(letter), ((letter, labelled[4].strip()),), "J" if letter > "H" else "H")
    return None


def _key(letters: Any) -> Key:
    upper = frozenset(letter.upper() for letter in letters)
    return Key(upper, last="J" if max(upper) > "H" else "H")


def _key_of_options(reference: Mapping[str, Any]) -> Key:
    name, raw = next((key, reference[key]) for key in _OPTION_KEYS if key in reference)
    if isinstance(raw, Mapping) and isinstance(raw.get("text"), list):  # ARC: {"text": [...], "label": [...]}
        raw = dict(zip(raw.get("label") or LETTERS, raw["text"], strict=False))
    pairs = list(raw.items()) if isinstance(raw, Mapping) else list(zip(LETTERS, raw or [], strict=False))
    too_many = isinstance(raw, Sequence) and len(raw) > len(LETTERS)
    if not pairs or too_many or not all(str(letter).upper() in LETTERS for letter, _ in pairs):
        raise UserError(f"reference: '{name}' holds {str(raw)[:80]!r}, expected a list of 1 to {len(LETTERS)} options")
    options = {
        str(letter).upper(): re.sub(r"^\s*[(（]?\s*[A-J]\s*[)）.:．、：]\s*", "", str(text)) for letter, text in pairs
    }
    answer = next(reference[key] for key in _ANSWER_KEYS if key in reference)
    last = max(options)
    if isinstance(answer, int) and not isinstance(answer, bool) and str(answer) not in options.values():
        answer = LETTERS[answer] if 0 <= answer < len(options) else None
    by_text = [letter for letter, text in options.items() if normalise(text, True) == normalise(str(answer), True)]
    key = None if len(by_text) == 1 else read_key(answer)
    letters = frozenset(by_text[:1]) if key is None else key.letters
    if not letters or not letters <= set(options):
        raise UserError(f"reference: the answer {str(answer)[:80]!r} is none of the options {', '.join(options)}")
    return Key(letters, tuple(options.items()), last)


# No letter of an option goes on like this: AB, A1, A's, C++, C#, B-tree, B+.
_END = r"(?![A-Za-z0-9'’]|\+\+|\#|[-–](?-i:[a-z])|\+(?:\s|[).,]|$)|\s?=)"
# What states a letter, besides the anchors of every kind.
_X = (
    r"[(（\[]?((?-i:[A-J](?:[)）\]]?\s{0,4}(?:,\s{0,4}and|,|，|、|/|&|\band\b|和|与)\s{0,4}[(（\[]?[A-J]){0,9}|[A-H]{2,8}))"
    r"[)）\]]?"
)
_SAID = re.compile(
    r"""(?:options?|choices?|statements?|选项)?\s{0,4}(?<![A-Za-z0-9'’])@\s{0,4}
        (?:is|are|seems|must\ be)\s{1,4}(?:therefore\s{1,4}|thus\s{1,4}|clearly\s{1,4}|indeed\s{1,4})?
        (?:the\s{1,4})?(?:only\s{1,4})?(?:correct|right|best|answers?\b|true\b)(?!\s{0,4}\?)
    | \b(?:choose|select|pick|go\ with|going\ with|opt\ for|say|mark)\s{1,4}(?:the\s{1,4})?
      (?:(?:option|choice|answer|letter)s?\s{1,4})?@%(?!\s(?!(?:over|because|since|as|for|here|with|and|from)\b)[a-z])
    | (?:选项|选|選)\s{0,4}@%(?!\s{0,4}项?(?:错误|不正确|不符合))
    | \b(?:so|therefore|thus|hence|∴|因此|所以|故)[,，:]?\s{0,4}(?:it(?:'s|\ is)\s{1,4}|that(?:'s|\ is)\s{1,4})?
      (?:option\s{1,4}|choice\s{1,4})?@%\s{0,4}[.。!]?\s{0,4}$""".replace("%", _END).replace("@", _X),
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_LEADING = re.compile(
    r"[\W_]*(?:(?i:(?:the\s+)?(?:correct\s+|only\s+|both\s+|either\s+)?(?:either|options?|choices?|answers?|letters?|statements?|both))\b\s*|选项?)?"
    r"[\s(（\[{\"'$:：]*(?P<letters>(?:[A-J]|[a-hj](?=\s*[)）])|(?<=option\s|choice\s|letter\s|answer\s)[a-hj](?=\W*$))"
    r"(?:(?:[)）\]]?\s*(?:,\s*and\b|[,，、;/&+]|\band\b|\bor\b|和|与|及|或)\s*[(（\[]?|[)）\]]\s*[(（\[]"
    r"|[)）\]]?\s+(?=[B-HJ]%(?!\s+[a-z])))[A-J]%){0,9}|[A-J]{2,8})%".replace("%", _END)
)
# A or maybe B: two letters are stated.
_ALTERNATIVE = re.compile(
    r"[)）\]]?,?\s*or\s+(?:(?:maybe|possibly|perhaps|even|else|also)\s+)?(?:option\s+|choice\s+)?[(（\[]?([A-J])" + _END
)
_AFTER_LETTER = re.compile(
    r"\s*(?:$|[^\w\s'’]|\d[\d.,/%]*\W*$|(?:is|are|because|since|as|and|or|which|would|was|for|by|due|with|with)\b|[\u4e00-\u9fff\\])"
)
_INNER = re.compile(r"[(（\[]\s*([A-J])\s*[)）\]]|\b(?:option|choice|answer|选项)\s*([A-J])" + _END)
_RULED_OUT = re.compile(
    r"(?:\b(?:not|neither|nor|than|over|exclude|eliminate|reject|except|unlike)|n['’]t|n['’]t be"
    r"|\bcannot be|\bnot be|\b(?:anything|everything|all) but|排除|不选|不是)\s*"
    r"(?:(?:option|choice|answer|选项)\s*)?[(（\[\"']?$",
    re.IGNORECASE,
)
_IS_WRONG = re.compile(
    r"(?![)）\]:.]\s*false\W*$)[)）\]\"'*]*\s*(?:选?项|说法)?(?:均|都|也)?\s*[:：]?\s*(?:(?:is|are|was|looks|seems)\s+(?:also\s+|clearly\s+|therefore\s+)?)?"
    r"(?:wrong|incorrect|false|not\b|out\b|impossible|错误|不正确|不对|不符|错)",
    re.IGNORECASE,
)
_JUDGED = re.compile(
    r"(?<![A-Za-z0-9])([A-J](?:[、,，和与]?[A-J]){0,9})\s*(?:选?项|说法)?\s*(?:均|都|是|也)?正确(?!的?(?:选项|答案))"
    r"|^\W{0,9}(?:(?:option|statement|choice)\s+)?([A-J])\s*[).:]\W*(?:correct|true|right)\b",
    re.MULTILINE | re.IGNORECASE,
)
_MARKS = re.compile(
    r"(?<![A-Za-z0-9])[A-J]\s*(?:选?项|说法)?\s*(?:均|都|是|也)?(?:正确|错误|不正确)"
    r"|^\W{0,9}(?:(?:option|statement|choice)\s+)?[A-J]\s*[).:]\W*(?:in)?(?:correct|true|right|wrong|false)\b",
    re.MULTILINE | re.IGNORECASE,
)
_NONE = re.compile(
    r"none(?: of (?:the above|these|them|the (?:others?|options|choices)|those)(?: options| choices| answers)?)?"
)
_UNIT_LETTER = re.compile(r"[\d}°]\s*$")


def stated_letters(answer: Answer, key: Key) -> frozenset[str] | None:
    """Return the letters that an answer states, None where it states none."""
    said_whole = [letter for letter, option in key.options if _same_case(answer.tail, option)]
    if len(said_whole) == 1:
        return frozenset(said_whole)
    tail = plain(answer.tail)
    statements = [item for item in answer.statements if item.anchor in ("box", "tag", "stated")]
    said = [_as_statement(match, tail) for match in _SAID.finditer(tail) if not _ruled_out(match)]
    # "The answer is D: both A and C are true" has said D.
    ends = [(item.start, item.start + len(item.text)) for item in statements if _letters_in(item.text, key) is not None]
    said = [item for item in said if not any(start < item.start <= end for start, end in ends)]
    statements += [item for item in said if _letters_in(item.text, key) is not None]
    statements.sort(key=lambda item: -item.start)
    if not statements and len(_MARKS.findall(tail)) > 1 and (judged := _judged_letters(tail, key)):
        return judged
    statements += [item for item in answer.statements if item.anchor in ("whole", "bold")]
    for statement in statements:
        letters = None if _BARE.fullmatch(statement.text) else _by_text(statement, key, whole=True)
        letters = letters or _letters_in(statement.text, key, inner=statement.anchor == "stated")
        letters = letters or _by_text(statement, key, whole=False)
        if letters is not None:
            return letters
        if statement.anchor == "box":
            return None
    return _bare_letters(tail, key) or _judged_letters(tail, key)


def _as_statement(match: re.Match[str], text: str) -> Statement:
    letters = next(group for group in match.groups() if group)
    line = text[match.start() :].partition("\n")[0]
    return Statement(letters, "stated", match.end() - 1, line)


def _ruled_out(match: re.Match[str]) -> bool:
    """Return whether "neither" or "not" stands before a match."""
    return _RULED_OUT.search(match.string, max(0, match.start() - 40), match.start()) is not None


def _letters_in(text: str, key: Key, inner: bool = False) -> frozenset[str] | None:
    """Return the letters at the start of a statement; with `inner`, else those in brackets further on."""
    text = re.sub(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf|it|tt)|mbox)\s*\{([^{}]*)\}", r" \1 ", plain(text))
    text = re.sub(r"\\[,;: ()\[\]]|[{}$\"“”]|(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"\\(?:q?quad|displaystyle|left|right)(?![a-z])", " ", text).strip()
    if bare := _BARE.fullmatch(text):
        return _allowed(bare[1].upper(), key)
    if len(key.letters) > 1 and re.fullmatch(r"[a-h]{2,8}|[a-h](?:\s*,\s*[a-h])+", text):
        return _allowed(re.sub(r"[\s,]", "", text).upper(), key)
    lead = _LEADING.match(text)
    if lead is not None:
        raw = lead["letters"]
        letters = re.findall(r"[A-Ja-j]", re.sub(r"\band\b|\bor\b", " ", raw))
        rest = text[lead.end() :]
        if _IS_WRONG.match(rest):
            return None
        if alternative := _ALTERNATIVE.match(rest):
            return _allowed("".join([*letters, alternative[1]]).upper(), key)
        if re.fullmatch(r"[A-J]{2,8}", raw):
            # AC is two letters, BAD is a word.
            if len(set(raw)) == len(raw) and (list(raw) == sorted(raw) or len(key.letters) > 1):
                return _allowed(raw, key)
        elif letters[-1] not in "AI" or _AFTER_LETTER.match(rest):
            return _allowed("".join(letters).upper(), key)
        elif len(letters) > 1:
            return _allowed("".join(letters[:-1]).upper(), key)  # "(C) A gas"
    if inner:
        found = [match[1] or match[2] for match in _INNER.finditer(text)]
        found = [letter for letter in found if letter <= key.last]
        if len(set(found)) == 1 or (found and len(key.letters) > 1):
            return _allowed("".join(found), key)
        if (end := re.search(rf"(?<![A-Za-z0-9'’])([A-J]){_END}\W*$", text)) and not _UNIT_LETTER.search(
            text[: end.start()]
        ):
            return _allowed(end[1], key)
    return None


def _allowed(letters: str, key: Key) -> frozenset[str] | None:
    last = max(key.last, "D")
    return frozenset(letters) if letters and max(letters) <= last else None


def _by_text(statement: Statement, key: Key, whole: bool) -> frozenset[str] | None:
    """Return the letter of the option whose text a statement is, or unless `whole` the only one that it holds."""
    for text in dict.fromkeys((statement.text, statement.line)):
        stated = normalise(text, True)
        for same in (_same_case, _same_text):
            equals = [letter for letter, option in key.options if same(text, option)]
            if len(equals) == 1:
                return frozenset(equals)
        if not whole and statement.anchor in ("stated", "whole", "tag") and len(key.options) > 1:
            held = [letter for letter, option in key.options if _holds(stated, normalise(option, True))]
            if len(held) == 1:
                return frozenset(held)
    return None


def _same_case(stated: str, option: str) -> bool:
    if _NONE.fullmatch(normalise(option, True)):
        return _NONE.fullmatch(normalise(stated, True)) is not None
    return normalise(stated) == normalise(option)


def _same_text(stated: str, option: str) -> bool:
    if normalise(stated, True) == normalise(option, True):
        return True
    if not re.search(r"\d", stated):
        return False
    pairs = [(left, right) for left in read(option) for right in read(stated, True)]
    return any(equal(left, right) for left, right in pairs if not isinstance(left, Words))


def _holds(stated: str, option: str) -> bool:
    counted = option.isdigit() and len(re.findall(r"\d+", stated)) == 1
    return (len(option) > 1 or counted) and re.search(rf"(?<![\w.]){re.escape(option)}(?![\w])", stated) is not None


def _judged_letters(text: str, key: Key) -> frozenset[str] | None:
    """Return the letters that a text calls correct one by one: A项错误，B项正确."""
    judged = "".join(
        letters for match in _JUDGED.finditer(text) for letters in re.findall("[A-J]", (match[1] or match[2]).upper())
    )
    return _allowed(judged, key) if len(set(judged)) == 1 or len(key.letters) > 1 else None


def _bare_letters(text: str, key: Key) -> frozenset[str] | None:
    """Return the letter of an answer that is hardly more, or that ends in one."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    labels = [line for line in lines if re.match(r"\W*[A-J]\s*[).:．、：]", line)]
    for line in (lines[0], lines[-1]):
        bare = _BARE.fullmatch(line)
        labelled = _LABELLED.fullmatch(line) if len(labels) == 1 else None
        if bare or labelled:
            letters = _letters_in(line, key)
            if letters is not None:
                return letters
        if _SEVERAL.fullmatch(line.strip(" .。")):
            return _allowed("".join(re.findall("[A-J]", line)), key)
    ending = lines[-1][-400:]
    candidates = list(_capitals(ending, key))
    short = len(lines) <= 2 and len(text.split()) <= 14
    if short and re.search(r"\b(?:all|both|each)\b", text, re.IGNORECASE):
        return _allowed("".join(letter for letter, _ in candidates), key)
    if short and candidates:
        return frozenset(candidates[-1][0])
    end = [letter for letter, position in candidates if not ending[position + 1 :].strip(" )）].。!*\"'$}")]
    bracketed = [
        letter for letter, position in candidates if ending[position - 1 : position] in ("(", "（") and position
    ]
    chosen = end or bracketed
    return frozenset(chosen[-1]) if chosen else None


def _capitals(line: str, key: Key) -> Iterator[tuple[str, int]]:
    """Yield the stand-alone letters of a line that are no words and no units, with their positions."""
    for match in re.finditer(r"(?<![A-Za-z0-9'’])([A-J])" + _END, line):
        letter, rest = match[1], line[match.end() :]
        bracketed = line[match.start() - 1 : match.start()] in ("(", "（") if match.start() else False
        # What is ruled out is no answer: "not C", "D is wrong".
        if _RULED_OUT.search(line[: match.start()]) or _IS_WRONG.match(rest):
            continue
        if letter > key.last or (_UNIT_LETTER.search(line[: match.start()]) and not bracketed):
            continue
        if (
            letter in "AI"
            and not bracketed
            and re.match(r"\s+\w", rest)
            and not re.match(r"\s+(?:is|because|since)\b", rest)
        ):
            continue
        yield letter, match.start()
