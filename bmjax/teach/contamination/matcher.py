"""Finds the questions of a benchmark in texts: whole, in long runs, or for the greater part.

`Matcher` holds the questions as hashes. Texts come in batches: `count` sees all of them first, so that what many share
(an instruction, a common phrase) is no evidence; `hits` then says which texts hold which question.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bmjax.teach.contamination.words import (
    CHARACTER,
    DIGITS,
    LETTERS,
    SIGN,
    Hashes,
    Indices,
    Tokens,
    Windows,
    tokenize,
)  # fmt: skip

WORDS, SIGNED, ALL = (LETTERS, DIGITS, CHARACTER), (LETTERS, DIGITS, CHARACTER, SIGN), (1, 2, 3, 4, 5)
_ANCHOR = 8  # tokens at the beginning of a question by which it is looked up
_LONG = 14  # tokens from which a whole question is no accident, whatever stands around it
_RARE = 64  # questions that may share a run which leads to candidates
_CANDIDATES = 4  # questions a text is compared with in full
_PHRASE, _PHRASE_SHARE = 4, 2000  # a run in 4 texts, and in one of 2,000, is a phrase of the data
_LEAD = 0.15  # share of the runs of a question that make it a candidate
_SIMILAR = 0.3  # share of a question from which on it may be there misspelt
_LEAST = 5  # words that the evidence for a part of a question must cover

# Words that begin an instruction, where no punctuation parts it from the question before it.
_INSTRUCTIONS = {
    "please", "answer", "give", "put", "return", "write", "let", "think", "solve", "explain", "show", "you", "your",
    "provide", "respond", "reply", "use", "output", "express", "reason", "step", "choose", "select", "the",
}  # fmt: skip
_PAUSE = re.compile(r"[^\w\s]|\n")
_OPERATOR = re.compile(r"[ \t]*(?:[-+/^=×÷]|\*(?!\*)|[<>](?![/|\w]))")  # not the marks of bold type, nor of a tag
_STOP = re.compile(r"[.?!;:\n)\]}<>\"'*|。」』”’]")


class Hit(NamedTuple):
    """A question in a text. share: of the question that was met. start, end: of the span in the plain text."""

    question: int
    rule: str
    share: float
    start: int
    end: int


class Lookup:
    """A table of hashes that is searched for many at once."""

    def __init__(self, hashes: Hashes) -> None:
        self.keys = np.unique(hashes)
        bits = min(max(16, len(self.keys).bit_length() + 4), 27)
        self._shift = np.uint64(64 - bits)
        self._present = np.zeros(2**bits, bool)
        self._present[(self.keys >> self._shift).astype(np.intp)] = True

    def find(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """Return the positions of the hashes that are in the table, and their numbers in `keys`."""
        if not len(self.keys) or not len(hashes):
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        # Nearly all hashes are refused by one bit; the others are looked up.
        positions = np.flatnonzero(self._present[(hashes >> self._shift).astype(np.intp)])
        numbers = np.searchsorted(self.keys, hashes[positions])
        numbers[numbers == len(self.keys)] = 0
        same = self.keys[numbers] == hashes[positions]
        return positions[same], numbers[same]


class Runs:
    """The runs of `length` tokens of some kinds in the questions, and how many texts share each."""

    def __init__(self, tokens: Tokens, kinds: Sequence[int], length: int, questions: int) -> None:
        self.kinds, self.length = kinds, length
        stream = tokens.only(*kinds)
        hashes, within = _windows(stream, length)
        self.lookup = Lookup(hashes[within])
        keys = self.lookup.keys
        self.size = np.bincount(stream.documents, minlength=questions)
        self.documents = stream.documents[: len(hashes)][within]
        numbers = np.searchsorted(keys, hashes[within])
        # The runs of every question, in order, and the questions of every run.
        self.first = np.searchsorted(self.documents, np.arange(questions + 1))
        self.numbers = numbers
        self.runs_of_question = np.maximum(1, np.diff(self.first))
        pairs = np.unique(numbers * questions + self.documents) if questions else numbers
        self.posting_questions = pairs % max(questions, 1)
        self.posting_first = np.searchsorted(pairs // max(questions, 1), np.arange(len(keys) + 1))
        self.shared_by_questions = np.diff(self.posting_first)
        self.texts = np.zeros(len(keys), np.int64)
        self.common: NDArray[np.bool_] | None = None  # which are instructions, when that is known

    def find(self, batch: "_Batch") -> tuple[Tokens, Indices, Indices]:
        """Return the stream of tokens, where runs of the questions begin in it, and the numbers of those runs."""
        stream, windows = batch.stream(self.kinds)
        positions, numbers = self.lookup.find(windows.all(self.length))
        inside = stream.documents[positions] == stream.documents[positions + self.length - 1]
        return stream, positions[inside], numbers[inside]

    def count(self, batch: "_Batch") -> None:
        """Count in how many texts each run occurs."""
        tokens = batch.tokens
        stream, positions, numbers = self.find(batch)
        pairs = np.unique(numbers * len(tokens.offsets) + stream.documents[positions])
        np.add.at(self.texts, pairs // len(tokens.offsets), 1)


class _Batch:
    """The tokens of texts, and those of some kinds alone, which are made once."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._streams: dict[Sequence[int], tuple[Tokens, Windows]] = {}

    def stream(self, kinds: Sequence[int]) -> tuple[Tokens, Windows]:
        if kinds not in self._streams:
            is_all = kinds == WORDS and not (self.tokens.kinds > CHARACTER).any()
            stream = self.tokens if is_all else self.tokens.only(*kinds)
            self._streams[kinds] = stream, Windows(stream.hashes)
        return self._streams[kinds]


class Matcher:
    """The questions of benchmarks, as hashes."""

    def __init__(
        self,
        questions: Sequence[str],
        *,
        run: int = 0,
        run_kinds: Sequence[int] = SIGNED,
        part: int = 0,
        share: float = 1.0,
        shortest: int = 1,
        whole_kinds: Sequence[int] = SIGNED,
        latex: bool = True,
        fuzzy: bool = False,
    ) -> None:
        """Index the questions.

        Arguments:
            questions: their texts.
            run, run_kinds: how many tokens in a row, of which kinds, are a hit; 0: none.
            part, share: the words in a row that cover a question, and the share of it that must be covered; 0: none.
            shortest, whole_kinds: tokens of the shortest question that is looked for whole, and their kinds.
            latex: whether the writing of LaTeX is made alike; the texts must be tokenized the same way.
            fuzzy: whether misspelt questions are found, by `rapidfuzz`.
        """
        self.latex, self.share, self.fuzzy, self._shortest = latex, share, fuzzy, shortest
        self.texts_seen = 0
        self.questions = questions
        tokens = tokenize(questions, latex)
        self._tokens = tokens
        self._runs = Runs(tokens, run_kinds, run, len(questions)) if run else None
        self._parts = Runs(tokens, WORDS, part, len(questions)) if part else None
        # Whole questions: looked up by their beginnings, then compared to their ends.
        self._whole_kinds = whole_kinds
        signed = tokens.only(*whole_kinds)
        bounds = np.searchsorted(signed.documents, np.arange(len(questions) + 1))
        starts, lengths = bounds[:-1], np.diff(bounds)
        self._owners = np.arange(len(questions))
        shorter = _without_instruction(signed, starts, lengths)
        if shorter is not None:
            starts, lengths = np.concatenate([starts, shorter[0]]), np.concatenate([lengths, shorter[1]])
            self._owners = np.concatenate([self._owners, self._owners])
        self._lengths = lengths
        windows = Windows(signed.hashes)
        self._whole = windows.at(starts, lengths)
        self._anchors: dict[int, tuple[Lookup, Indices, Indices]] = {}
        for size in range(1, _ANCHOR + 1):
            ours = np.flatnonzero((np.minimum(lengths, _ANCHOR) == size) & (lengths >= shortest))
            if len(ours):
                lookup = Lookup(windows.at(starts[ours], np.full(len(ours), size)))
                numbers = np.searchsorted(lookup.keys, windows.at(starts[ours], np.full(len(ours), size)))
                order = np.argsort(numbers, kind="stable")
                first = np.searchsorted(numbers[order], np.arange(len(lookup.keys) + 1))
                self._anchors[size] = (lookup, ours[order], first)

    def count(self, tokens: Tokens) -> None:
        """See a batch of distinct texts, to know what many of them share."""
        self.texts_seen += len(tokens.offsets) - 1
        batch = _Batch(tokens)
        for runs in (self._runs, self._parts):
            if runs is not None:
                runs.count(batch)
                runs.common = None

    def hits(self, tokens: Tokens) -> dict[int, Hit]:
        """Return {number of a text: the best hit}; a whole question goes before a run, a run before a part."""
        best: dict[int, Hit] = {}
        batch = _Batch(tokens)
        for document, hit in self._whole_hits(batch):
            best.setdefault(document, hit)
        if self._runs is not None:
            self._run_hits(batch, self._runs, best)
        if self._parts is not None:
            self._part_hits(batch, self._parts, best)
        return best

    def _whole_hits(self, batch: _Batch) -> list[tuple[int, Hit]]:
        tokens = batch.tokens
        stream, windows = batch.stream(self._whole_kinds)
        total, hits = len(stream.hashes), []
        for size, (lookup, variants, first) in self._anchors.items():
            positions, numbers = lookup.find(windows.all(size))
            counts = first[numbers + 1] - first[numbers]
            begins = np.repeat(positions, counts)
            steps = np.arange(len(begins)) - np.repeat(np.cumsum(counts) - counts, counts)
            candidates = variants[np.repeat(first[numbers], counts) + steps]
            lengths = self._lengths[candidates]
            fits = begins + lengths <= total
            begins, candidates, lengths = begins[fits], candidates[fits], lengths[fits]
            equal = windows.at(begins, lengths) == self._whole[candidates]
            equal &= stream.documents[begins] == stream.documents[begins + lengths - 1]
            for begin, variant in zip(begins[equal].tolist(), candidates[equal].tolist(), strict=True):
                last = begin + int(self._lengths[variant]) - 1
                start, end = int(stream.starts[begin]), int(stream.ends[last])
                document = int(stream.documents[begin])
                offset, limit = int(tokens.offsets[document]), int(tokens.offsets[document + 1])
                if last - begin + 1 >= _LONG or _stands_alone(tokens.text, start, end, offset, limit):
                    hits.append((document, Hit(int(self._owners[variant]), "whole", 1.0, start, end)))
        return sorted(hits, key=lambda item: (item[0], item[1].start - item[1].end, item[1].question))

    def _run_hits(self, batch: _Batch, runs: Runs, best: dict[int, Hit]) -> None:
        stream, positions, numbers = runs.find(batch)
        # A run that several texts share is a phrase or an instruction.
        counts, phrase = runs.texts[numbers], max(_PHRASE, self.texts_seen // _PHRASE_SHARE)
        kept = (counts < phrase) & ~((counts >= 2) & (2 * counts > self.texts_seen)) & ~self._is_common(runs)[numbers]
        positions, numbers = positions[kept], numbers[kept]
        documents, first = np.unique(stream.documents[positions], return_index=True)
        for document, low in zip(documents.tolist(), first.tolist(), strict=True):
            if document in best:
                continue
            high = low
            while high + 1 < len(positions) and positions[high + 1] == positions[high] + 1:
                high += 1
            question = int(runs.posting_questions[runs.posting_first[numbers[low]]])
            share = min(1.0, (high - low + runs.length) / max(1, int(runs.size[question])))
            start, end = stream.starts[positions[low]], stream.ends[positions[high] + runs.length - 1]
            best[document] = Hit(question, "run", round(share, 3), int(start), int(end))

    def _is_common(self, runs: Runs) -> NDArray[np.bool_]:
        """Return which runs are instructions: they are in most texts, or in most questions."""
        if runs.common is not None:
            return runs.common
        of_texts = (runs.texts >= 3) & (2 * runs.texts > self.texts_seen)
        of_questions = (runs.shared_by_questions >= 3) & (2 * runs.shared_by_questions > len(self.questions))
        runs.common = of_texts | of_questions
        return runs.common

    def _part_hits(self, batch: _Batch, parts: Runs, best: dict[int, Hit]) -> None:
        stream, positions, numbers = parts.find(batch)
        common = self._is_common(parts)
        kept = ~common[numbers]
        positions, numbers = positions[kept], numbers[kept]
        documents = stream.documents[positions]
        bounds = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
        met = np.zeros(len(parts.lookup.keys), bool)
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            document = int(documents[low])
            if document in best or high - low < 2:
                continue
            met[numbers[low:high]] = True
            hit = self._covered(batch.tokens, stream, parts, positions[low:high], numbers[low:high], met, common)
            met[numbers[low:high]] = False
            if hit is not None:
                best[document] = hit

    def _covered(
        self,
        tokens: Tokens,
        stream: Tokens,
        parts: Runs,
        positions: Indices,
        numbers: Indices,
        met: NDArray[np.bool_],
        common: NDArray[np.bool_],
    ) -> Hit | None:
        """Return the hit of the question of which a text covers the most words, if that is enough."""
        # Candidates: questions of which the text has runs that few questions share.
        leads = np.unique(numbers[parts.shared_by_questions[numbers] <= _RARE])
        if not len(leads):
            return None
        counts = parts.posting_first[leads + 1] - parts.posting_first[leads]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        postings = parts.posting_questions[np.repeat(parts.posting_first[leads], counts) + steps]
        shared = np.bincount(postings, minlength=len(self.questions))
        ratio = shared / parts.runs_of_question
        candidates = np.flatnonzero(ratio >= _LEAD)
        best: Hit | None = None
        for question in candidates[np.argsort(-ratio[candidates], kind="stable")][:_CANDIDATES].tolist():
            ours = parts.numbers[parts.first[question] : parts.first[question + 1]]
            evidence, covered = np.zeros((2, int(parts.size[question])), bool)
            is_evidence, is_met = ~common[ours], met[ours]
            for step in range(parts.length):
                evidence[step : step + len(ours)] |= is_evidence
                covered[step : step + len(ours)] |= is_met
            words = int(covered.sum())
            share = words / max(1, int(evidence.sum()))
            if words < _LEAST or (best is not None and share <= best.share):
                continue
            rule = "part" if share >= self.share else ""
            if not rule and self.fuzzy and share >= _SIMILAR and best is None:
                document = int(stream.documents[positions[0]])
                text = tokens.text[tokens.offsets[document] : tokens.offsets[document + 1]]
                rule = "fuzzy" if self._is_misspelt(question, text) else ""
            if rule:
                inside = positions[np.isin(numbers, ours)]
                start, end = int(stream.starts[inside[0]]), int(stream.ends[inside[-1] + parts.length - 1])
                best = Hit(question, rule, round(share, 3), start, end)
        return best

    def _is_misspelt(self, question: int, text: str) -> bool:
        """Return whether a text holds a question but for some letters; with other numbers it is another question."""
        from rapidfuzz import fuzz

        wanted = self._tokens.text[self._tokens.offsets[question] : self._tokens.offsets[question + 1] - 1].lower()
        numbers: Any = set(re.findall(r"\d+", wanted))
        if not numbers <= set(re.findall(r"\d+", text)):
            return False
        return bool(fuzz.partial_ratio(wanted, text.lower(), score_cutoff=90) >= 90)


def _windows(stream: Tokens, length: int) -> tuple[Hashes, NDArray[np.bool_]]:
    """Return the hashes of all runs of a length, and which lie within a single text."""
    hashes = Windows(stream.hashes).all(length)
    last = stream.documents[length - 1 :] if len(hashes) else stream.documents[:0]
    return hashes, stream.documents[: len(hashes)] == last[: len(hashes)]


def _without_instruction(stream: Tokens, starts: Indices, lengths: Indices) -> tuple[Indices, Indices] | None:
    """Return the questions without the sentences that all of them begin or end with; None where there are none."""
    if len(starts) < 3 or not lengths.min():
        return None
    ends, limit = starts + lengths, int(lengths.min()) - 1
    back = front = 0
    while back < limit and len({*stream.hashes[ends - 1 - back].tolist()}) == 1:
        back += 1
    while front < limit - back and len({*stream.hashes[starts + front].tolist()}) == 1:
        front += 1
    back, front = (size if size >= 4 else 0 for size in (back, front))
    if not back and not front:
        return None
    # Questions made on one pattern share the words of a sentence, not the sentence.
    for question in range(len(starts)):
        first, last = starts[question] + front, ends[question] - back - 1
        offset, limit = (int(stream.offsets[question + step]) for step in (0, 1))
        if not _stands_alone(stream.text, int(stream.starts[first]), int(stream.ends[last]), offset, limit):
            return None
    return starts + front, lengths - front - back


def _stands_alone(text: str, start: int, end: int, offset: int, limit: int) -> bool:
    """Return whether the span of a short question is a sentence of its own in the text at offset:limit."""
    # Before it: the beginning, punctuation, or a word that it follows with a capital letter.
    before = text[offset:start]
    stripped = before.rstrip(" \t")
    is_upper = text[offset:limit].isupper()
    opened = not before.strip() or bool(_PAUSE.match(stripped[-1:] or " ")) or (text[start].isupper() and not is_upper)
    # Behind it: the end, the end of a sentence, or an instruction.
    after = text[end:limit]
    next_word = re.match(r"[^\w]*?(\w+)", after)
    gap = after[: next_word.start(1)] if next_word else after
    word = next_word[1] if next_word else ""
    if _OPERATOR.match(after):
        return False
    closed = not word or bool(_STOP.search(gap)) or word.lower() in _INSTRUCTIONS
    return opened and (closed or (word[0].isupper() and len(word) > 1 and not is_upper))
