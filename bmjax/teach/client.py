"""One client for every model behind an OpenAI-compatible chat endpoint: teacher, student or judge.

Requests share kept-alive connections, a limit on how many are in flight, and retries with jittered exponential
backoff that honour Retry-After. Reasoning, which endpoints send in three ways, leaves as one field.
"""

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from bmjax.chat.openai import ChatCompletion, ChatMessage, ChatRequest
from bmjax.chat.reasoning import split_think
from bmjax.config import UserError, first_line

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """A model's answer. usage: as the endpoint counted it. attempts: how many it took, at least 1."""

    reasoning: str
    response: str
    finish_reason: str
    usage: dict[str, Any]
    attempts: int


class RequestFailed(Exception):
    """A request without an answer. status: the last HTTP status, None without a connection."""

    def __init__(self, message: str, status: int | None, attempts: int) -> None:
        super().__init__(message)
        self.status, self.attempts = status, attempts


def api_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, None when no variable is named. UserError when it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"api_key_env: the environment variable {variable} is not set; export it with the API key")
    return key


class ChatClient:
    """Asynchronous chat completions, used as an async context manager.

    base_url: the endpoint up to /v1; UserError when it is no http(s) URL. concurrency: the most requests in flight.
    retries: further attempts that a retryable failure gets. timeout: seconds for one attempt.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        concurrency: int = 32,
        retries: int = 8,
        timeout: float = 1800.0,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"base_url: found '{base_url}', expected http://HOST:PORT/v1 or https://HOST/v1")
        self.base_url, self.model, self.retries = base_url.rstrip("/"), model, retries
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        context = httpx.create_ssl_context()
        # A pool scans all its connections at every request (5 ms of CPU with 32 of them): one for each is quick.
        self._pools = [
            httpx.AsyncClient(
                headers=headers,
                verify=context,
                timeout=httpx.Timeout(timeout, connect=min(timeout, 30.0)),
                limits=httpx.Limits(max_connections=1),
                trust_env=parts.hostname not in ("127.0.0.1", "localhost", "::1"),
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

    async def complete(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Reply:
        """Return the answer to a chat. sampling: temperature, top_p, max_tokens, seed... as the endpoint names them.

        Raises RequestFailed once no attempt is left or the endpoint refuses for good.
        """
        turns = [ChatMessage.model_validate(message) for message in messages]
        body = ChatRequest(model=self.model, messages=turns, **sampling).model_dump(exclude_unset=True)
        pool = await self._free.get()
        attempt = 0
        try:
            while True:
                attempt += 1
                status: int | None = None
                wait: float | None = None
                try:
                    answer = await pool.post(f"{self.base_url}/chat/completions", json=body)
                    status = answer.status_code
                    if status == 200:
                        return _read_reply(answer.content, attempt)
                    message, wait = _error_text(answer), _retry_after(answer.headers.get("Retry-After"))
                except (httpx.TransportError, httpx.DecodingError) as error:
                    message = f"{type(error).__name__}: {error}".rstrip(": ")
                except ValidationError as error:
                    message = f"not a chat completion: {first_line(error)}"
                if status not in (None, 200, *RETRYABLE) or attempt > self.retries:
                    raise RequestFailed(message, status, attempt)
                await asyncio.sleep(backoff(attempt) if wait is None else wait)
        finally:
            self._free.put_nowait(pool)


def backoff(attempt: int) -> float:
    """Return the seconds to wait after an attempt, numbered from 1: exponential, with jitter, at most a minute."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None when absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else None


def _error_text(answer: httpx.Response) -> str:
    """Return the message of an OpenAI-style error body, else the start of the body."""
    try:
        error = answer.json()["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return f"HTTP {answer.status_code}: {' '.join(str(text).split())[:300]}"


def _read_reply(body: bytes, attempts: int) -> Reply:
    completion = ChatCompletion.model_validate_json(body)
    choice = completion.choices[0]
    message = choice.message
    reasoning, response = split_think(message.content or "", message.reasoning_content or message.reasoning)
    usage = completion.usage if isinstance(completion.usage, dict) else {}
    return Reply(reasoning, response, choice.finish_reason or "stop", usage, attempts)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Where an event loop already runs, as in a notebook, a thread runs it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
