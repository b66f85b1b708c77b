"""Rows of multiple choice: the question with its options as letters, and the letter, or letters, as reference."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.teach.adapters.adapter import LeftOut, Row, question_of, text_of

ENGLISH = "Please reason step by step, and put the letter of your answer within \\boxed{}."
CHINESE = "请逐步推理，并把所有正确选项的字母写在 \\boxed{} 中。"

ANSWERS = ("answerKey", "label", "gold", "answer")

_HAN = re.compile(r"[\u4e00-\u9fff]")
_MARK = r"\s*\(?{letter}(?:[).．、:]|\s+(?=\S))\s*"  # (A) text, A. text, A、text


def instruction(row: Row) -> str:
    """Return the instruction in the language of the question. The Chinese one allows several letters."""
    return CHINESE if _HAN.search(text_of(row, "question", "query")) else ENGLISH


def as_choice(row: Row) -> str:
    """Return the name of the judge of letters."""
    return "choice"


def agieval_judge(row: Row) -> str:
    """Return the judge of a row of AGIEval; its cloze questions have no options."""
    return "choice" if row.get("options") or row.get("choices") else "math"


def prompt(row: Row) -> str:
    """Return the passage, the question and the options, a line each."""
    question = question_of(row, "Question", "question", "question_stem", "query")
    passage = text_of(row, "passage")
    # AGIEval's cloze questions have no options, and the hub's form writes them into the query.
    has_list = "query" not in row and ("label" not in row or row.get("options"))
    lines = listed(options(row)) if has_list else []
    return "\n".join([*([passage, ""] if passage else []), question, *([""] if lines else []), *lines])


def listed(texts: Sequence[str]) -> list[str]:
    """Return options as lines that begin with their letters."""
    return [f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False)]


def reference(row: Row) -> str:
    """Return the letter of the right option; several letters in their order where several are right."""
    if "Correct Answer" in row:
        return string.ascii_uppercase[_shuffled(row).index(text_of(row, "Correct Answer"))]
    if "label" in row and not row.get("options"):  # a cloze question
        if not (answer := text_of(row, "answer")):
            raise LeftOut("no answer")
        return answer
    texts = options(row)
    stated: Any = next((row[name] for name in ANSWERS if row.get(name) is not None), [])
    named = stated if isinstance(stated, list) else list(stated) if _is_letters(stated) else [stated]
    letters = sorted({_letter(row, value, texts) for value in named})
    if not letters:
        raise LeftOut("no answer")
    return "".join(letters)


def options(row: Row) -> list[str]:
    """Return the options in the order of their letters. LeftOut for fewer than two."""
    if "Correct Answer" in row:
        return _shuffled(row)
    value: Any = row.get("options") or row.get("choices") or []
    if isinstance(value, Mapping):  # ARC's labels beside texts, or texts by their letters
        value = value.get("text") or [text for _, text in sorted(value.items()) if isinstance(text, str)]
    if isinstance(value, str):  # as a table of texts holds a list
        value = json.loads(value)
    texts = [_without_mark(str(option), letter) for option, letter in zip(value, string.ascii_uppercase, strict=False)]
    while texts and texts[-1] == "N/A":  # MMLU-Pro fills up to ten
        texts.pop()
    if len(texts) < 2:
        raise LeftOut("no options")
    return texts


def _letter(row: Row, value: Any, texts: list[str]) -> str:
    """Return the letter that an index, a letter, a label or the text of an option means."""
    labels = row["choices"].get("label", []) if isinstance(row.get("choices"), Mapping) else []
    if value in labels:  # ARC numbers some of its options
        index = list(labels).index(value)
    elif (isinstance(value, int) and not isinstance(value, bool)) or str(value).isdecimal():
        index = int(value)
    elif len(letter := str(value).strip().strip("()").upper()) == 1:
        index = string.ascii_uppercase.find(letter)
    else:
        index = texts.index(str(value).strip()) if str(value).strip() in texts else -1
    if not 0 <= index < len(texts):
        raise LeftOut("no answer")
    return string.ascii_uppercase[index]


def _is_letters(value: Any) -> bool:
    """Return whether a text is several letters in order, as `ABD`."""
    return isinstance(value, str) and re.fullmatch(r"[A-J]{2,}", value) is not None


def _shuffled(row: Row) -> list[str]:
    """Return GPQA's options in an order that the question alone decides, the same in every run and on every machine."""
    import hashlib
    import random  # here, for the help of commands loads this module

    texts = [text_of(row, column) for column in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    if not texts[0]:
        raise LeftOut("no answer")
    texts = [text for text in texts if text]
    if len(texts) < 2:
        raise LeftOut("no options")
    seed = hashlib.sha256(text_of(row, "Question").encode()).digest()
    random.Random(int.from_bytes(seed, "big")).shuffle(texts)
    return texts


def _without_mark(option: str, letter: str) -> str:
    """Return an option without its own letter, which the prompt writes."""
    return re.sub(f"^{_MARK.format(letter=letter)}", "", option, count=1).strip()
