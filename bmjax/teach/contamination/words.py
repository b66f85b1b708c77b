"""Texts as arrays of token hashes, so that millions of words are compared with a benchmark by numpy.

Texts are compared in a plain form: NFKC (full-width digits, ligatures), small letters, without full stops and, where
asked, without what LaTeX can write in several ways. A token is a run of letters, a run of digits, a single Chinese or
Japanese character, a sign of arithmetic or another mark.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.intp]

SPACE, LETTERS, DIGITS, CHARACTER, SIGN, MARK = range(6)  # kinds of characters, and of tokens
_SIGNS = "+-*/<>=^()[]"
_SAME = {"×": "*", "⋅": "*", "·": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "−": "-", "–": "-", "—": "-", "‐": "-"}
_FOREIGN = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+")  # with the letter that an accent may follow
_LATEX = re.compile(
    r"\\(?:(?P<frac>[dt]frac)|(?P<times>times|cdot)|(?P<le>leq(?:slant)?)|(?P<ge>geq(?:slant)?)|(?P<ne>neq)"
    r"|(?:left|right|displaystyle|quad|qquad|[bB]igg?[lr]?|limits)(?![a-zA-Z])|(?:text|math)(?:bf|rm|it|sf|tt)?(?=\{)"
    r"|mbox(?=\{)|[(),;:!\[\] ])"
)
_LATEX_NAMES = {"frac": "\\frac", "times": "*", "le": "\\le", "ge": "\\ge", "ne": "\\ne"}

# Odd, so that they have inverses modulo 2**64; without structure, so that sums of powers rarely meet.
_CHARACTER_BASE, _WORD_BASE, _MIX = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93


class Tokens(NamedTuple):
    """The tokens of a batch of texts, W in all.

    text: the plain texts, joined. hashes uint64 [W]. kinds uint8 [W]. starts, ends [W]: positions in `text`.
    documents [W]: which of the texts a token belongs to. offsets: position of every text in `text`, and the end.
    """

    text: str
    hashes: Hashes
    kinds: NDArray[np.uint8]
    starts: Indices
    ends: Indices
    documents: Indices
    offsets: Indices

    def only(self, *kinds: int) -> "Tokens":
        """Return the tokens of some kinds."""
        chosen = np.flatnonzero(np.isin(np.arange(6), kinds)[self.kinds])
        return self._replace(
            hashes=self.hashes[chosen],
            kinds=self.kinds[chosen],
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            documents=self.documents[chosen],
        )


def plain(text: str, latex: bool = False) -> str:
    """Return a text in NFKC and, with `latex`, without what LaTeX can write in several ways."""
    if not unicodedata.is_normalized("NFKC", text):
        text = _FOREIGN.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    if latex and "\\" in text:
        text = _LATEX.sub(lambda match: _LATEX_NAMES.get(match.lastgroup or "", " "), text)
    return text


def tokenize(texts: Sequence[str], latex: bool = False, words: bool = False) -> Tokens:
    """Return the tokens of texts as arrays. words: whether signs and marks are left out, which is faster."""
    plains = [plain(text, latex) for text in texts]
    offsets = np.cumsum([0, *(len(text) + 1 for text in plains)], dtype=np.intp)
    joined = "\n".join([*plains, ""])
    if joined.isascii():
        characters: NDArray[np.unsignedinteger] = np.frombuffer(joined.encode("ascii"), np.uint8)
        codes, kinds = (table.take(characters) for table in _tables(128, words))
    else:
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        # Beyond the basic plane: ideographs of extension B and later, else pictures.
        rare = characters >= 2**16
        basic = np.where(rare, 0, characters) if rare.any() else characters
        codes, kinds = (table.take(basic) for table in _tables(2**16, words))
        if basic is not characters:
            codes[rare] = characters[rare]
            kinds[rare] = np.where(characters[rare] >= 0x20000, CHARACTER, SPACE if words else MARK)
            codes[kinds == SPACE] = 0
    breaks = kinds >= CHARACTER
    breaks[:1] = True
    breaks[1:] |= kinds[1:] != kinds[:-1]
    boundaries = np.append(np.flatnonzero(breaks), len(kinds))
    is_token = kinds[boundaries[:-1]] != SPACE
    starts, ends = boundaries[:-1][is_token], boundaries[1:][is_token]
    documents = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(starts, offsets)))
    if not len(starts):
        return Tokens(joined, np.zeros(0, np.uint64), np.zeros(0, np.uint8), starts, ends, documents, offsets)
    powers, inverses = _powers(_CHARACTER_BASE, len(codes))
    # Spaces have code 0, so a token's sum may run on to the next token.
    hashes = np.add.reduceat(codes * powers[: len(codes)], starts) * inverses[starts]
    hashes ^= hashes >> np.uint64(31)
    hashes *= np.uint64(_MIX)
    hashes ^= hashes >> np.uint64(29)
    return Tokens(joined, hashes, kinds[starts], starts, ends, documents, offsets)


class Windows:
    """Hashes of any runs of tokens, from sums that are made once."""

    def __init__(self, hashes: Hashes) -> None:
        self._powers = _powers(_WORD_BASE, len(hashes) + 1)
        self._sums = np.zeros(len(hashes) + 1, np.uint64)
        np.cumsum(hashes * self._powers[0][: len(hashes)], out=self._sums[1:])

    def all(self, length: int) -> Hashes:
        """Return the hashes of the runs of `length` tokens from every token on, [W - length + 1]."""
        count = max(len(self._sums) - length, 0)
        return (self._sums[length : length + count] - self._sums[:count]) * self._powers[1][:count]

    def at(self, starts: Indices, lengths: Indices) -> Hashes:
        """Return the hashes of the runs that begin at `starts`; none may reach beyond the end."""
        return (self._sums[starts + lengths] - self._sums[starts]) * self._powers[1][starts]


@functools.cache
def _tables(size: int, words: bool) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return the code of every character, 0 for a space, and its kind."""
    codes, kinds = np.zeros(size, np.uint32), np.zeros(size, np.uint8)
    for code in range(size):
        character = _SAME.get(chr(code), chr(code))
        category = unicodedata.category(character)
        if character == "." or character == "_" or category[0] in "ZC":
            continue
        if category[0] in "LM":
            is_ideograph = 0x3040 <= code < 0x3100 or 0x3400 <= code < 0xA000 or 0xF900 <= code < 0xFB00
            kind = CHARACTER if is_ideograph else LETTERS
        elif category[0] == "N":
            kind = DIGITS
        else:
            kind = SIGN if character in _SIGNS or category == "Sm" else MARK
        if words and kind > CHARACTER:
            continue
        lower = character.lower()
        codes[code], kinds[code] = ord(lower if len(lower) == 1 else character), kind
    return codes, kinds


_known_powers: dict[int, tuple[Hashes, Hashes]] = {}


def _powers(base: int, count: int) -> tuple[Hashes, Hashes]:
    """Return at least `count` powers of a base modulo 2**64, and their inverses."""
    known = _known_powers.get(base)
    if known is None or len(known[0]) < count:
        size = max(2**16, 1 << count.bit_length())
        known = _power_table(base, size), _power_table(pow(base, -1, 2**64), size)
        _known_powers[base] = known
    return known


def _power_table(base: int, size: int) -> Hashes:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
