"""Collects a teacher's traces: every problem times every sample, each a record of its own, none asked twice.

A run that was stopped continues: ids already in traces.jsonl are skipped. An answer cut off at max_tokens is paid for
and therefore kept; selection drops it. A request that fails for good becomes a line of failures.jsonl and is tried
again by the next run.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines
from bmjax.io.rows import fill, read_rows
from bmjax.teach.client import ChatClient, Reply, RequestFailed, api_key, run_async
from bmjax.teach.judges.verify import kind_of, verify
from bmjax.teach.record import Record, ids_present, record_id
from bmjax.teach.settings import CollectSettings, TeacherSettings

TRACES = "traces.jsonl"
FAILURES = "failures.jsonl"
LOG_EVERY_SECONDS = 10.0
COUNTS = ("wanted", "present", "collected", "failed", "right", "wrong", "unjudged", "truncated")

# What no retry and no other problem can mend: the key, the address or the model's name is wrong.
_FATAL = {
    401: "check the key in the variable teacher.api_key_env names",
    403: "check the key in the variable teacher.api_key_env names",
    404: "check teacher.base_url and teacher.model",
    405: "check teacher.base_url",
}


@dataclass(frozen=True)
class Job:
    """One sample of one problem still to be asked for."""

    id: str
    prompt: str
    reference: Any
    source: str
    sample: int


def collect(settings: CollectSettings, log: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """Ask the teacher for every trace that is not there yet; returns the counts named in COUNTS.

    Appends to OUTPUT/traces.jsonl and OUTPUT/failures.jsonl. UserError for bad problems, a missing key, an endpoint
    that cannot be reached or refuses the key or model, and when another process collects into the same directory.
    """
    teacher, output = settings.teacher, Path(settings.output)
    base_url, model = endpoint(teacher)
    key = api_key(teacher.api_key_env)
    problems = list(_problems(settings))
    if not problems:
        raise UserError(f"problems: {settings.problems} holds no problem")
    counts = dict.fromkeys(COUNTS, 0)
    domain = settings.domain
    with JsonLines(output / TRACES) as traces, JsonLines(output / FAILURES) as failures:
        jobs = _jobs(problems, domain, model, teacher, ids_present(output / TRACES), counts)
        log(f"collect {domain}: {counts['wanted']} traces wanted, {counts['present']} already there")
        if not jobs:
            return counts
        collector = _Collector(settings, model, base_url, key, traces, failures, counts, log)
        run_async(collector.run(jobs))
    log(
        f"collect {domain}: {counts['collected']} collected ({counts['right']} right, {counts['wrong']} wrong, "
        f"{counts['unjudged']} unjudged, {counts['truncated']} truncated), {counts['failed']} failed"
    )
    return counts


def wanted_ids(settings: CollectSettings) -> set[str]:
    """Return the ids of the traces that `settings` ask for, collected or not."""
    _, model = endpoint(settings.teacher)
    counts = dict.fromkeys(COUNTS, 0)
    jobs = _jobs(_problems(settings), settings.domain, model, settings.teacher, set(), counts)
    return {job.id for job in jobs}


class _Collector:
    """The state of one run: a few workers take jobs from one iterator, so memory does not grow with the input."""

    def __init__(
        self,
        settings: CollectSettings,
        model: str,
        base_url: str,
        key: str | None,
        traces: JsonLines,
        failures: JsonLines,
        counts: dict[str, int],
        log: Callable[[str], None],
    ) -> None:
        self.settings, self.teacher, self.domain = settings, settings.teacher, settings.domain
        self.model, self.base_url, self.key = model, base_url, key
        self.traces, self.failures, self.counts, self.log = traces, failures, counts, log
        self.started = self.logged = time.monotonic()

    async def run(self, jobs: Sequence[Job]) -> None:
        teacher = self.teacher
        waiting = iter(jobs)
        concurrency = min(len(jobs), teacher.concurrency)
        async with ChatClient(
            self.base_url, self.model, self.key, concurrency, teacher.retries, teacher.timeout
        ) as client:
            workers = [asyncio.create_task(self._work(client, waiting)) for _ in range(concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: ChatClient, waiting: Iterator[Job]) -> None:
        for job in waiting:
            request = request_parameters(self.teacher, job.sample)
            try:
                reply = await client.complete([{"role": "user", "content": job.prompt}], request)
            except RequestFailed as error:
                self._failed(job, error)
            else:
                await self._received(job, reply)
            self._progress()

    async def _received(self, job: Job, reply: Reply) -> None:
        kind = self.settings.verify or kind_of(self.domain, job.reference)
        # The slow judges wait for a process: off the event loop, whose lag would count as the teacher's.
        slow = kind == "tests" or (kind == "math" and "\\" in reply.response)
        arguments = (kind, job.reference, reply.response, self.settings.run_programs)
        verdict = await asyncio.to_thread(verify, *arguments) if slow else verify(*arguments)
        record = Record(
            id=job.id,
            domain=self.domain,
            source=job.source,
            prompt=job.prompt,
            reference=job.reference,
            reasoning=reply.reasoning,
            response=reply.response,
            finish_reason=reply.finish_reason,
            teacher={"model": self.model, **sampling_parameters(self.teacher), "sample": job.sample},
            usage=reply.usage,
            verdict=verdict.verdict,
            verdict_by=verdict.by,
        )
        self.traces.append(vars(record))
        self.counts["collected"] += 1
        self.counts[verdict.verdict] += 1
        self.counts["truncated"] += reply.finish_reason == "length"

    def _failed(self, job: Job, error: RequestFailed) -> None:
        if error.status in _FATAL:
            raise UserError(f"teacher {self.base_url}: {error}; {_FATAL[error.status]}")
        if error.status is None and not self.counts["collected"]:
            raise UserError(
                f"teacher {self.base_url}: no answer after {error.attempts} attempts ({error}); is the server running?"
            )
        self.counts["failed"] += 1
        self.failures.append(
            {
                "id": job.id,
                "domain": self.domain,
                "prompt": job.prompt,
                "sample": job.sample,
                "error": str(error),
                "status": error.status,
                "attempts": error.attempts,
            }
        )

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self.logged < LOG_EVERY_SECONDS:
            return
        self.logged = now
        done = self.counts["collected"] + self.counts["failed"]
        wanted = self.counts["wanted"] - self.counts["present"]
        rate = done / (now - self.started)
        self.log(
            f"collect {self.domain}: {done}/{wanted}, {rate:.1f}/s, {self.counts['failed']} failed, "
            f"eta {(wanted - done) / rate:.0f} s"
        )


def sampling_parameters(teacher: TeacherSettings) -> dict[str, Any]:
    """Return what decides an answer besides the prompt and the sample: part of the record's id."""
    return {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_tokens,
        "seed": teacher.seed,
        **teacher.extra,
    }


def request_parameters(teacher: TeacherSettings, sample: int) -> dict[str, Any]:
    """Return the sampling parameters of one request: its seed is the settings' seed plus the sample's index."""
    parameters = {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_tokens,
        **teacher.extra,
    }
    return parameters | ({"seed": teacher.seed + sample} if teacher.seed is not None else {})


def _jobs(
    problems: Iterable[tuple[str, Any, str]],
    domain: str,
    model: str,
    teacher: TeacherSettings,
    present: set[str],
    counts: dict[str, int],
) -> list[Job]:
    """Return the samples still wanted, each id once even where the input repeats a prompt."""
    jobs, seen, sampling = [], set[str](), sampling_parameters(teacher)
    for prompt, reference, source in problems:
        for sample in range(teacher.samples):
            identity = record_id(domain, prompt, model, sampling, sample)
            if identity in seen:
                continue
            seen.add(identity)
            if identity in present:
                counts["present"] += 1
            else:
                jobs.append(Job(identity, prompt, reference, source, sample))
    counts["wanted"] = len(seen)
    return jobs


def endpoint(teacher: TeacherSettings) -> tuple[str, str]:
    """Return (base_url, model) of a teacher; UserError naming the key that is missing."""
    if not teacher.base_url:
        raise UserError("key 'teacher.base_url' is missing; give the endpoint, e.g. http://localhost:8000/v1")
    if not teacher.model:
        raise UserError("key 'teacher.model' is missing; name the model as the endpoint knows it")
    return teacher.base_url, teacher.model


def _problems(settings: CollectSettings) -> Iterator[tuple[str, Any, str]]:
    """Yield (prompt, reference, source) of each problem."""
    for location, row in itertools.islice(read_rows(settings.problems, "problems"), settings.limit):
        prompt = fill(settings.prompt, row, location, "prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{location}: the prompt is empty or not text; check key 'prompt'")
        reference = fill(settings.reference, row, location, "reference") if settings.reference else None
        kind_of(settings.domain, reference)
        yield prompt, reference, location
