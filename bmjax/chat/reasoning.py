"""Reasoning in text: the only module that knows <think> and </think>, and the marks that others use for them.

A teacher's reply is split into reasoning and response, a training row joins them again, and a judge reads what follows
the reasoning.
"""

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"

# How other models and data sets mark a thought, and the answer after it.
THOUGHT_MARKS = (
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"),
)  # fmt: skip
ANSWER_MARKS = (("<|begin_of_solution|>", "<|end_of_solution|>"), ("<answer>", "</answer>"))

# Some tokenizers have these as special tokens. Text that is to be split or judged keeps them all the same.
THINKING_TAGS = (OPEN, CLOSE, *(tag for pair in THOUGHT_MARKS for tag in pair))


def split_think(content: str, reasoning: str | None = None) -> tuple[str, str]:
    """Split a reply into (reasoning, response).

    One leading <think>...</think> of the content is split off; the opening tag may be missing, as when the chat
    template gives it. An unclosed block is all reasoning. Anything else, two blocks for instance, stays whole in the
    response, tags included. Where the endpoint sends the reasoning apart, the content is the response.
    """
    if reasoning:
        return reasoning.strip(), content.strip()
    text = content.strip()
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if opened <= 1 and closed == 1 and (opened == 0 or text.startswith(OPEN)):
        before, _, after = text.removeprefix(OPEN).partition(CLOSE)
        return before.strip(), after.strip()
    if opened == 1 and closed == 0 and text.startswith(OPEN):
        return text.removeprefix(OPEN).strip(), ""
    return "", text


def opens_thought(prompt: str) -> bool:
    """Return whether a prompt ends with <think>, so that its answer begins inside the thought."""
    return prompt.rstrip().endswith(OPEN)


def with_opening(text: str, is_open: bool) -> str:
    """Return an answer with the <think> that its prompt ended with, where it does not repeat it."""
    return f"{OPEN}{text}" if is_open and not text.lstrip().startswith(OPEN) else text


def split_answer(text: str, is_open: bool = False) -> tuple[str, str]:
    """Split a whole answer into (reasoning, response), as `split_think` does. Without a thought it stays as it is.

    is_open: whether the prompt ends with <think>, see `opens_thought`.
    """
    reasoning, response = split_think(with_opening(text, is_open))
    return reasoning, text if response == text.strip() else response


class ThinkSplitter:
    """Splits an answer into reasoning and response while its text arrives.

    The joined parts are what `split_answer` makes of the whole answer, where it has one thought at its beginning or no
    tags at all. A stream cannot take back what it has told: a thought ends at its first closing tag, whatever follows,
    and where neither prompt nor answer opens one, all is response, a later </think> included. Who has the whole can
    split it with `split_answer` then.
    """

    def __init__(self, is_open: bool) -> None:
        """is_open: whether the prompt ends with <think>, so that the answer begins inside the block."""
        self._state: Literal["start", "opened", "thinking", "closed", "answering"] = "opened" if is_open else "start"
        self._held = ""
        self._has_thought = is_open

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """Take the next text; return the (reasoning, response) that it adds. What may be part of a tag is held back."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state == "start":
            begun = text.lstrip()
            if begun.startswith(OPEN):
                self._state, self._has_thought = "opened", True
            elif OPEN.startswith(begun) and not is_last:  # nothing but spaces, or the beginning of the tag
                self._held = text
                return "", ""
            else:
                self._state = "answering"
        if self._state == "opened":  # a tag that repeats the prompt's is left out as well
            text = text.lstrip()
            if OPEN.startswith(text) and not is_last:
                self._held = text
                return "", ""
            text = text.removeprefix(OPEN).lstrip()
            self._state = "thinking" if text else "opened"
        if self._state == "thinking":
            thought, closed, rest = text.partition(CLOSE)
            if closed:
                self._state, reasoning, text = "closed", thought.rstrip(), rest
            else:
                ending = 0 if is_last else _overlap(text, CLOSE)
                reasoning = text[: len(text) - ending].rstrip()
                self._held = text[len(reasoning) :]
                return reasoning, ""
        if self._state == "closed":
            text = text.lstrip()
            self._state = "answering" if text else "closed"
        if self._state == "answering" and self._has_thought:  # spaces at the end of the response are left out
            response = text.rstrip()
            self._held = text[len(response) :]
            return reasoning, response
        return reasoning, text


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text begin the tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def join_think(reasoning: str, response: str) -> str:
    """Write reasoning and response as the text of one assistant turn; without reasoning, the response alone."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n{response}" if reasoning else response


def has_tags(*texts: str) -> bool:
    """Return whether a tag of reasoning is in any of the texts."""
    return any(tag in text for tag in (OPEN, CLOSE) for text in texts)


def answer_of(text: str) -> str:
    """Return the text after the last </think>, stripped; all of it where there is none."""
    return text.rpartition(CLOSE)[2].strip()


def split_marked(content: str) -> tuple[str, str, bool]:
    """Split a text with marks of any kind into (reasoning, response, whether both are complete).

    Marks of THOUGHT_MARKS that begin the text count as <think> and </think>, and marks of ANSWER_MARKS around all that
    follows the thought are taken off. A text that is not of that form stays whole in the response, as in `split_think`.
    """
    text = content.strip()
    for opening, closing in THOUGHT_MARKS:
        if text.startswith(opening) or (opening not in text and CLOSE not in text and closing in text):
            text = text.replace(opening, OPEN).replace(closing, CLOSE)
    is_open = text.startswith(OPEN) and CLOSE not in text
    reasoning, response = split_think(text)
    for opening, closing in ANSWER_MARKS if reasoning else ():
        if response.startswith(opening):
            answer, closed, rest = response.removeprefix(opening).rpartition(closing)
            if not closed:
                is_open, answer = True, rest
            elif rest.strip():  # text after the answer belongs to it
                continue
            response = answer.strip()
    return reasoning, response, not is_open
