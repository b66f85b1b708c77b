"""What a collection would ask, and what that would cost: `bmjax collect --check` and that of `bmjax run`."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from bmjax.io import bucket
from bmjax.log import Log, silent
from bmjax.teach.asking import endpoint
from bmjax.teach.collect import check_endpoints, output_folder, samples_of
from bmjax.teach.index import read_ids
from bmjax.teach.problems import checked
from bmjax.teach.record import TRACES, Record, read_records, shard_files
from bmjax.teach.settings import CollectSettings, TeacherSettings
from bmjax.urls import Address

LOOKED_AT = 1000  # traces from which the mean length of an answer is taken
CHARACTERS_A_TOKEN = 4  # of English


def describe(settings: CollectSettings, log: Log = silent) -> list[str]:
    """Return what `collect` would do, in lines: requests, the longest they can be, and the cost by the prices.

    It reads problems and traces, asks and writes nothing. Raises UserError for what `collect` refuses before it asks.
    """
    teacher = settings.teacher
    check_endpoints(settings)
    here = bucket.mirror(Path(settings.output))
    present: set[bytes] = set()
    for path in {here / TRACES, *shard_files(here).values(), bucket.mirror(output_folder(settings)) / TRACES}:
        present |= read_ids(path)
    wanted, missing, characters = 0, 0, 0
    for identity, problem, _ in samples_of(settings, log):
        wanted += 1
        if identity not in present:
            missing += 1
            characters += len(checked(problem, settings).prompt)
    # What an answer took until now tells more than the most it may take.
    records = itertools.islice(_records(here / TRACES), LOOKED_AT)
    used = [tokens for record in records if isinstance(tokens := record.usage.get("completion_tokens"), int)]
    return [
        f"collect {settings.domain}: {wanted:,} traces wanted, {wanted - missing:,} already there",
        *requests(teacher, missing, characters, used),
        "nothing was asked or written",
    ]


def requests(teacher: TeacherSettings, count: int, characters: int, used: Sequence[int] = ()) -> list[str]:
    """Return in lines how many requests there are, their tokens, and their cost by the teacher's prices.

    characters: of all prompts. used: tokens of answers that such requests took.
    """
    base_url, model = endpoint(teacher)
    prompts = characters / CHARACTERS_A_TOKEN
    lines = [
        f"{count:,} requests of {model} at {Address.parse(base_url).label}, {teacher.concurrency} at a time",
        f"prompts of about {prompts:,.0f} tokens ({CHARACTERS_A_TOKEN} characters each)",
    ]
    answers = []
    if teacher.max_tokens is not None:
        answers.append((f"at most {count * teacher.max_tokens:,} tokens", float(count * teacher.max_tokens)))
    if used:
        mean = sum(used) / len(used)
        answers.append((f"about {count * mean:,.0f} tokens, as {len(used)} answers there", count * mean))
    price = teacher.price
    for text, tokens in answers:
        cost = "" if price is None else f"; cost {(price.input * prompts + price.output * tokens) / 1e6:,.2f}"
        lines.append(f"answers of {text}{cost}")
    if price is None:
        lines.append("no cost: give teacher.price, {input, output} for a million tokens")
    return lines


def _records(path: Path) -> Iterator[Record]:
    return read_records(path) if path.exists() else iter(())
