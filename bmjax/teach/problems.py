"""Reads problems from rows, for collecting and for evaluation: a prompt, a reference and the judge of answers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bmjax.config import UserError
from bmjax.io.rows import Row, fill, read_rows, refuse_shown_reference
from bmjax.log import Log, write_line
from bmjax.teach.adapters.livecodebench import unpacked
from bmjax.teach.adapters.reading import adapted, matching, within
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.settings import ProblemSettings


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its reference.

    location: its row, for errors. judge: the name of the judge of its answers. source: where it comes from, as its data
    set says. question: the prompt without the instruction that an adapter adds, empty without an adapter. row: the row
    that it was made of.
    """

    location: str
    prompt: str
    reference: Any
    judge: str = ""
    source: str = ""
    question: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_problems(
    data: str | Sequence[str], key: str, settings: ProblemSettings, log: Log = write_line
) -> Iterator[Problem]:
    """Yield the problems of `data`, which the setting `key` names. UserError names the row that makes none."""
    for problem in read_unchecked(data, key, settings, log):
        yield checked(problem, settings)


def read_unchecked(
    data: str | Sequence[str], key: str, settings: ProblemSettings, log: Log = write_line
) -> Iterator[Problem]:
    """Yield the problems of `data`, their references not looked at; see `checked`.

    log: takes a line for rows that were changed or left out.
    """
    rows = read_rows(data, key, log)
    if settings.only:
        rows = matching(rows, settings.only, key, log)
    if settings.between:
        rows = within(rows, settings.between, key, log)
    for location, row, fields in itertools.islice(_problems(rows, key, settings, log), settings.limit):
        prompt, reference = fields["prompt"], fields["reference"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{location}: the prompt is empty or not text; check key 'prompt'")
        judge_name = fields.get("judge") or ""
        source, question = fields.get("source", ""), fields.get("question", "")
        yield Problem(location, prompt, reference, judge_name, source, question, row)


def _problems(
    rows: Iterator[Row], key: str, settings: ProblemSettings, log: Log
) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """Yield (location, row, {prompt, reference, ...}) of every row, by its adapter or the templates."""
    if settings.adapter is not None:
        templates = settings.template("prompt"), settings.template("reference")
        yield from adapted(rows, settings.adapter, key, *templates, settings.instruction, log)
        return
    for location, row in rows:
        prompt = fill(settings.prompt, row, location, "prompt")
        reference = fill(settings.reference, row, location, "reference") if settings.reference else None
        refuse_shown_reference(settings.prompt, settings.reference, reference, location, "prompt")
        yield location, row, {"prompt": prompt, "reference": reference}


def checked(problem: Problem, settings: ProblemSettings) -> Problem:
    """Return a problem with the judge of its answers, and with its tests as a judge reads them.

    Raises:
        UserError: for a reference that the judge cannot read.
    """
    try:
        name, reference = settings.judge or problem.judge or None, unpacked(problem.reference)
        judge(reference, "", name)
        return replace(problem, reference=reference, judge=name or choose(reference))
    except UserError as error:
        raise UserError(f"{problem.location}: {error}") from None
