"""Replies of the OpenAI chat API as clients read them: whole or as a stream of events, of many servers.

The reasoning comes in one of five places; replies are read leniently and become one `Completion`. What is asked, and
how bmjax answers it itself, is in openai.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.chat.context_length import Excess, context_excess
from bmjax.chat.reasoning import CLOSE, OPEN, split_think

UNREADABLE = "unreadable"  # the finish reason of an answer that was paid for and is none
REFUSAL = "refusal"  # of one that the model declined to give

_NO_BALANCE = {
    "insufficient_quota", "insufficient_balance", "insufficient_user_quota", "exceeded_current_quota_error",
    "billing_hard_limit_reached", "billing_not_active", "arrearage",
}  # fmt: skip
# HTTP statuses for the names that error objects carry, by what the name contains.
_STATUS_OF_NAME = (
    ("rate_limit", 429), ("overloaded", 503), ("unavailable", 503), ("timeout", 504), ("server_error", 500),
    ("internal", 500), ("invalid_api_key", 401), ("authentication", 401), ("permission", 403), ("moderation", 403),
    ("content_filter", 403), ("content_policy", 403), ("not_found", 404), ("context_length", 400), ("invalid", 400),
)  # fmt: skip
_TEXT_KEYS = ("text", "thinking", "reasoning", "content", "summary", "refusal")
_REASONING_PARTS = (
    "thinking",
    "redacted_thinking",
    "reasoning",
    "reasoning.text",
    "reasoning.summary",
    "reasoning_text",
)


@dataclass(frozen=True)
class Completion:
    """An answer. usage: tokens as the endpoint counted them. logprobs: as OpenAI has them, None without.

    finish_reason: the endpoint's word for why the answer ended, None where it gave none.
    """

    reasoning: str
    response: str
    finish_reason: str | None
    usage: dict[str, Any]
    logprobs: Any = None


class ReplyError(Exception):
    """An error object in place of an answer.

    Attributes:
        status: the HTTP status that it stands for, None where it does not say.
        excess: what it says of the context's length, None where it speaks of something else.
    """

    def __init__(self, message: str, status: int | None, excess: Excess | None = None) -> None:
        super().__init__(message)
        self.status, self.excess = status, excess


class NoCompletion(Exception):
    """A body without an answer, such as a page of HTML, half a JSON object or a stream that broke off."""


class EmptyCompletion(NoCompletion):
    """An answer without a token: a failure of the endpoint's, or a model that ended its turn at once.

    Attributes:
        completion: the answer.
    """

    def __init__(self, completion: Completion) -> None:
        super().__init__("an answer without a single token")
        self.completion = completion


def read_completion(values: Any) -> Completion:
    """Return the first answer in a decoded body.

    An answer of an unknown form that was paid for has the finish reason `unreadable` and is kept as JSON text.

    Raises:
        ReplyError: for an error object, of the body or of the answer.
        NoCompletion: when there is no answer, nor a sign that one was paid for.
        EmptyCompletion: for an answer without a token.
    """
    if not isinstance(values, dict):
        raise NoCompletion(f"not a chat completion: a JSON {type(values).__name__}")
    choices = values.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for holder in (values, choice):
        if isinstance(holder, dict) and holder.get("error"):
            raise ReplyError(*read_error(holder))
    usage = values["usage"] if isinstance(values.get("usage"), dict) else {}
    generated = usage.get("completion_tokens")
    if not isinstance(choice, dict):
        choice = {"choices": choices}
    finish_reason = _finish_reason(choice.get("finish_reason"))
    message = choice.get("message", choice.get("text"))
    try:
        reasoning, response, refused = _read_message(message)
    except ValueError as problem:
        if not message and not generated:
            raise NoCompletion(f"not a chat completion: {problem}") from None
        return Completion("", json.dumps(message or choice), UNREADABLE, usage)
    logprobs = _without_bytes(choice.get("logprobs"))
    completion = Completion(reasoning, response, REFUSAL if refused else finish_reason, usage, logprobs)
    if generated == 0 and not (reasoning or response) and finish_reason in (None, "stop"):
        raise EmptyCompletion(completion)
    return completion


def read_error(values: Mapping[str, Any], status: int | None = None) -> tuple[str, int | None, Excess | None]:
    """Return an error body's words, the HTTP status that its code stands for, and its `Excess` over the context.

    The status is 402 where no balance is left. status: of the reply that holds the body; None where that is an answer.
    """
    words = (values.get(key) for key in ("error", "detail", "message", "errors"))
    error = next((value for value in words if value and isinstance(value, (str, dict, list))), values)
    if not isinstance(error, Mapping):
        message = error if isinstance(error, str) else _list_message(error)
        return message, None, context_excess(message, [str(values.get(key, "")) for key in ("code", "type")], status)
    message = str(error.get("message") or error.get("detail") or json.dumps(error))
    metadata = error.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):
        message = f"{message}: {metadata['raw']}"
    names = [str(error.get(key, "")).lower() for key in ("code", "type", "status")]
    code = _status_of(names)
    excess = None if code == 402 else context_excess(message, names, code if status is None else status)
    return message, 400 if code is None and excess else code, excess


def _list_message(errors: Sequence[Any]) -> str:
    """Return the words of a list of errors. FastAPI's hold the request, whose words are none of the error's."""
    texts = []
    for error in errors:
        words = error.get("msg") if isinstance(error, Mapping) else None
        if isinstance(words, str):
            path = error.get("loc")
            keys = path if isinstance(path, list) else []
            texts.append(": ".join([*([".".join(map(str, keys))] if keys else []), words]))
        else:
            texts.append(json.dumps(error))
    return "; ".join(texts)


def _status_of(names: Sequence[str]) -> int | None:
    """Return the HTTP status that the names of an error object stand for."""
    if _NO_BALANCE.intersection(names):
        return 402
    for name in names:
        if re.fullmatch(r"[45]\d\d", name):
            return int(name)
    return next((status for name in names for part, status in _STATUS_OF_NAME if part in name), None)


def _finish_reason(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("type")
    return None if value is None or value == "" else str(value)


def _read_message(message: Any) -> tuple[str, str, bool]:
    """Return (reasoning, response, whether it is a refusal). ValueError for a message of an unknown form."""
    if isinstance(message, str):
        message = {"content": message}
    if not isinstance(message, dict) or not message:
        raise ValueError("no message")
    thoughts, answers, refused = _split_parts(message.get("content"))
    apart = next((text for key in ("reasoning_content", "reasoning") if (text := _text(message.get(key)).strip())), "")
    if not apart and isinstance(message.get("reasoning_details"), list):
        apart = "".join(_split_parts(message["reasoning_details"])[0])
    apart = (apart or "".join(thoughts)).strip().removeprefix(OPEN).removesuffix(CLOSE).strip()
    inside, response = split_think("".join(answers))
    # An endpoint that sends the reasoning apart may leave it in the content as well.
    reasoning = apart if not inside or inside in apart else f"{apart}\n{inside}".strip()
    if not response and isinstance(message.get("refusal"), str) and message["refusal"]:
        return reasoning, message["refusal"], True
    return reasoning, response, refused


def _split_parts(content: Any) -> tuple[list[str], list[str], bool]:
    """Return (texts of reasoning, texts of the answer, whether a part is a refusal) of a content in parts."""
    thoughts: list[str] = []
    answers: list[str] = []
    refused = False
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in _REASONING_PARTS:
            thoughts.append(_text(part))
        elif kind in ("text", "output_text", "refusal"):
            answers.append(_text(part))
            refused |= kind == "refusal"
        elif kind != "reasoning.encrypted":
            raise ValueError(f"a part of type {str(kind)[:40]!r}")
    return thoughts, answers, refused


def _text(value: Any) -> str:
    """Return the text in a value: itself, that of its items, or that of its field of text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, dict):
        return next((text for key in _TEXT_KEYS if (text := _text(value.get(key)))), "")
    raise ValueError(f"a text that is a {type(value).__name__}")


def _without_bytes(logprobs: Any) -> Any:
    """Return log-probabilities without the bytes of tokens that their text tells as well, half of their size."""
    if isinstance(logprobs, list):
        return [_without_bytes(entry) for entry in logprobs]
    if not isinstance(logprobs, dict):
        return logprobs
    kept = {key: _without_bytes(value) for key, value in logprobs.items()}
    token, encoded = kept.get("token"), logprobs.get("bytes")
    if encoded is None or (isinstance(token, str) and encoded == list(token.encode("utf-8", "surrogatepass"))):
        kept.pop("bytes", None)
    return kept


class ReplyReader:
    """Reads the body of a reply as its bytes arrive: one JSON object, blank lines before it, or a stream of events.

    Only the text of a stream is kept, so that a long answer takes no more memory than itself. max_bytes: the most that
    is read. done: whether the stream said its last word; a server may leave the connection open after it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.done = False
        self._left, self._buffer, self._is_stream = max_bytes, bytearray(), False
        self._events = Events()
        self._merged = _MergedChunks()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises ReplyError and NoCompletion."""
        self._left -= len(chunk)
        if self._left < 0:
            raise NoCompletion("a body of more bytes than any answer has")
        if not self._is_stream and not self._buffer:
            chunk = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
        self._buffer += chunk
        self._is_stream = self._is_stream or self._buffer.startswith((b"data:", b"event:", b"id:", b"retry:", b":"))
        if self._is_stream and (b"\n" in chunk or b"\r" in chunk):
            lines = bytes(self._buffer).splitlines(keepends=True)
            rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
            self._buffer = bytearray(rest)
            self._take(lines)

    def _take(self, lines: Sequence[bytes]) -> None:
        for event in self._events.read(lines):
            if event is None:
                self.done = True
            elif not self.done:
                self._merged.add(event)

    def finish(self) -> Completion:
        """Return the answer at the end of the body. Raises ReplyError and NoCompletion."""
        if not self._is_stream:
            try:
                values = json.loads(self._buffer)
            except (ValueError, RecursionError):
                start = " ".join(self._buffer[:200].decode("utf-8", "replace").split())
                raise NoCompletion(f"not a chat completion: {start[:80] or 'an empty body'}") from None
            return read_completion(values)
        self._take([bytes(self._buffer), b"\n"])
        values = self._merged.values()
        if not self.done and values["choices"] and values["choices"][0]["finish_reason"] is None:
            raise NoCompletion("the stream broke off")
        return read_completion(values)


class Events:
    """Decodes server-sent events."""

    def __init__(self) -> None:
        self._name, self._data = "", b""

    def read(self, lines: Sequence[bytes]) -> Iterator[dict[str, Any] | None]:
        """Yield the JSON object of each event, None for the mark of the end."""
        for line in lines:
            line = line.rstrip(b"\r\n")
            name, _, value = line.partition(b":")
            if not line:
                if self._data:
                    raise NoCompletion(f"an event of the stream is no JSON: {self._data[:80].decode(errors='replace')}")
                self._name = ""
            elif name == b"event":
                self._name = value.strip().decode(errors="replace")
            elif name == b"data":
                self._data += (b"\n" if self._data else b"") + value.strip()
                if self._data == b"[DONE]":
                    self._data = b""
                    yield None
                    continue
                # Some servers leave out the blank line between events, so that data are read as soon as they are whole.
                try:
                    event = json.loads(self._data) if self._data else {}
                except (ValueError, RecursionError):
                    continue
                self._data = b""
                if self._name == "error" and isinstance(event, dict):
                    event = event if event.get("error") else {"error": event}
                if isinstance(event, dict):
                    yield event


class _MergedChunks:
    """Puts the chunks of a streamed answer together into a body like that of one that was not streamed."""

    def __init__(self) -> None:
        self._message: dict[str, list[Any]] = {}
        self._logprobs: dict[str, list[Any]] = {}
        self._finish_reason: Any = None
        self._usage: Any = None
        self._is_begun = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Add a chunk. Raises ReplyError for one that is an error object."""
        choices = chunk.get("choices")
        choices = choices if isinstance(choices, list) else []
        choice = next((c for c in choices if isinstance(c, dict) and not c.get("index")), {})
        for holder in (chunk, choice):
            if holder.get("error"):
                raise ReplyError(*read_error(holder))
        self._usage = chunk.get("usage") or self._usage
        self._is_begun = self._is_begun or bool(choice)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        delta = choice.get("delta") or choice.get("message")
        if isinstance(choice.get("text"), str):
            delta = {"content": choice["text"]}
        for key, value in delta.items() if isinstance(delta, dict) else ():
            if value not in (None, "") and key != "role":
                self._message.setdefault(key, []).append(value)
        logprobs = choice.get("logprobs")
        for key, value in logprobs.items() if isinstance(logprobs, dict) else ():
            if isinstance(value, list):
                self._logprobs.setdefault(key, []).extend(value)

    def values(self) -> dict[str, Any]:
        """Return the body of the whole answer."""
        message: dict[str, Any] = {"role": "assistant"}
        for key, pieces in self._message.items():
            if all(isinstance(piece, str) for piece in pieces):
                message[key] = "".join(pieces)
            else:
                message[key] = [part for piece in pieces for part in (piece if isinstance(piece, list) else [piece])]
        choice = {"message": message, "finish_reason": self._finish_reason, "logprobs": self._logprobs or None}
        return {"choices": [choice] if self._is_begun else [], "usage": self._usage}
