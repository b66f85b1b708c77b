"""An answer's text, as its tokens come: no character is cut, and it ends before a stop string.

The server, the terminal and `bmjax.generate` use it. One object an answer. `answer_text` is for whole answers.
"""

from collections.abc import Collection, Sequence
from typing import Any

from bmjax.chat.reasoning import THINKING_TAGS
from bmjax.config import UserError
from bmjax.generate.decoding import token_decoder


def answer_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of a whole answer with its thinking tags, also where they are special tokens."""
    stream = TextStream(tokenizer, keep=THINKING_TAGS)
    return stream.push(tokens) + stream.finish()


class TextStream:
    """Turns the tokens of one answer into text.

    Arguments:
        tokenizer: transformers' fast tokenizer; special tokens have no text.
        stop: strings that end the answer; the text ends before the first that appears in it.
        keep: special tokens that have their text all the same.

    Attributes:
        text: what has been returned so far.
        stopped: the stop string that was found, or None; tokens that come later are not looked at.

    Raises UserError for an empty stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), keep: Collection[str] = ()) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        if not all(isinstance(string, str) and string for string in stop):
            raise UserError("stop: expected strings that are not empty")
        self.text = ""
        self.stopped: str | None = None
        self._decoder, self._stop = token_decoder(tokenizer, keep), tuple(stop)
        self._held = ""  # decoded, but it may be the beginning of a stop string

    def push(self, tokens: Sequence[int]) -> str:
        """Take the answer's next tokens; return the text that is sure now."""
        if self.stopped is not None:
            return ""
        return self._release(self._decoder.push(tokens), last=False)

    def finish(self) -> str:
        """Return the rest of the text, once the answer has ended."""
        if self.stopped is not None:
            return ""
        return self._release(self._decoder.finish(), last=True)

    def _release(self, new: str, last: bool) -> str:
        """Return what can be told of the held and the new text."""
        held = self._held + new
        ends = [(at, string) for string in self._stop if (at := held.find(string)) >= 0]
        if ends:
            at, self.stopped = min(ends)
            sure = held[:at]
        else:
            sure = held if last else held[: len(held) - self._beginning(held)]
        self._held = "" if last or self.stopped is not None else held[len(sure) :]
        self.text += sure
        return sure

    def _beginning(self, text: str) -> int:
        """Return how many last characters of a text may begin a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-size:]) for string in self._stop):
                return size
        return 0
