"""Marks of a chat template: the special texts that open and end turns, and whether a tokenizer knows them.

A model learns to stop only where the mark that ends an answer is one token. A template whose marks the tokenizer does
not know would be trained on as pieces of text, and the model would write on for ever. Training asks this module before
it tokenizes; `bmjax.weights.student` opens models through it.
"""

import re
from dataclasses import dataclass
from typing import Any

from bmjax.chat.template import TEMPLATE_NAMES, named_template, render
from bmjax.config import UserError

# <|im_end|>, <｜User｜>, [|endofturn|], </s>, <end_of_turn>
_MARK = re.compile(r"<[|｜][^<>\s]*?[|｜]>|\[\|\w+\|\]|</?s>|<(?:start|end)_of_\w+>")
_QUESTION, _ANSWER = "bmjaxquestion", "bmjaxanswer"
_PROBES = (
    [("system", "bmjaxsystem"), ("user", _QUESTION), ("assistant", _ANSWER)],
    [("user", _QUESTION), ("assistant", _ANSWER)],
)


@dataclass(frozen=True)
class Marks:
    """The special texts that a template writes around turns, in the order of their first use.

    Attributes:
        texts: all of them, each once.
        end: the one that follows an answer; None where none does.
    """

    texts: tuple[str, ...]
    end: str | None


def marks_of(tokenizer: Any, template: str) -> Marks:
    """Return the marks that a template writes, found by rendering a question and its answer."""
    special = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    rendered = ""
    for probe in _PROBES:
        turns = [{"role": role, "content": content} for role, content in probe]
        try:
            rendered = render(tokenizer, turns, template, "template", prompt=False)
            break
        except UserError:  # a template without a system turn, or for conversations of another form
            continue
    known = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))
    pattern = re.compile(f"{known}|{_MARK.pattern}" if known else _MARK.pattern)
    texts = tuple(dict.fromkeys(match[0] for match in pattern.finditer(rendered)))
    after = rendered[rendered.rfind(_ANSWER) + len(_ANSWER) :] if _ANSWER in rendered else ""
    end = pattern.search(after)
    return Marks(texts, end[0] if end else None)


def end_of_turn(tokenizer: Any, template: str) -> int | None:
    """Return the token that the template writes after an answer, where a generation ends; None where there is none."""
    end = marks_of(tokenizer, template).end
    tokens = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return int(tokens[0]) if len(tokens) == 1 else None


def missing(tokenizer: Any, marks: Marks) -> list[str]:
    """Return the marks that are not one token of the tokenizer."""
    return [text for text in marks.texts if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != 1]


def fitting_templates(tokenizer: Any) -> list[str]:
    """Return the names of the templates that end turns with a mark of the tokenizer, and use no other marks."""
    names = []
    for name in TEMPLATE_NAMES:
        marks = marks_of(tokenizer, named_template(name))
        if marks.end is not None and not missing(tokenizer, marks):
            names.append(name)
    return names


def add_marks(tokenizer: Any, texts: list[str], vocab_size: int) -> dict[str, int]:
    """Add texts as special tokens in free rows of the vocabulary.

    Arguments:
        tokenizer: changed in place.
        texts: marks that it does not know.
        vocab_size: rows of the model's embedding.

    Returns:
        The id of each added token, in the order of `texts`.

    Raises:
        UserError: when the embedding has too few rows that no token uses.
    """
    from tokenizers import AddedToken

    used = max(tokenizer.get_vocab().values(), default=-1) + 1
    if used + len(texts) > vocab_size or len(tokenizer) != used:
        raise UserError(
            f"template: {', '.join(texts)} would be new tokens, and the model's vocabulary of {vocab_size} rows has "
            f"{max(vocab_size - used, 0)} free ones behind the tokenizer's {used}"
        )
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
    return {text: int(tokenizer.convert_tokens_to_ids(text)) for text in texts}
