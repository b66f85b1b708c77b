"""The rules that look at one trace: is it whole, well-formed, right, of a fit length, in its language, without loops?

Rules that compare traces are in ledger.py and questions.py. `REASONS` names all of them in the order of a table.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from bmjax.chat.reasoning import has_tags
from bmjax.config import UserError
from bmjax.io.hub import model_directory
from bmjax.teach.record import Record, is_whole
from bmjax.teach.selection.language import foreign_script
from bmjax.teach.selection.repetition import repetition
from bmjax.teach.settings import Selection

# What each reason means, for the data card and the documentation.
REASONS = {
    "duplicate": "the same trace again: its id, or its prompt, reasoning and response",
    "truncated": "cut off: a finish reason other than stop, eos, end_turn or stop_sequence",
    "refused": "a filter or a refusal ended it",
    "malformed": "not exactly one <think>...</think> before an answer",
    "wrong": "judged wrong",
    "right": "judged right, which `keep` leaves out",
    "unjudged": "nobody could judge it",
    "too short": "fewer tokens than `min_tokens`",
    "too long": "more tokens than `max_tokens`, or characters than `max_characters`",
    "language": "letters of a script that none of `languages` is written in",
    "repetition": "loops: more of it stood in it before than `max_repetition`",
    "pass rate": "its prompt is solved more or less often than `pass_rate` says",
    "held out": "its prompt holds a prompt of `held_out`",
    "contaminated": "it holds a question of a benchmark of `decontaminate`",
    "near duplicate": "nearly the prompt of other traces, which are kept",
    "enough": "`per_prompt` traces of its prompt are kept",
    "quota": "`per_source` traces of its source are kept",
}

_REFUSALS = ("filter", "refus", "safety", "blocklist", "prohibited", "recitation", "spii", "moderation", "censor")
_TAGS = re.compile(
    r"<\s*/?\s*(?:think|thinking|thought|reasoning)\s*/?>|<\|(?:begin|end)_of_(?:thought|solution)\|>", re.IGNORECASE
)


class Drop(NamedTuple):
    """Why a trace is dropped. cause: a name to count by, as a finish reason. detail: for examples."""

    reason: str
    cause: str = ""
    detail: str = ""


class Rules:
    """The rules of one trace that the settings ask for.

    Attributes:
        by_teacher, by_tokenizer, unmeasured: how many traces were measured how, where a length in tokens is asked for.
    """

    def __init__(self, settings: Selection) -> None:
        self.settings = settings
        self.by_teacher = self.by_tokenizer = self.unmeasured = 0
        self._count = _counter(settings.tokenizer) if settings.tokenizer else None

    def drop(self, record: Record) -> Drop | None:
        """Return why a trace is not worth training on whatever else there is, or None."""
        settings = self.settings
        if not is_whole(record.finish_reason):
            refused = any(word in record.finish_reason.lower() for word in _REFUSALS)
            return Drop("refused" if refused else "truncated", record.finish_reason, f"ended: {record.finish_reason}")
        if problem := self._malformed(record):
            return Drop("malformed", problem, problem)
        if record.verdict not in settings.keep:
            verdict = record.verdict if record.verdict in ("right", "wrong") else "unjudged"
            return Drop(
                verdict, record.verdict_by, f"judged by {record.verdict_by}; reference {record.reference!r:.80}"
            )
        if drop := self._length(record):
            return drop
        if settings.languages:
            text = f"{record.reasoning}\n{record.response}"
            if foreign := foreign_script(text, record.prompt, settings.languages, settings.max_foreign):
                return Drop("language", foreign[0], f"{100 * foreign[1]:.2g}% of its letters are {foreign[0]}")
        if settings.max_repetition is not None:
            share = repetition(record.reasoning or record.response)
            if share > settings.max_repetition:
                return Drop("repetition", "", f"{100 * share:.0f}% of it stood in it before")
        return None

    def _malformed(self, record: Record) -> str:
        if has_tags(record.reasoning, record.response) or any(
            "<" in text and _TAGS.search(text) for text in (record.reasoning, record.response)
        ):
            return "more than one thought, or a tag left over"
        if not record.response.strip():
            return "no answer"
        if self.settings.require_reasoning and not record.reasoning.strip():
            return "no reasoning"
        return ""

    def tokens(self, record: Record) -> int | None:
        """Return how many tokens an answer has as the teacher counted, else by the tokenizer, else None."""
        tokens = record.usage.get("completion_tokens")
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            self.by_teacher += 1
            return tokens
        if self._count is not None:
            self.by_tokenizer += 1
            return self._count(f"{record.reasoning}\n{record.response}")
        self.unmeasured += 1
        return None

    def _length(self, record: Record) -> Drop | None:
        settings = self.settings
        if settings.min_tokens is not None or settings.max_tokens is not None:
            tokens = self.tokens(record)
            if tokens is not None and tokens < (settings.min_tokens or 0):
                return Drop("too short", "", f"{tokens:,} tokens")
            if tokens is not None and settings.max_tokens is not None and tokens > settings.max_tokens:
                return Drop("too long", "", f"{tokens:,} tokens")
        characters = len(record.prompt) + len(record.reasoning) + len(record.response)
        if settings.max_characters is not None and characters > settings.max_characters:
            return Drop("too long", "", f"{characters:,} characters")
        return None


def _counter(name: str) -> Callable[[str], int]:
    """Return what counts the tokens of a text by the tokenizer of a model."""
    from bmjax.weights.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_directory(name, label="tokenizer: ", weights=False))
    if tokenizer is None:
        raise UserError(f"tokenizer: {name} has no tokenizer")
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
