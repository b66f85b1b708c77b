"""Reads the tokens of a SentencePiece model, `tokenizer.model`, without the package: a protobuf message of pieces.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Iterator
from pathlib import Path

_VARINT, _EIGHT_BYTES, _TEXT, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_PIECES = 1  # of the message, and of a piece its text


def pieces(path: Path) -> list[str] | None:
    """Return the tokens in the order of their ids; None for a file that is no SentencePiece model."""
    try:
        messages = [value for field, value in _fields(path.read_bytes()) if field == _PIECES]
        texts = [next(value for field, value in _fields(message) if field == _PIECES) for message in messages]
        return [text.decode("utf-8") for text in texts] or None
    except (ValueError, StopIteration):
        return None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of a message's fields. ValueError where it is cut off or none."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, size = key & 7, 0
        if kind == _TEXT:
            size, position = _varint(message, position)
        elif kind == _VARINT:
            size = _varint(message, position)[1] - position
        elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if kind == _FOUR_BYTES else 8
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(message):
            raise ValueError("cut off")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(message):
            raise ValueError("cut off")
        byte, position = message[position], position + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")
