"""Collects a teacher's traces: every problem times every sample, each a record of its own, none asked twice.

A run that was stopped continues: ids already in traces.jsonl, or in that of another shard, are skipped. An answer that
was cut off, declined or cannot be read is paid for and therefore kept; selection drops it. A request that fails for
good becomes a line of failures.jsonl and is tried again by the next run.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bmjax.chat.replies import UNREADABLE
from bmjax.config import UserError, first_line
from bmjax.io import bucket
from bmjax.io.atomic import held
from bmjax.io.jsonl import JsonLines
from bmjax.log import Log, progress_bar, silent, write_line
from bmjax.teach.asking import endpoint, make_client, request_parameters, sampling_parameters, system_turn
from bmjax.teach.client import NO_BALANCE, Reply, RequestFailed, run_async
from bmjax.teach.endpoint import api_key
from bmjax.teach.index import read_ids, update_index
from bmjax.teach.judges.judge import judge
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.limits import Stopped
from bmjax.teach.model_judge import ModelJudge
from bmjax.teach.problems import Problem, checked, read_unchecked
from bmjax.teach.progress import Progress
from bmjax.teach.record import (
    TRACES,
    Record,
    RecordIds,
    is_in_shard,
    is_whole,
    normalise_prompt,
    shard_files,
    shard_name,
)
from bmjax.teach.settings import CollectSettings
from bmjax.urls import url_of

FAILURES = "failures.jsonl"
LOG_EVERY_SECONDS = 10.0
_SYNC_EVERY_SECONDS = 1.0
_BATCH = 64  # problems read at a time while a run goes on

# What no other problem can mend where it is the first thing that an endpoint says: the key, the address or the name.
_KEY_HINT = "check the key in the variable teacher.api_key_env names"
REFUSALS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "check teacher.base_url and teacher.model",
    405: "check teacher.base_url",
}
REFUSALS_THAT_END = 3  # a single one may be that prompt's
SAME_FAILURES_THAT_END = (20, 100)  # in a row, in the same words: before the first answer, and after it

Sample = tuple[bytes, Problem, int]  # the 32 bytes of the record's id, the problem and which of its samples


def collect(settings: CollectSettings, log: Log = silent) -> dict[str, int]:
    """Ask the teacher for every trace that is not there yet.

    Appends to OUTPUT/traces.jsonl and OUTPUT/failures.jsonl; a shard to those of its folder in OUTPUT. The first
    interrupt (Ctrl-C) lets the requests in flight end and keeps their answers, the second stops at once.

    Returns:
        How many traces were or are in each state of COUNTS, and "ended by NAME" for answers that are not whole.

    Raises:
        UserError: for bad problems, a bad key, an endpoint that cannot be reached or refuses the key or the model, a
            balance that is used up, and when another process collects into the same directory.
        KeyboardInterrupt: after an interrupt, once what arrived is on disk.
    """
    domain, folder, output = settings.domain, Path(settings.output), output_folder(settings)
    check_endpoints(settings)
    with contextlib.ExitStack() as stack:
        if url_of(output):  # files of a bucket are locked on this machine only
            stack.enter_context(held(output / ".lock", "another process collects into it"))
        traces = stack.enter_context(JsonLines(output / TRACES, sync_every=2**20))
        failures = stack.enter_context(JsonLines(output / FAILURES))
        if (url := url_of(folder)) and any(map(_is_traces, bucket.names_in(url))):
            bucket.fetch(url, wanted=_is_traces)
        here = bucket.mirror(folder)
        present = read_ids(traces.path, keep_index=True)
        for path in {here / TRACES, *shard_files(here).values()} - {traces.path}:
            present |= read_ids(path)
        wanted, missing = _count(settings, present)
        progress = Progress(wanted, wanted - missing, settings.teacher.price)
        counts = progress.counts
        log(f"collect {domain}: {counts['wanted']} traces wanted, {counts['present']} already there")
        if not missing:
            return counts
        collector = _Collector(settings, traces, failures, progress, missing, log)
        progress.bar = stack.enter_context(
            progress_bar(f"collect {domain}", "traces", missing, shown=log is not silent, lines=False)
        )
        try:
            with interrupts(collector.interrupt):
                run_async(collector.run(present))
        finally:
            update_index(traces.path)
            if counts["collected"] or counts["failed"]:
                log(f"collect {domain}: {progress.summary()}")
    if collector.interrupted:
        raise KeyboardInterrupt
    return counts | {f"ended by {name}": count for name, count in progress.finish_reasons.items()}


def check_endpoints(settings: CollectSettings) -> None:
    """Raise UserError for a teacher, or a model that judges, whose address, name or key is missing."""
    for model, key in ((settings.teacher, "teacher"), (settings.judge_model, "judge_model")):
        if model is not None:
            endpoint(model, key)
            api_key(model.api_key_env)


def _is_traces(name: str) -> bool:
    return name.rpartition("/")[2] == TRACES


def output_folder(settings: CollectSettings) -> Path:
    """Return the directory that a collection writes to: OUTPUT, or a shard's in it."""
    folder = Path(settings.output)
    return folder if settings.shard is None else folder / shard_name(settings.shard)


def samples_of(settings: CollectSettings, log: Log = silent) -> Iterator[Sample]:
    """Yield every sample that `settings` ask for, each id once even where the input repeats a prompt."""
    teacher = settings.teacher
    _, model = endpoint(teacher)
    ids = RecordIds(settings.domain, model, sampling_parameters(teacher))
    indices = range(teacher.samples)
    seen: set[bytes] = set()
    repeated = 0
    for problem in read_unchecked(settings.problems, "problems", settings, log):
        if settings.shard is not None and not is_in_shard(normalise_prompt(problem.prompt), settings.shard):
            continue
        for index, identity in zip(indices, ids.of(problem.prompt, indices), strict=True):
            if identity in seen:
                repeated += index == 0
            else:
                seen.add(identity)
                yield identity, problem, index
    if repeated:
        log(f"problems: {repeated:,} of them repeat the prompt of an earlier one, whose reference counts; asked once")


def wanted_samples(settings: CollectSettings) -> dict[str, tuple[Problem, int]]:
    """Return the problem and the sample's index of every trace that `settings` ask for, by the record's id."""
    samples = _checked(samples_of(settings, write_line), settings)
    return {identity.hex(): (problem, index) for identity, problem, index in samples}


def _checked(samples: Iterator[Sample], settings: CollectSettings) -> Iterator[Sample]:
    last: tuple[Problem, Problem] | None = None
    for identity, problem, index in samples:
        if last is None or last[0] is not problem:
            last = problem, checked(problem, settings)
        yield identity, last[1], index


def _count(settings: CollectSettings, present: set[bytes]) -> tuple[int, int]:
    """Return how many samples are asked for and how many of them are missing, whose problems are checked."""
    wanted = 0

    def absent() -> Iterator[Sample]:
        nonlocal wanted
        for sample in samples_of(settings, write_line):
            wanted += 1
            if sample[0] not in present:
                yield sample

    missing = sum(1 for _ in _checked(absent(), settings))
    return wanted, missing


class _Collector:
    """A run of collecting: its files, its progress and its workers, which take samples from one queue."""

    def __init__(
        self,
        settings: CollectSettings,
        traces: JsonLines,
        failures: JsonLines,
        progress: Progress,
        missing: int,
        log: Log,
    ) -> None:
        self.settings, self.traces, self.failures, self.progress, self.log = settings, traces, failures, progress, log
        self.interrupted = 0
        teacher = settings.teacher
        self._sampling = sampling_parameters(teacher)
        self._concurrency = min(missing, teacher.concurrency)
        self._problem: Exception | None = None  # what ends the run
        self._refused: list[tuple[Sample, RequestFailed]] = []  # before the first answer
        self._same_failures, self._last_failure = 0, ""
        self._judges = ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4), "judge")
        self._tasks: list[asyncio.Task[None]] = []
        self._receiving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def interrupt(self) -> None:
        """Stop asking; the second time, drop what is in flight. Called by a handler of signals."""
        if self._loop is None:
            raise KeyboardInterrupt
        self._loop.call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        self.interrupted += 1
        self._client.stop()
        if self.interrupted == 1:
            self.log("stopping: answers in flight are waited for and kept; Ctrl-C again stops now")
        else:
            for task in self._tasks:
                task.cancel()
            asyncio.get_running_loop().call_soon(self._stop_judging)  # those that just began, too

    def _stop_judging(self) -> None:
        for task in self._receiving:
            task.cancel()

    async def run(self, present: set[bytes]) -> None:
        """Ask for all samples that are not present. Raises what ended the run early."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Sample | None] = asyncio.Queue(2 * self._concurrency)
        self._backlog = asyncio.Semaphore(2 * self._concurrency)  # answers that wait for their judges
        async with contextlib.AsyncExitStack() as stack:
            self._client = await stack.enter_async_context(make_client(self.settings.teacher, self._concurrency))
            self._model_judge = None
            if (model := self.settings.judge_model) is not None:
                client = await stack.enter_async_context(make_client(model, model.concurrency))
                self._model_judge = ModelJudge(client, sampling_parameters(model), system_turn(model), self.log)
            feeder = asyncio.create_task(self._feed(present))
            reporter = asyncio.create_task(self._report())
            self._tasks = [asyncio.create_task(self._work()) for _ in range(self._concurrency)]
            try:
                await asyncio.gather(*self._tasks, return_exceptions=True)
                while self._receiving:
                    await asyncio.gather(*self._receiving, return_exceptions=True)
            finally:
                for task in (feeder, reporter, *self._tasks, *self._receiving):
                    task.cancel()
                await asyncio.gather(feeder, reporter, *self._tasks, *self._receiving, return_exceptions=True)
                self._judges.shutdown(wait=False, cancel_futures=True)
        self._settle_refused()
        if self._problem is not None:
            raise self._problem

    def _end(self, problem: Exception) -> None:
        """End the run: nothing more is asked, answers in flight are waited for."""
        self._problem = self._problem or problem
        self._client.stop()

    async def _feed(self, present: set[bytes]) -> None:
        """Read the problems again, a few ahead of the workers, so that none need wait in memory."""
        absent = (sample for sample in samples_of(self.settings) if sample[0] not in present)
        samples = _checked(absent, self.settings)
        try:
            while not self._client.is_stopped:
                batch = await asyncio.to_thread(lambda: [*itertools.islice(samples, _BATCH)])
                for sample in batch:
                    await self._queue.put(sample)
                if not batch:
                    break
        except Exception as error:  # the file of problems has changed since it was counted
            self._end(error)
        for _ in range(self._concurrency):
            await self._queue.put(None)

    async def _report(self) -> None:
        """Put what was recorded on disk and tell the progress, from time to time."""
        logged = time.monotonic()
        while True:
            await asyncio.sleep(_SYNC_EVERY_SECONDS)
            try:
                await asyncio.to_thread(self.traces.sync)
            except UserError as error:  # a failing disk
                self._end(error)
            self.progress.show()
            if not self.progress.is_bar and time.monotonic() - logged >= LOG_EVERY_SECONDS:
                logged = time.monotonic()
                self.log(f"collect {self.settings.domain}: {self.progress.line()}")

    async def _work(self) -> None:
        try:
            await self._ask()
        except Stopped:
            pass
        except Exception as error:  # the endpoint cannot be reached, a full disk
            self._end(error)

    async def _ask(self) -> None:
        """Ask for one sample after the other."""
        system = system_turn(self.settings.teacher)
        while (sample := await self._queue.get()) is not None and not self._client.is_stopped:
            _, problem, index = sample
            request = request_parameters(self.settings.teacher, index)
            try:
                reply = await self._client.complete([*system, {"role": "user", "content": problem.prompt}], request)
            except RequestFailed as error:
                self._failed(sample, error)
                continue
            self._same_failures = 0
            task = asyncio.create_task(self._receive(sample, reply))
            self._receiving.add(task)
            task.add_done_callback(self._receiving.discard)
            async with self._backlog:  # wait while too many answers wait for their judges
                pass

    async def _receive(self, sample: Sample, reply: Reply) -> None:
        """Judge an answer and record it. An interrupt while it is judged records it without a verdict."""
        verdict = Verdict("unjudged", "not judged", "none")
        try:
            async with self._backlog:
                if reply.finish_reason != UNREADABLE:
                    verdict = await self._judge(sample[1], reply)
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
        self._record(sample, reply, verdict)

    async def _judge(self, problem: Problem, reply: Reply) -> Verdict:
        """Judge off the event loop, whose lag would count as the teacher's. What fails leaves an answer unjudged."""
        settings = self.settings
        arguments = (
            problem.reference, reply.response, problem.judge, settings.run_programs, reply.finish_reason,
            settings.program_seconds,
        )  # fmt: skip
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(self._judges, judge, *arguments)
        except Exception as error:
            verdict = Verdict("unjudged", f"the judge failed: {first_line(error)}", "none")
            self.log(
                f"{problem.location}: judge {problem.judge}: {type(error).__name__}: {first_line(error)}; unjudged"
            )
        if verdict.verdict == "unjudged" and self._model_judge is not None and is_whole(reply.finish_reason):
            return await self._model_judge.judge(problem.prompt, problem.reference, reply.response, verdict)
        return verdict

    def _record(self, sample: Sample, reply: Reply, verdict: Verdict) -> None:
        identity, problem, index = sample
        record = Record(
            id=identity.hex(),
            domain=self.settings.domain,
            source=problem.source or problem.location,
            prompt=problem.prompt,
            reference=problem.reference,
            reasoning=reply.reasoning,
            response=reply.response,
            finish_reason=reply.finish_reason,
            teacher={"model": self.settings.teacher.model, **self._sampling, "sample": index},
            usage=reply.usage,
            verdict=verdict.verdict,
            verdict_by=verdict.judge,
            logprobs=reply.logprobs,
        )
        try:
            self.traces.append(record.to_json())
            self.progress.note_answer(verdict, reply.finish_reason, reply.usage)
        except Exception as error:  # a full disk
            self._end(error)

    def _failed(self, sample: Sample, error: RequestFailed) -> None:
        """Note a request without an answer. Some say that all others will have none either, and end the run."""
        if error.excess is not None and error.excess.is_of_prompt:  # says nothing of other prompts
            return self._list_failure(sample, error)
        label, collected = self._client.address.label, self.progress.counts["collected"]
        words = str(error)
        self._same_failures = self._same_failures + 1 if words == self._last_failure else 1
        self._last_failure = words
        if error.status == NO_BALANCE:
            return self._end(
                UserError(f"teacher {label}: {error}; no balance is left: top it up, the same command continues")
            )
        if error.status in REFUSALS and not collected:
            self._refused.append((sample, error))
            if len(self._refused) >= REFUSALS_THAT_END and not self.progress.counts["present"]:
                self._end(UserError(f"teacher {label}: {error}; {REFUSALS[error.status]}"))
        else:
            self._list_failure(sample, error)
        if self._same_failures >= SAME_FAILURES_THAT_END[bool(collected)]:
            hint = REFUSALS.get(error.status or 0, "the endpoint says the same of every request")
            self._end(UserError(f"teacher {label}: {self._same_failures} requests in a row failed: {error}; {hint}"))

    def _settle_refused(self) -> None:
        """List refusals as failures of their prompts. Where nothing was ever answered they are the endpoint's."""
        counts = self.progress.counts
        if self._refused and not counts["collected"] and not counts["present"] and not self.interrupted:
            _, error = self._refused[-1]
            hint = REFUSALS[error.status or 0]
            self._problem = self._problem or UserError(f"teacher {self._client.address.label}: {error}; {hint}")
            return
        for sample, error in self._refused:
            self._list_failure(sample, error)

    def _list_failure(self, sample: Sample, error: RequestFailed) -> None:
        identity, problem, index = sample
        if not self.progress.counts["failed"]:
            self.log(f"collect {self.settings.domain}: a request failed: {error}; all such are in {FAILURES}")
        self.progress.counts["failed"] += 1
        values = {"id": identity.hex(), "domain": self.settings.domain, "prompt": problem.prompt, "sample": index}
        self.failures.append(values | {"error": str(error), "status": error.status, "attempts": error.attempts})


@contextlib.contextmanager
def interrupts(handler: Callable[[], None]) -> Iterator[None]:
    """Have interrupts call a function while the block runs. Only the main thread gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
