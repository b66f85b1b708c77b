"""Reads problems from rows, for collecting and for evaluation: a prompt, a reference and the judge of answers."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError
from bmjax.io.rows import fill, read_rows
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.settings import ProblemSettings


@dataclass(frozen=True)
class Problem:
    """A question with its reference. location: its row, for errors. judge: the name of the judge of its answers."""

    location: str
    prompt: str
    reference: Any
    judge: str


def read_problems(data: str | Sequence[str], key: str, settings: ProblemSettings, domain: str) -> Iterator[Problem]:
    """Yield the problems of `data`, which the setting `key` names. UserError names the row that makes none."""
    for location, row in itertools.islice(read_rows(data, key), settings.limit):
        prompt = fill(settings.prompt, row, location, "prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{location}: the prompt is empty or not text; check key 'prompt'")
        reference = fill(settings.reference, row, location, "reference") if settings.reference else None
        try:
            judge(reference, "", settings.judge)  # refuses a reference that the judge cannot read
            judge_name = settings.judge or choose(reference, domain)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
        yield Problem(location, prompt, reference, judge_name)
