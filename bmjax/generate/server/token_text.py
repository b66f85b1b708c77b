"""Texts and bytes of single tokens, as log-probabilities show them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bmjax.generate.decoding import token_bytes


def token_texts(tokenizer: Any) -> Callable[[int], tuple[str, bytes]]:
    """Return a function from a token id to (text, bytes).

    A token whose bytes are no whole characters has the text `bytes:\\xe2\\x80`, as OpenAI shows it. An id behind the
    tokenizer's, a free row of the model's vocabulary, has none.
    """
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}

    @lru_cache(maxsize=2**18)
    def token_text(token_id: int) -> tuple[str, bytes]:
        if token_id in added:
            return added[token_id], added[token_id].encode()
        token = tokenizer.backend_tokenizer.id_to_token(token_id)
        if token is None:
            return "", b""
        encoded = token_bytes(token) if is_byte_level else tokenizer.decode([token_id]).encode()
        try:
            return encoded.decode(), encoded
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded), encoded

    return token_text
