"""Answers samples through an OpenAI-compatible endpoint, with teach's client: its limits, retries and proxies."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bmjax.chat.reasoning import OPEN, join_think
from bmjax.config import UserError
from bmjax.evaluate.answering import Generated, Receive, turns
from bmjax.evaluate.judging import OVER_CONTEXT
from bmjax.evaluate.questions import Asked
from bmjax.evaluate.settings import EvalSettings
from bmjax.log import Log
from bmjax.teach.asking import endpoint, make_client
from bmjax.teach.client import NO_BALANCE, ChatClient, Reply, RequestFailed, run_async
from bmjax.teach.collect import REFUSALS, REFUSALS_THAT_END, SAME_FAILURES_THAT_END, interrupts
from bmjax.teach.endpoint import api_key
from bmjax.teach.limits import Stopped

_LIMITS = ("max_tokens", "max_completion_tokens")  # fields of requests that say how long an answer may be


class EndpointAnswerer:
    """The model of `settings` behind its base_url. UserError for an address or a key that cannot be used."""

    def __init__(self, settings: EvalSettings, log: Log) -> None:
        _, self.identity = endpoint(settings, "eval")
        api_key(settings.api_key_env)
        self._settings, self._log = settings, log

    def check(self, name: str, asked: Sequence[Asked]) -> None:
        """See `Answerer`. What an endpoint's model can read, it says itself."""

    def answer(self, name: str, asked: Sequence[Asked], receive: Receive) -> list[str]:
        """See `Answerer`."""
        asking = _Asking(self._settings, name, asked, receive, self._log)
        with interrupts(asking.interrupt):
            run_async(asking.run())
        if asking.interrupted:
            raise KeyboardInterrupt
        return asking.failures


class _Asking:
    """The requests of one task: so many workers as may be in flight take samples from one line."""

    def __init__(self, settings: EvalSettings, name: str, asked: Sequence[Asked], receive: Receive, log: Log) -> None:
        self.settings, self.name, self.receive, self.log = settings, name, receive, log
        self.total, self.answered = len(asked), 0
        self.failures: list[str] = []
        self.interrupted = 0
        self._waiting: Iterator[Asked] = iter(asked)
        self._problem: BaseException | None = None
        self._refused: list[RequestFailed] = []
        self._same_failures, self._last_failure = 0, ""
        self._told_of_context = False
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: ChatClient | None = None

    def interrupt(self) -> None:
        """Stop asking and let answers in flight arrive; the second time drop them. Called by a handler of signals."""
        if self._loop is None or self._client is None:
            raise KeyboardInterrupt
        self.interrupted += 1
        if self.interrupted == 1:
            self._loop.call_soon_threadsafe(self._client.stop)
            self.log("stopping: answers in flight are waited for and kept; Ctrl-C again stops now")
        else:
            for task in self._tasks:
                self._loop.call_soon_threadsafe(task.cancel)

    async def run(self) -> None:
        """Ask for all samples. Raises what ended the run early."""
        self._loop = asyncio.get_running_loop()
        concurrency = min(self.settings.concurrency, self.total)
        # A model that ends its turn at once has answered, and wrongly; another try would favour it.
        async with make_client(self.settings, concurrency, takes_empty=True) as client:
            self._client = client
            self._tasks = [asyncio.create_task(self._work(client)) for _ in range(concurrency)]
            try:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._problem is None and self._refused and not self.answered and not self.interrupted:
            self._problem = self._refusal(client, self._refused[-1])
        if self._problem is not None:
            raise self._problem

    async def _work(self, client: ChatClient) -> None:
        try:
            for asked in self._waiting:
                if client.is_stopped:
                    return
                await self._ask(client, asked)
        except Stopped:
            pass
        except Exception as error:  # the endpoint cannot be reached, a full disk
            self._end(client, error)

    async def _ask(self, client: ChatClient, asked: Asked) -> None:
        """Ask for one sample, and hand over its answer."""
        settings, name, seed = self.settings, self.name, self.settings.of_task(self.name, "seed")
        request = {
            "temperature": settings.of_task(name, "temperature"), "top_p": settings.of_task(name, "top_p"),
            "max_tokens": settings.of_task(name, "max_new_tokens"),
            "seed": None if seed is None else seed + asked.sample,
        }  # fmt: skip
        if "max_completion_tokens" in settings.extra:
            del request["max_tokens"]
        try:
            reply = await self._complete(client, turns(settings, name, asked.prompt), request | settings.extra)
        except RequestFailed as error:
            self._failed(client, asked, error)
            return
        self._same_failures = 0
        self.answered += 1
        self.receive(asked, Generated("", OVER_CONTEXT) if reply is None else _generated(reply, request["seed"]))

    async def _complete(
        self, client: ChatClient, chat: Sequence[Mapping[str, str]], request: Mapping[str, Any]
    ) -> Reply | None:
        """Return the answer to a chat; None where its prompt alone is over the model's context.

        Many endpoints refuse a prompt whose longest answer would pass the end of the context. It is then asked again,
        for what is left of the context, or without a limit where the refusal does not tell that. The answer ends where
        the context does, as it does of a model in this process.
        """
        try:
            return await client.complete(chat, request)
        except RequestFailed as error:
            if error.excess is None:
                raise
            if error.excess.is_of_prompt or not any(request.get(key) for key in _LIMITS):
                return None
            first, excess = error, error.excess
        shorter = {key: value for key, value in request.items() if key not in _LIMITS}
        if excess.room is not None:
            shorter[next(key for key in _LIMITS if request.get(key))] = excess.room
        try:
            reply = await client.complete(chat, shorter)
        except RequestFailed as error:
            if error.excess is None:
                raise
            return None
        if not self._told_of_context:
            self._told_of_context = True
            self.log(
                f"eval {self.name}: the endpoint holds no prompt with max_new_tokens beside it ({first}); such samples "
                "are asked for once more and end where its context does"
            )
        return reply

    def _failed(self, client: ChatClient, asked: Asked, error: RequestFailed) -> None:
        """Note a request without an answer. Some say that all others will have none either, and end the run."""
        if not self.failures:
            self.log(f"eval {self.name}: a request failed: {error}")
        self.failures.append(f"{asked.question.location}, sample {asked.sample}: {error}")
        words = str(error)
        self._same_failures = self._same_failures + 1 if words == self._last_failure else 1
        self._last_failure = words
        label = client.address.label
        if error.status == NO_BALANCE:
            self._end(client, UserError(f"{label}: {error}; no balance is left: top it up, the same command continues"))
        elif error.status in REFUSALS and not self.answered:
            self._refused.append(error)
            if len(self._refused) >= REFUSALS_THAT_END:
                self._end(client, self._refusal(client, error))
        elif self._same_failures >= SAME_FAILURES_THAT_END[bool(self.answered)]:
            self._end(client, UserError(f"{label}: {self._same_failures} requests in a row failed: {error}"))

    def _refusal(self, client: ChatClient, error: RequestFailed) -> UserError:
        hint = REFUSALS[error.status or 0].replace("teacher.", "")
        return UserError(f"{client.address.label}: {error}; {hint}")

    def _end(self, client: ChatClient, problem: BaseException) -> None:
        """End the run: nothing more is asked, answers in flight are waited for."""
        self._problem = self._problem or problem
        client.stop()


def _generated(reply: Reply, seed: int | None) -> Generated:
    counts = [reply.usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
    tokens, prompt_tokens = (count if isinstance(count, int) else None for count in counts)
    text = join_think(reply.reasoning, reply.response)
    if reply.reasoning and not reply.response and reply.finish_reason == "length":
        text = f"{OPEN}\n{reply.reasoning}"  # cut within its thought
    return Generated(text, reply.finish_reason, tokens, prompt_tokens, seed)
