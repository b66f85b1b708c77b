"""Keeps questions of tests out of training: finds held-out prompts and benchmarks in prompts and in traces.

Selection asks here. A question counts as met when it stands whole in a text, when a long run of it does, or most of it;
what many prompts share, such as an instruction, is no evidence.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from bmjax.log import Log
from bmjax.teach.contamination.benchmarks import Question, held_out_questions, read_benchmarks
from bmjax.teach.contamination.embedding import Similarity
from bmjax.teach.contamination.matcher import ALL, SIGNED, WORDS, Hit, Matcher
from bmjax.teach.contamination.words import tokenize
from bmjax.teach.settings import SelectSettings

REPORT = "contamination.jsonl"
NEVER = 2**31  # a length that no question has
_PROMPTS, _TRACES = 2**16, 2**18  # characters that are compared at a time
_ENDING, _MOST = 5, 0.9  # words of an ending, and the share of prompts that make it an instruction
_SPAN = 400  # characters of a span in the report


Key = TypeVar("Key")


class Leak(NamedTuple):
    """A question that a text holds.

    reason: 'held out' or 'contaminated'. rule: whole, run, part, fuzzy or embedding. share: of the question that was
    met. span: the text that meets it.
    """

    reason: str
    benchmark: str
    question: str
    rule: str
    share: float
    span: str


class HeldOut:
    """The prompts of held-out rows: found whole in a prompt, and by runs of `ngram` words (0: only whole).

    data: what `read_rows` takes; an empty list holds nothing out. prompt: the template of a row's prompt.
    """

    def __init__(self, data: str | Sequence[str], prompt: str, ngram: int) -> None:
        self.questions = held_out_questions(data, prompt)
        texts = [question.text for question in self.questions]
        self.matchers = [Matcher(texts, run=ngram, run_kinds=SIGNED)] if texts else []

    def overlaps(self, prompt: str) -> bool:
        """Return whether a prompt holds a held-out one up to case, spaces and punctuation, or shares a run of words."""
        return any(matcher.hits(tokenize([prompt], matcher.latex)) for matcher in self.matchers)


class Decontamination:
    """The held-out prompts and benchmarks of a selection."""

    def __init__(self, settings: SelectSettings) -> None:
        held_out = HeldOut(settings.held_out, settings.held_out_prompt, settings.ngram)
        self.questions = read_benchmarks(settings.decontaminate)
        texts = [question.text for question in self.questions]
        self.of_prompts: list[tuple[str, list[Question], Matcher]] = [
            ("held out", held_out.questions, matcher) for matcher in held_out.matchers
        ]
        self.of_traces: Matcher | None = None
        self.similarity: Similarity | None = None
        if texts:
            # Runs are compared as they are written: what LaTeX leaves between the words is evidence, too.
            parts = Matcher(texts, part=3, share=settings.coverage, fuzzy=True)
            runs = Matcher(texts, run=13, run_kinds=ALL, latex=False, shortest=NEVER)
            self.of_prompts += [("contaminated", self.questions, matcher) for matcher in (parts, runs)]
            if settings.embedding:
                self.similarity = Similarity(settings.embedding, texts, settings.similarity)
            self.of_traces = Matcher(texts, part=8, share=0.6, shortest=5, whole_kinds=WORDS, latex=False)

    def in_traces(self, texts: Sequence[str]) -> dict[int, Leak]:
        """Return {number of a trace: the question that it holds}."""
        if self.of_traces is None:
            return {}
        leaks = {}
        for batch in _batches(enumerate(texts), _TRACES):
            tokens = tokenize([text for _, text in batch], words=True)
            for number, hit in self.of_traces.hits(tokens).items():
                leaks[batch[number][0]] = _leak("contaminated", self.questions, hit, tokens.text)
        return leaks

    def in_prompts(self, prompts: Callable[[], Iterable[tuple[bytes, str]]], log: Log) -> Iterator[tuple[bytes, Leak]]:
        """Yield (key, leak) of the prompts that hold a question.

        prompts: gives (key, prompt) of the distinct prompts, from the beginning at every call.
        """
        if not self.of_prompts:
            return
        self._warn_of_instructions(prompts(), log)
        met: set[bytes] = set()
        for reason, questions, matcher in self.of_prompts:
            for batch in _batches(prompts(), _PROMPTS):
                matcher.count(tokenize([prompt for _, prompt in batch], matcher.latex))
            for batch in _batches(prompts(), _PROMPTS):
                tokens = tokenize([prompt for _, prompt in batch], matcher.latex)
                for number, hit in matcher.hits(tokens).items():
                    key = batch[number][0]
                    if key not in met:
                        met.add(key)
                        yield key, _leak(reason, questions, hit, tokens.text)
        if self.similarity is None:
            return
        for batch in _batches(prompts(), _PROMPTS):
            for number, (nearest, cosine) in self.similarity.hits([prompt for _, prompt in batch]).items():
                key, prompt = batch[number]
                if key not in met:
                    question = self.questions[nearest]
                    yield (
                        key,
                        Leak(
                            "contaminated",
                            question.benchmark,
                            question.text,
                            "embedding",
                            round(cosine, 3),
                            prompt[:_SPAN],
                        ),
                    )

    def _warn_of_instructions(self, prompts: Iterable[tuple[bytes, str]], log: Log) -> None:
        """Say when the prompts all end in an instruction that no question has."""
        endings: Counter[tuple[str, ...]] = Counter()
        for _, prompt in islice(prompts, 100_000):
            endings[tuple(prompt.split()[-_ENDING:])] += 1
        if not endings:
            return
        ending, count = endings.most_common(1)[0]
        if endings.total() < 3 or count < _MOST * endings.total() or len(ending) < _ENDING:
            return
        for reason, questions in {reason: questions for reason, questions, _ in self.of_prompts}.items():
            if not any(tuple(question.text.split()[-_ENDING:]) == ending for question in questions):
                key = "held_out_prompt" if reason == "held out" else "decontaminate"
                log(
                    f"{key}: {count} of {endings.total()} prompts end in '... {' '.join(ending)}', an instruction that "
                    "the held-out questions lack; questions are looked for inside the prompts, whole or in part"
                )


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()[:16]


def _leak(reason: str, questions: Sequence[Question], hit: Hit, text: str) -> Leak:
    question = questions[hit.question]
    span = text[hit.start : hit.end]
    shown = span if len(span) <= _SPAN else f"{span[: _SPAN // 2]} ... {span[-_SPAN // 2 :]}"
    return Leak(reason, question.benchmark, question.text, hit.rule, hit.share, shown)


def _batches(texts: Iterable[tuple[Key, str]], limit: int) -> Iterator[list[tuple[Key, str]]]:
    """Yield (key, text) in batches that end when `limit` characters are reached."""
    batch: list[tuple[Key, str]] = []
    size = 0
    for key, text in texts:
        batch.append((key, text))
        size += len(text)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
