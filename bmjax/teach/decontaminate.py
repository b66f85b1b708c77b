"""Finds prompts that are also questions of a test, so that selection leaves them out of training."""

import hashlib
import re
from collections.abc import Iterator, Sequence

from bmjax.io.rows import fill, read_rows


class HeldOut:
    """The prompts of held-out rows, as hashes: whole, and as runs of words.

    Arguments:
        data: the rows, by what `read_rows` takes; an empty list holds nothing out.
        prompt: the template of a row's prompt.
        ngram: how many words in a row make a prompt too similar; 0 compares whole prompts only.
    """

    def __init__(self, data: str | Sequence[str], prompt: str, ngram: int) -> None:
        self.ngram = ngram
        self.prompts: set[bytes] = set()
        self.word_runs: set[bytes] = set()
        for location, row in read_rows(data, "held_out") if data else ():
            words = _words(str(fill(prompt, row, location, "held_out_prompt")))
            self.prompts.add(digest(" ".join(words)))
            self.word_runs.update(self._runs(words))

    def overlaps(self, prompt: str) -> bool:
        """Return whether a prompt is a held-out one up to case, spaces and punctuation, or shares a run of words."""
        if not self.prompts:
            return False
        words = _words(prompt)
        return digest(" ".join(words)) in self.prompts or any(run in self.word_runs for run in self._runs(words))

    def _runs(self, words: Sequence[str]) -> Iterator[bytes]:
        if self.ngram:
            for start in range(len(words) - self.ngram + 1):
                yield digest(" ".join(words[start : start + self.ngram]))


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()[:16]


def _words(text: str) -> list[str]:
    """Split into lower-cased words and signs of arithmetic: `7 - 5` and `7 + 5` are different prompts."""
    return re.findall(r"\w+|[+\-*/<>=^()\[\]]", text.lower())
