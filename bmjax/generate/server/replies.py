"""Replies in OpenAI's form: whole and as chunks of a stream, of chats and of completions.

An answer arrives in pieces (`Piece`); a whole reply is the sum of them. Log-probabilities are the model's own, before
temperature and filters. OpenAI's JSON has no infinities: what is impossible has log-probability -9999.
"""

import codecs
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.generate.requests import Token

IMPOSSIBLE = -9999.0
TokenText = Callable[[int], tuple[str, bytes]]  # of a token id: its text, and its bytes


@dataclass(frozen=True)
class Piece:
    """What is added to an answer.

    Attributes:
        text: of the response.
        reasoning: text before it, between <think> and </think>; of chats only.
        tokens: those that arrived; a text may follow its token later.
        finish_reason: 'stop' or 'length' at the end of the answer.
    """

    text: str = ""
    reasoning: str = ""
    tokens: Sequence[Token] = ()
    finish_reason: str | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the whole answer."""
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish_reason,
    )


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Return what a request cost, in tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


class Form:
    """What the replies to one request have in common."""

    prefix = name = chunk_name = ""

    def __init__(self, model: str, token_text: TokenText, logprobs: bool) -> None:
        """model: the name that the client gave. logprobs: whether they are shown."""
        self.model, self.token_text, self.logprobs = model, token_text, logprobs
        self.id, self.created = self.prefix + uuid.uuid4().hex, int(time.time())

    def body(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return a whole reply with these choices and further fields."""
        return {"id": self.id, "object": self.name, "created": self.created, "model": self.model, "choices": choices,
                **fields}  # fmt: skip

    def event(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return a chunk of a stream with these choices and further fields."""
        return self.body(choices, **fields) | {"object": self.chunk_name}


class ChatForm(Form):
    """Replies of /v1/chat/completions."""

    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the choice that begins an answer's stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a whole reply."""
        message = {"role": "assistant", "content": piece.text}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        return {"index": index, "message": message, **self._ending(piece)}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        delta = {"reasoning_content": piece.reasoning} if piece.reasoning else {}
        delta |= {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, **self._ending(piece)}

    def _ending(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and piece.tokens:
            logprobs = {"content": [self._entry(token) for token in piece.tokens], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _entry(self, token: Token) -> dict[str, Any]:
        likeliest = [self._valued(token_id, logprob) for token_id, logprob in token.likeliest]
        return {**self._valued(token.id, token.logprob), "top_logprobs": likeliest}

    def _valued(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, encoded = self.token_text(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(encoded)}


class CompletionForm(Form):
    """Replies of /v1/completions. `text_offset` counts the characters of earlier tokens, an echoed prompt's too."""

    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, token_text: TokenText, logprobs: bool) -> None:
        super().__init__(model, token_text, logprobs)
        self._offsets: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a whole reply."""
        return self.chunk(index, piece)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        logprobs = self._logprobs(index, piece.tokens) if self.logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        decoder, offset = self._offsets.get(index) or (codecs.getincrementaldecoder("utf-8")("ignore"), 0)
        names, logprobs, tops, offsets = [], [], [], []
        for token in tokens:
            name, encoded = self.token_text(token.id)
            names.append(name)
            logprobs.append(None if token.logprob is None else finite(token.logprob))
            offsets.append(offset)
            offset += len(decoder.decode(encoded))
            top: dict[str, float] | None = None
            if token.logprob is not None:
                # Two tokens may have one text; the likelier one is shown.
                top = {}
                for token_id, logprob in [*token.likeliest, (token.id, token.logprob)]:
                    top.setdefault(self.token_text(token_id)[0], finite(logprob))
            tops.append(top)
        self._offsets[index] = decoder, offset
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def finite(logprob: float | None) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, IMPOSSIBLE) if logprob is not None and logprob == logprob else IMPOSSIBLE
