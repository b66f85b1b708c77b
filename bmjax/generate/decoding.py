"""From tokens to text as they come: what has been told, joined, is what the tokenizer makes of all tokens together.

`text.TextStream` uses it; no stop strings here. Byte-level tokenizers (Qwen, Llama 3, DeepSeek) are decoded byte by
byte. Others are decoded a few tokens at a time behind one that has been told, for what stands first in a text is
written differently by some of them.
"""

import codecs
import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no whole character
# How far ahead transformers' clean-up looks: its ten replacements, one after another, by two to four characters.
LOOKAHEAD = 19


class TokenDecoder(Protocol):
    """Turns the tokens of one text into text."""

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that no later token can change."""

    def finish(self) -> str:
        """Return the rest of the text."""


def token_decoder(tokenizer: Any, keep: Collection[str] = ()) -> TokenDecoder:
    """Return a decoder of one text for transformers' fast tokenizer.

    Special tokens have no text, but for those in `keep`.
    """
    backend = tokenizer.backend_tokenizer
    kinds, skipped = _kinds(backend), special_tokens(backend).difference(keep)
    decoder: TokenDecoder
    if kinds == ("ByteLevel",):
        decoder = ByteDecoder(backend, skipped)
    else:
        decoder = WindowDecoder(backend, skipped, has_byte_tokens="ByteFallback" in kinds)
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return decoder
    # transformers cleans no BPE tokenizer up, unless this is set.
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    is_bpe = type(backend.model).__name__ == "BPE"
    return decoder if is_bpe and not forced else CleanedDecoder(decoder, tokenizer.clean_up_tokenization)


def _kinds(backend: Any) -> tuple[str, ...]:
    """Return the types of a tokenizer's decoder, and of the parts of a sequence."""
    if backend.decoder is None:
        return ()
    state = json.loads(backend.decoder.__getstate__())
    return tuple(part["type"] for part in state.get("decoders", [state]))


def special_tokens(backend: Any) -> set[str]:
    """Return the special tokens of a tokenizer."""
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; those of its characters where one of them stands for no byte."""
    byte_of = byte_of_character()
    try:
        return bytes(byte_of[character] for character in token)
    except KeyError:
        return token.encode()


class ByteDecoder:
    """The bytes of byte-level tokens as UTF-8. What is none becomes U+FFFD as soon as that is sure.

    Arguments:
        backend: the tokenizer of the package tokenizers.
        skipped: tokens that have no text.
    """

    def __init__(self, backend: Any, skipped: Collection[str]) -> None:
        self._backend, self._skipped = backend, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        """See `TokenDecoder`."""
        names = (self._backend.id_to_token(token) for token in tokens)  # None: a free row of the vocabulary
        return self._utf8.decode(b"".join(token_bytes(name) for name in names if name and name not in self._skipped))

    def finish(self) -> str:
        """See `TokenDecoder`."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """Any other tokenizer's text: new tokens are decoded behind the last told ones, whose text is taken off.

    Bytes that stand for characters (`<0xE2>`) are told together with the token that follows them: whether they are text
    is decided by all bytes in a row.

    Arguments:
        backend: the tokenizer of the package tokenizers.
        skipped: tokens that have no text.
        has_byte_tokens: whether its decoder makes bytes of tokens like `<0xE2>`.
    """

    def __init__(self, backend: Any, skipped: Collection[str], has_byte_tokens: bool) -> None:
        self._backend, self._skipped, self._has_byte_tokens = backend, skipped, has_byte_tokens
        self._told: list[int] = []  # the last tokens that were told, as few as have a text
        self._new: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """See `TokenDecoder`."""
        self._new += tokens
        text = self._decode([*self._told, *self._new])
        if text.endswith(REPLACEMENT) or self._ends_in_bytes():
            return ""
        return self._tell(text)

    def finish(self) -> str:
        """See `TokenDecoder`."""
        return self._tell(self._decode([*self._told, *self._new]))

    def _decode(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if self._backend.id_to_token(token) not in self._skipped]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def _ends_in_bytes(self) -> bool:
        if not self._has_byte_tokens:
            return False
        # Skipped tokens and free rows of the vocabulary stand between bytes as nothing would.
        names = (self._backend.id_to_token(token) for token in reversed(self._new))
        name = next((name for name in names if name and name not in self._skipped), "")
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")

    def _tell(self, text: str) -> str:
        before = self._decode(self._told)
        tokens = [*self._told, *self._new]
        start = len(tokens)
        while start > 0 and not self._decode(tokens[start:]):
            start -= 1
        self._told, self._new = tokens[start:], []
        return text[len(before) :]


class CleanedDecoder:
    """The text of another decoder after transformers' clean-up, which takes spaces before punctuation away.

    Arguments:
        decoder: of the text.
        clean: the clean-up of a whole text.
    """

    def __init__(self, decoder: TokenDecoder, clean: Any) -> None:
        self._decoder, self._clean = decoder, clean
        self._raw = ""  # since a place across which nothing is cleaned
        self._told = 0  # characters of it, cleaned

    def push(self, tokens: Sequence[int]) -> str:
        """See `TokenDecoder`."""
        self._raw += self._decoder.push(tokens)
        told = ""
        # Nothing is cleaned across a space and a character that follows it in none of the clean-up's patterns.
        raw = self._raw
        cuts = [
            i for i in range(1, len(raw))
            if raw[i - 1] == " " and raw[i] not in " .?!,'n" and raw[max(0, i - 2)] != "'"
        ]  # fmt: skip
        if cuts:
            told = self._clean(self._raw[: cuts[-1]])[self._told :]
            self._raw, self._told = self._raw[cuts[-1] :], 0
        # What is cleaned begins at a space; what comes later can reach back to one among the last characters.
        at = self._raw.find(" ", max(0, len(self._raw) - LOOKAHEAD))
        cleaned = self._clean(self._raw)
        sure = len(cleaned) if at < 0 else max(self._told, len(cleaned) - (len(self._raw) - at))
        told += cleaned[self._told : sure]
        self._told = sure
        if at < 0:
            self._raw, self._told = "", 0
        return told

    def finish(self) -> str:
        """See `TokenDecoder`."""
        self._raw += self._decoder.finish()
        rest = self._clean(self._raw)[self._told :]
        self._raw, self._told = "", 0
        return rest
