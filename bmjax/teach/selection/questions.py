"""Tells the same question in other words: prompts up to case, spaces and punctuation, and near duplicates."""

import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import xxhash

# Words and signs: `7 - 5` and `7 + 5` are different questions.
_TOKEN = re.compile(r"[^\W_]+|[+\-*/<>=^()\[\]%&|~]|(?<=[\d)])!")
_RUN = 3  # words in a row that make up a prompt
_HASHES = 128
_MULTIPLIER = np.uint64(0xC2B2AE3D27D4EB4F)
_COMPARED = 32  # prompts of a bucket that each further one is compared with


def tokens(prompt: str) -> list[str]:
    """Return the words and signs of a prompt, in small letters and NFKC."""
    text = prompt if prompt.isascii() else unicodedata.normalize("NFKC", prompt)
    return _TOKEN.findall(text.lower())


@lru_cache(maxsize=4096)
def question_digest(prompt: str) -> bytes:
    """Return 16 bytes that are the same for prompts which differ in case, spaces and punctuation alone."""
    return digest(" ".join(tokens(prompt)) or prompt)


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", errors="surrogatepass"))


def near_duplicates(prompts: Iterable[tuple[bytes, str]], threshold: float) -> Iterator[tuple[bytes, bytes]]:
    """Yield (prompt, the prompt that stands for it) for all but one of every group of near duplicates.

    Arguments:
        prompts: (key, text) of distinct prompts.
        threshold: the share of all their runs of three words that two prompts of a group have in common (Jaccard), as
            128 hashes estimate it. A group is whatever such pairs connect; its smallest key stands for it.
    """
    from datasketch import MinHash, MinHashLSH

    keys = bytearray()
    empty = MinHash(num_perm=_HASHES, hashfunc=xxhash.xxh32_intdigest)
    with tempfile.TemporaryFile() as file:
        for key, text in prompts:
            words = tokens(text)
            runs = {" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}
            sketch = empty.copy()
            sketch.update_batch([run.encode("utf-8", "surrogatepass") for run in runs])
            keys += key
            file.write(sketch.hashvalues.astype(np.uint32).tobytes())
        file.flush()
        count = len(keys) // 16
        if not count:
            return
        table = np.memmap(file, np.uint32, "r", shape=(count, _HASHES))
        group = np.arange(count)

        def root(index: int) -> int:
            while group[index] != index:
                group[index] = group[group[index]]
                index = int(group[index])
            return index

        # Bands as datasketch chooses them. Each is sorted by itself, so that only one is in memory.
        # A pair too many is compared in vain, a pair too few is missed.
        plan = MinHashLSH(threshold=threshold, num_perm=_HASHES, weights=(0.1, 0.9))
        for band in range(plan.b):
            buckets = np.zeros(count, np.uint64)
            for column in range(band * plan.r, (band + 1) * plan.r):
                buckets = (buckets + table[:, column]) * _MULTIPLIER
                buckets ^= buckets >> np.uint64(29)
            order = np.argsort(buckets, kind="stable")
            again = np.flatnonzero(buckets[order][1:] == buckets[order][:-1]) + 1
            first = 0
            for index, is_next in zip(again.tolist(), (np.diff(again, prepend=-1) == 1).tolist(), strict=True):
                first = first if is_next else index - 1
                alike = order[max(first, index - _COMPARED) : index]
                shares = np.mean(table[alike] == table[order[index]], axis=1)
                for other in alike[shares >= threshold].tolist():
                    low, high = sorted((root(other), root(int(order[index]))))
                    group[high] = low
        for index in range(count):
            if (top := root(index)) != index:
                yield bytes(keys[16 * index : 16 * index + 16]), bytes(keys[16 * top : 16 * top + 16])
