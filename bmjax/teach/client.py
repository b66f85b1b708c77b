"""One client for every model behind an OpenAI-compatible chat endpoint: teacher, student or judge.

Requests share kept-alive connections, limits in sliding windows, and retries with jittered exponential backoff that
honour what the endpoint says about when to come back. An attempt has one deadline, whatever the server sends meanwhile.
An endpoint that is dead is told from a request that failed.
"""

import asyncio
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import anyio
import httpx

from bmjax.chat.context_length import Excess, context_excess
from bmjax.chat.openai import ChatMessage, ChatRequest
from bmjax.chat.replies import Completion, EmptyCompletion, NoCompletion, ReplyError, ReplyReader, read_error
from bmjax.config import UserError, first_line
from bmjax.teach.endpoint import proxy_of, redact, trusted_certificates
from bmjax.teach.health import Health
from bmjax.teach.limits import Entry, SlidingWindow, Stopped
from bmjax.teach.waits import backoff, jittered, retry_after
from bmjax.urls import Address

RETRYABLE = frozenset({408, 409, 425, 429, 498, *range(500, 600)})
NO_BALANCE = 402
MAX_BODY_BYTES = 2**28
MAX_ERROR_BYTES = 2**16
_AFTER_DONE_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """A model's answer. usage: as the endpoint counted it. attempts: how many it took, at least 1."""

    reasoning: str
    response: str
    finish_reason: str
    usage: dict[str, Any]
    attempts: int
    logprobs: Any = None


@dataclass(frozen=True)
class Limits:
    """What an endpoint allows; None: without limit."""

    requests_per_second: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class RequestFailed(Exception):
    """A request without an answer.

    Attributes:
        status: the last HTTP status, None without a connection.
        attempts: how many there were.
        excess: of a request that is longer than the model's context; None where it failed for another reason.
    """

    def __init__(self, message: str, status: int | None, attempts: int, excess: Excess | None = None) -> None:
        super().__init__(message)
        self.status, self.attempts, self.excess = status, attempts, excess


class _AttemptFailed(Exception):
    """An attempt without an answer.

    Attributes:
        status: the HTTP status, None without one.
        is_retryable: whether another attempt may succeed; never of a request over the context.
        wait: seconds that the endpoint asks for.
        contact: whether it was heard from.
        excess: as of `RequestFailed`.
    """

    def __init__(
        self, message: str, status: int | None, is_retryable: bool, wait: float | None = None, contact: str = "heard",
        excess: Excess | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.wait, self.contact, self.excess = status, wait, contact, excess
        self.is_retryable = is_retryable and excess is None


class ChatClient:
    """Asynchronous chat completions, used as an async context manager.

    base_url: the endpoint up to /v1. concurrency: the most requests in flight. retries: further attempts that a
    retryable failure gets. timeout: seconds for one attempt, from connecting to the last byte. stream: whether answers
    are asked for as streams. patience: seconds without any word from an endpoint, connections lost all the while, after
    which it is taken for dead. UserError for an address, a proxy or certificates that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        concurrency: int = 32,
        retries: int = 8,
        timeout: float = 1800.0,
        stream: bool = False,
        limits: Limits = Limits(),
        patience: float = 30.0,
        takes_empty: bool = False,
    ) -> None:
        self.address = Address.parse(base_url)
        self.model, self.retries, self.timeout, self.stream, self.patience = model, retries, timeout, stream, patience
        self._key, self._takes_empty = key, takes_empty
        self._windows = [
            SlidingWindow(limit, seconds)
            for limit, seconds in ((limits.requests_per_second, 1.0), (limits.requests_per_minute, 60.0))
            if limit is not None
        ]
        self._tokens = None if limits.tokens_per_minute is None else SlidingWindow(limits.tokens_per_minute, 60.0)
        self._stop = asyncio.Event()
        self._health = Health(concurrency)
        self._resume_at = 0.0

        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        proxy = proxy_of(self.address)
        self._proxy_variable = proxy[1] if proxy else None
        context = trusted_certificates()
        # A pool scans all its connections at every request (5 ms of CPU with 32 of them): one for each is quick.
        self._pools = [
            httpx.AsyncClient(
                headers=headers,
                verify=context,
                timeout=httpx.Timeout(None, connect=min(timeout, 30.0)),
                limits=httpx.Limits(max_connections=1),
                trust_env=False,
                proxy=proxy[0] if proxy else None,
            )
            for _ in range(concurrency)
        ]
        self._free: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for pool in self._pools:
            self._free.put_nowait(pool)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in self._pools:
            await pool.aclose()

    def stop(self) -> None:
        """Send nothing any more. Attempts in flight go on to their end; requests that wait for one raise Stopped."""
        self._stop.set()
        for window in [*self._windows, *([self._tokens] if self._tokens else [])]:
            window.stop()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    async def complete(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Reply:
        """Return the answer to a chat.

        Arguments:
            messages: {role, content} of each turn.
            sampling: temperature, top_p, max_tokens, seed... as the endpoint names them. None leaves a parameter out.

        Raises:
            RequestFailed: once no attempt is left, or the endpoint refuses for good.
            UserError: when the endpoint cannot be reached: its name, its certificate, a dead server.
            Stopped: when the client was stopped before there was an answer.
        """
        body, most_tokens = self._body(messages, sampling), None
        content = json.dumps(body).encode()
        if self._tokens is not None:
            # A token is at least a byte; the template around the turns adds a few.
            prompt = sum(len(message["content"].encode()) for message in messages) + 64
            most_tokens = prompt + (body.get("max_completion_tokens") or body.get("max_tokens") or 0)
            most_tokens = min(most_tokens, int(self._tokens.limit))  # a very long prompt goes alone
        pool = await self._free.get()
        try:
            for attempt in itertools.count(1):
                try:
                    completion = await self._attempt(pool, content, most_tokens)
                except _AttemptFailed as failure:
                    await self._after_failure(failure, attempt)
                else:
                    self._health.note_heard(200)
                    return _reply(completion, attempt, body, self._key)
            raise AssertionError("unreachable: the count is endless")
        finally:
            self._free.put_nowait(pool)

    def _body(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object of a request."""
        turns = [ChatMessage.model_validate(message) for message in messages]
        fields = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        fields |= {name: value for name, value in sampling.items() if value is not None}
        if "stream_options" in sampling and sampling["stream_options"] is None:
            fields.pop("stream_options", None)
        return ChatRequest(model=self.model, messages=turns, **fields).model_dump(exclude_unset=True)

    async def _after_failure(self, failure: _AttemptFailed, attempt: int) -> None:
        """Wait until the next attempt, or raise what ends the request."""
        is_last = attempt > self.retries
        if failure.contact == "lost":
            self._health.note_lost()
        elif failure.contact == "heard":
            self._health.note_heard(failure.status)
        if problem := self._health.problem(is_last, self.patience):
            self.stop()
            raise UserError(f"{self.address.label}: {problem} ({failure}); is the server running?")
        if not failure.is_retryable or is_last:
            raise RequestFailed(str(failure), failure.status, attempt, failure.excess)
        wait = backoff(attempt) if failure.wait is None else jittered(failure.wait, attempt)
        if failure.contact == "lost":
            wait = min(wait, self.patience / 3)
        elif failure.status == 429 and self._health.is_throttled:
            # The limit is that of all requests: none is sent before it is over.
            self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + wait)
        await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        if self.is_stopped:
            raise Stopped

    @asynccontextmanager
    async def _admitted(self, most_tokens: int | None) -> AsyncIterator[tuple[list[Entry], Entry | None]]:
        """Wait for the limits; yield the entries of this attempt in their windows of requests and of tokens."""
        while (wait := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await self._sleep(jittered(wait, 1))
        if self.is_stopped:
            raise Stopped
        entries: list[Entry] = []
        try:
            tokens = None
            if self._tokens is not None and most_tokens is not None:
                entries.append(tokens := await self._tokens.admit(most_tokens))
            requests = [await window.admit(1) for window in self._windows]
            entries += requests
            yield requests, tokens
        finally:
            for entry in entries:
                entry.close()

    async def _attempt(self, pool: httpx.AsyncClient, content: bytes, most_tokens: int | None) -> Completion:
        """Send a request once and read its answer. Raises _AttemptFailed."""
        loop = asyncio.get_running_loop()
        async with self._admitted(most_tokens) as (requests, tokens):

            async def trace(event: str, _: Any) -> None:
                if event == "http11.send_request_body.complete":
                    for window, entry in zip(self._windows, requests, strict=True):
                        loop.call_later(min(1.0, 0.2 * window.seconds), entry.close)

            reader = ReplyReader(MAX_BODY_BYTES)
            status = None
            try:
                # Not asyncio.timeout: its cancelling leaves httpx's pool with a connection that never becomes free.
                with anyio.fail_after(self.timeout) as scope:
                    extensions = {"trace": trace} if requests else {}
                    url = self.address.url
                    async with pool.stream("POST", url, content=content, extensions=extensions) as answer:
                        for entry in requests:
                            entry.close()
                        status = answer.status_code
                        if not answer.is_success:
                            raise await self._refusal(answer)
                        async for chunk in answer.aiter_bytes():
                            reader.feed(chunk)
                            if reader.done:
                                scope.deadline = min(scope.deadline, anyio.current_time() + _AFTER_DONE_SECONDS)
                return self._finish(reader, tokens)
            except TimeoutError:
                if reader.done:
                    return self._finish(reader, tokens)
                contact = "silent" if status is None else "heard"
                message = f"Timeout: no whole answer within timeout = {self.timeout:g} s"
                raise _AttemptFailed(message, status, True, contact=contact) from None
            except ReplyError as error:
                retryable = error.status is None or error.status in RETRYABLE
                words = self._clean(str(error))
                raise _AttemptFailed(words, error.status, retryable, excess=error.excess) from None
            except NoCompletion as error:
                raise _AttemptFailed(self._clean(str(error)), status, True) from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._lost(error, status) from None
            except _AttemptFailed:
                if tokens is not None:
                    tokens.close(0)  # nothing was generated
                raise

    def _finish(self, reader: ReplyReader, tokens: Entry | None) -> Completion:
        try:
            completion = reader.finish()
        except EmptyCompletion as empty:
            completion = empty.completion
            if not self._takes_empty or completion.finish_reason != "stop":
                raise
        if tokens is not None:
            counts = [completion.usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            known = [count for count in counts if isinstance(count, int)]
            tokens.close(sum(known) if len(known) == 2 else None)
        return completion

    async def _refusal(self, answer: httpx.Response) -> _AttemptFailed:
        """Return the failure that an answer with an HTTP error stands for, in the words of its body."""
        body = b""
        with suppress(httpx.HTTPError):
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > MAX_ERROR_BYTES:
                    break
        status, text = answer.status_code, body.decode("utf-8", "replace")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = text
        if isinstance(values, list) and values:  # Gemini's
            values = values[0]
        if isinstance(values, dict):
            text, code, excess = read_error(values, status)
            status = NO_BALANCE if code == NO_BALANCE else status
        else:
            excess = context_excess(text, (), status)
        if answer.is_redirect:
            text = f"redirects to {answer.headers.get('Location', 'nowhere')}; set base_url to that address"
        message = self._clean(f"HTTP {answer.status_code}: {text}")
        wait = retry_after(answer.headers, answer.status_code)
        return _AttemptFailed(message, status, status in RETRYABLE, wait, excess=excess)

    def _lost(self, error: Exception, status: int | None) -> _AttemptFailed:
        """Return the failure of a connection. UserError for one that no retry mends."""
        words = self._clean(f"{type(error).__name__}: {error}".rstrip(": "))
        causes = _causes(error)
        label, variable = self.address.label, self._proxy_variable
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            raise UserError(
                f"{label}: its certificate is not trusted: {words}; for a certificate of your own, name the file of "
                "its authority in the environment variable SSL_CERT_FILE"
            )
        if any(isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER" for cause in causes):
            raise UserError(f"{label}: it does not speak TLS: {words}; try http:// in base_url")
        unknown = next((cause for cause in causes if isinstance(cause, socket.gaierror)), None)
        if unknown is not None and (unknown.errno != socket.EAI_AGAIN or not self._health.was_heard):
            host = f"the proxy of {variable}" if variable else f"the host '{self.address.host}'"
            raise UserError(f"{label}: {host} has no address: {first_line(unknown)}; check base_url and the network")
        if isinstance(error, httpx.ProxyError):
            raise UserError(f"{label}: the proxy of the environment variable {variable} refuses: {words}")
        if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
            return _AttemptFailed(words, status, False)
        if variable and isinstance(error, httpx.ConnectError):
            words += f", through the proxy of {variable}"
        return _AttemptFailed(words, status, True, contact="lost" if status is None else "heard")

    def _clean(self, text: str) -> str:
        """Return the words of a server or a library as one short line without the key."""
        return " ".join(redact(text, self._key).split())[:300]


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and all that led to it."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        if isinstance(error, BaseExceptionGroup):
            causes += error.exceptions
        error = error.__cause__ or error.__context__
    return causes


def _reply(completion: Completion, attempts: int, body: Mapping[str, Any], key: str | None) -> Reply:
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    generated = completion.usage.get("completion_tokens")
    finish_reason = completion.finish_reason
    if finish_reason is None:
        # Without a reason an answer is whole, unless it is as long as an answer may be.
        is_cut = isinstance(limit, int) and isinstance(generated, int) and generated >= limit
        finish_reason = "length" if is_cut else "stop"
    reasoning, response = redact(completion.reasoning, key), redact(completion.response, key)
    return Reply(reasoning, response, finish_reason, completion.usage, attempts, completion.logprobs)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Where an event loop already runs, as in a notebook, a thread runs it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
