"""Finds prompts that are also questions of a test, so that selection leaves them out of training."""

import hashlib
import re
from collections.abc import Iterator, Sequence

from bmjax.io.rows import fill, read_rows


class HeldOut:
    """The prompts of held-out rows, as hashes: whole, and as runs of `ngram` words (0: only whole).

    data: what `read_rows` takes; an empty list holds nothing out. prompt: the template of a row's prompt.
    """

    def __init__(self, data: str | Sequence[str], prompt: str, ngram: int) -> None:
        self._ngram = ngram
        self._digests: set[bytes] = set()
        for location, row in read_rows(data, "held_out") if data else ():
            self._digests.update(self._parts(str(fill(prompt, row, location, "held_out_prompt"))))

    def overlaps(self, prompt: str) -> bool:
        """Return whether a prompt is a held-out one up to case, spaces and punctuation, or shares a run of words."""
        return bool(self._digests) and not self._digests.isdisjoint(self._parts(prompt))

    def _parts(self, prompt: str) -> Iterator[bytes]:
        # Words and signs of arithmetic: `7 - 5` and `7 + 5` are different prompts.
        words = re.findall(r"\w+|[+\-*/<>=^()\[\]]", prompt.lower())
        yield digest(" ".join(words))
        for start in range(len(words) - self._ngram + 1 if self._ngram else 0):
            yield digest(" ".join(words[start : start + self._ngram]))


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()[:16]
