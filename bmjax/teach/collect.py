"""Collects a teacher's traces: every problem times every sample, each a record of its own, none asked twice.

A run that was stopped continues: ids already in traces.jsonl are skipped. An answer cut off at max_tokens is paid for
and therefore kept; selection drops it. A request that fails for good becomes a line of failures.jsonl and is tried
again by the next run.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines
from bmjax.log import Log, silent
from bmjax.teach.client import ChatClient, Reply, RequestFailed, api_key, run_async
from bmjax.teach.judges.judge import judge
from bmjax.teach.problems import Problem, read_problems
from bmjax.teach.record import TRACES, Record, ids_present, record_id
from bmjax.teach.settings import CollectSettings, TeacherSettings

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


Sample = tuple[str, tuple[Problem, int]]  # the record's id, the problem and which of its samples


def collect(settings: CollectSettings, log: Log = silent) -> dict[str, int]:
    """Ask the teacher for every trace that is not there yet.

    Appends to OUTPUT/traces.jsonl and OUTPUT/failures.jsonl.

    Returns:
        How many traces were or are in each state of COUNTS.

    Raises:
        UserError: for bad problems, a missing key, an endpoint that cannot be reached or refuses the key or the model,
            and when another process collects into the same directory.
    """
    output, domain = Path(settings.output), settings.domain
    endpoint(settings.teacher)
    api_key(settings.teacher.api_key_env)
    wanted = wanted_samples(settings)
    with JsonLines(output / TRACES) as traces, JsonLines(output / FAILURES) as failures:
        present = ids_present(output / TRACES)
        missing = {identity: sample for identity, sample in wanted.items() if identity not in present}
        counts = dict.fromkeys(COUNTS, 0) | {"wanted": len(wanted), "present": len(wanted) - len(missing)}
        log(f"collect {domain}: {counts['wanted']} traces wanted, {counts['present']} already there")
        if not missing:
            return counts
        run_async(_Collector(settings, traces, failures, counts, log).run(missing))
    log(
        f"collect {domain}: {counts['collected']} collected ({counts['right']} right, {counts['wrong']} wrong, "
        f"{counts['unjudged']} unjudged, {counts['truncated']} truncated), {counts['failed']} failed"
    )
    return counts


def wanted_samples(settings: CollectSettings) -> dict[str, tuple[Problem, int]]:
    """Return the problem and the sample's index of every trace that `settings` ask for, by the record's id.

    Each id is there once even where the input repeats a prompt.
    """
    teacher, domain = settings.teacher, settings.domain
    _, model = endpoint(teacher)
    sampling = sampling_parameters(teacher)
    samples: dict[str, tuple[Problem, int]] = {}
    for problem in read_problems(settings.problems, "problems", settings, domain):
        for index in range(teacher.samples):
            samples.setdefault(record_id(domain, problem.prompt, model, sampling, index), (problem, index))
    return samples


@dataclass
class _Collector:
    """A run of collecting: its files, its counts and its workers, which take samples from one iterator."""

    settings: CollectSettings
    traces: JsonLines
    failures: JsonLines
    counts: dict[str, int]
    log: Log
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)

    async def run(self, samples: Mapping[str, tuple[Problem, int]]) -> None:
        teacher = self.settings.teacher
        base_url, model = endpoint(teacher)
        waiting = iter(samples.items())
        concurrency = min(len(samples), teacher.concurrency)
        key = api_key(teacher.api_key_env)
        async with ChatClient(base_url, model, key, concurrency, teacher.retries, teacher.timeout) as client:
            workers = [asyncio.create_task(self._work(client, waiting)) for _ in range(concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: ChatClient, waiting: Iterator[Sample]) -> None:
        for identity, (problem, index) in waiting:
            # Every sample of a problem has a seed of its own.
            request = sampling_parameters(self.settings.teacher)
            if (seed := request.pop("seed")) is not None:
                request["seed"] = seed + index
            try:
                reply = await client.complete([{"role": "user", "content": problem.prompt}], request)
            except RequestFailed as error:
                self._failed(identity, problem, index, error)
            else:
                await self._received(identity, problem, index, reply)
            self._progress()

    async def _received(self, identity: str, problem: Problem, index: int, reply: Reply) -> None:
        settings, teacher = self.settings, self.settings.teacher
        # The slow judges wait for a process: off the event loop, whose lag would count as the teacher's.
        slow = problem.judge == "tests" or (problem.judge == "math" and "\\" in reply.response)
        arguments = (problem.reference, reply.response, problem.judge, settings.run_programs, reply.finish_reason)
        verdict = await asyncio.to_thread(judge, *arguments) if slow else judge(*arguments)
        record = Record(
            id=identity,
            domain=settings.domain,
            source=problem.location,
            prompt=problem.prompt,
            reference=problem.reference,
            reasoning=reply.reasoning,
            response=reply.response,
            finish_reason=reply.finish_reason,
            teacher={"model": teacher.model, **sampling_parameters(teacher), "sample": index},
            usage=reply.usage,
            verdict=verdict.verdict,
            verdict_by=verdict.judge,
        )
        self.traces.append(vars(record))
        self.counts["collected"] += 1
        self.counts[verdict.verdict] += 1
        self.counts["truncated"] += reply.finish_reason == "length"

    def _failed(self, identity: str, problem: Problem, index: int, error: RequestFailed) -> None:
        base_url = self.settings.teacher.base_url
        if error.status in _FATAL:
            raise UserError(f"teacher {base_url}: {error}; {_FATAL[error.status]}")
        if error.status is None and not self.counts["collected"]:
            raise UserError(
                f"teacher {base_url}: no answer after {error.attempts} attempts ({error}); is the server running?"
            )
        self.counts["failed"] += 1
        sample = {"id": identity, "domain": self.settings.domain, "prompt": problem.prompt, "sample": index}
        self.failures.append(sample | {"error": str(error), "status": error.status, "attempts": error.attempts})

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self.logged < LOG_EVERY_SECONDS:
            return
        self.logged = now
        counts = self.counts
        done, wanted = counts["collected"] + counts["failed"], counts["wanted"] - counts["present"]
        rate = done / (now - self.started)
        self.log(
            f"collect {self.settings.domain}: {done}/{wanted}, {rate:.1f}/s, {counts['failed']} failed, "
            f"eta {(wanted - done) / rate:.0f} s"
        )


def sampling_parameters(teacher: TeacherSettings) -> dict[str, Any]:
    """Return what decides an answer besides the prompt and the sample. It is part of the record's id."""
    names = ("temperature", "top_p", "max_tokens", "seed")
    return {name: getattr(teacher, name) for name in names} | teacher.extra


def endpoint(teacher: TeacherSettings) -> tuple[str, str]:
    """Return (base_url, model) of a teacher; UserError naming the key that is missing."""
    if not teacher.base_url:
        raise UserError("key 'teacher.base_url' is missing; give the endpoint, e.g. http://localhost:8000/v1")
    if not teacher.model:
        raise UserError("key 'teacher.model' is missing; name the model as the endpoint knows it")
    return teacher.base_url, teacher.model
