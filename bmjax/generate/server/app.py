"""The routes of `bmjax serve`: OpenAI's models, chat completions and completions, health and metrics.

A request is read within a limit, checked, queued at the worker, and answered whole or as a stream. A client that goes
away ends its answers. Errors have OpenAI's form.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bmjax.chat.openai import (
    RequestError,
    ServedChat,
    ServedCompletion,
    ServedRequest,
    read_request,
    unknown_fields,
)
from bmjax.config import UserError
from bmjax.generate.server.asking import (
    Answer,
    Prompt,
    Served,
    chat_prompt,
    check_model,
    completion_prompts,
    engine_requests,
)
from bmjax.generate.server.metrics import Metrics
from bmjax.generate.server.replies import ChatForm, CompletionForm, Piece, TokenText, joined, usage
from bmjax.generate.server.token_text import token_texts
from bmjax.generate.server.worker import Asked, Event, QueueFull, Worker
from bmjax.log import Log, silent

MAX_BODY_BYTES = 2**23
DRAINED_BYTES = 2**26  # of a body that is too long: read and dropped, so that its client hears why
LONG_BODY_BYTES = 2**14  # read and tokenized in another thread, so that streams go on meanwhile
HEARTBEAT_SECONDS = 15.0  # between signs of life in a stream that waits for a slot
CLIENT_LEFT = 499
MAX_NAMED, LONGEST_NAME = 100, 100  # unknown fields that the log names, and letters of one


class App:
    """The routes, with what they need: the served model, the worker and the metrics.

    log: told of each field of requests that bmjax does not know, once.
    """

    def __init__(self, served: Served, worker: Worker, metrics: Metrics, log: Log = silent) -> None:
        self.served, self.worker, self.metrics, self.created = served, worker, metrics, int(time.time())
        self._log, self._named = log, set[str]()
        self.token_text: TokenText = token_texts(served.tokenizer)

    def routes(self) -> list[Route]:
        """Return the routes of the endpoint."""
        return [
            Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", functools.partial(self.generate, ServedChat), methods=["POST"]),
            Route("/v1/completions", functools.partial(self.generate, ServedCompletion), methods=["POST"]),
            Route("/health", self.health), Route("/metrics", self.show_metrics),
        ]  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, request: Request) -> Response:
        check_model(self.served, request.path_params["name"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "bmjax",
                "max_model_len": self.served.context}  # fmt: skip

    async def health(self, request: Request) -> Response:
        is_well = self.worker.failure is None
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def generate(self, kind: type[ServedChat] | type[ServedCompletion], request: Request) -> Response:
        """Answer a chat or a completion."""
        body = await _read_body(request)
        read = functools.partial(self._read, kind, body)
        asked, prompts = await asyncio.to_thread(read) if len(body) > LONG_BODY_BYTES else read()
        requests = engine_requests(self.served, asked, prompts)
        if len(requests) > self.worker.capacity:
            raise RequestError(
                f"n: {len(requests)} answers in one request, the server takes {self.worker.capacity} at once; ask in "
                "several requests, or start bmjax serve with a longer queue=", "n",
            )  # fmt: skip
        try:
            under_way = self.worker.ask(requests)
        except QueueFull:
            message = f"{self.worker.active} answers are under way or waiting, which is all that the server takes"
            raise RequestError(f"{message}; ask again", None, "queue_full", status=429) from None
        except UserError as error:
            raise RequestError(str(error)) from None
        self.metrics.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in prompts))
        answering = _Answering(self, asked, prompts, under_way)
        if asked.stream:
            return _EventStream(answering)
        try:
            reply = await _unless_left(request.receive, answering.whole())
        finally:
            answering.end()
        return Response(status_code=CLIENT_LEFT) if reply is None else _json(reply)

    def _read(self, kind: type[ServedChat] | type[ServedCompletion], body: bytes) -> tuple[Any, list[Prompt]]:
        """Return a body's request and its prompts. RequestError for what is wrong with it."""
        try:
            values = json.loads(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is not UTF-8: byte {body[error.start]:#04x} at {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {str(error)[:200] or 'nested too deeply'}") from None
        asked = read_request(kind, values)
        self._name(unknown_fields(kind, values))
        check_model(self.served, asked.model)
        if isinstance(asked, ServedChat):
            return asked, [chat_prompt(self.served, asked)]
        return asked, completion_prompts(self.served, asked)

    def _name(self, fields: Sequence[str]) -> None:
        """Tell the log of unknown fields that it has not heard of."""
        for field in (field[:LONGEST_NAME] for field in fields):
            if field not in self._named and len(self._named) < MAX_NAMED:
                self._named.add(field)
                shown = UserError(field).args[0]  # printable
                self._log(
                    f"{self.served.name}: requests have the field '{shown}', which bmjax does not know: no effect"
                )


class _Answering:
    """The answers to one request, from the worker's events to the reply."""

    def __init__(self, app: App, asked: ServedRequest, prompts: Sequence[Prompt], under_way: Asked) -> None:
        self.worker, self.metrics, self.asked, self.under_way = app.worker, app.metrics, asked, under_way
        samples = asked.n or 1
        self.answers = [Answer(app.served, asked, prompt) for prompt in prompts for _ in range(samples)]
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        if isinstance(asked, ServedChat):
            self.form: ChatForm | CompletionForm = ChatForm(asked.model, app.token_text, bool(asked.logprobs))
        else:
            assert isinstance(asked, ServedCompletion)
            self.form = CompletionForm(asked.model, app.token_text, asked.logprobs is not None)
        self._is_begun = [False] * len(self.answers)
        self._going = set(range(len(self.answers)))  # indexes of the answers whose end has not been told

    async def whole(self) -> dict[str, Any]:
        """Return the reply once all answers have ended."""
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        async for index, piece in self._pieces():
            if piece is not None:
                pieces[index].append(piece)
        choices = [self.form.whole(index, joined(parts)) for index, parts in enumerate(pieces)]
        return self.form.body(choices, usage=self._usage())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the reply."""
        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        fields: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            if isinstance(self.form, ChatForm):
                for index in range(len(self.answers)):
                    yield _event(self.form.event([self.form.opening(index)], **fields))
            async for index, piece in self._pieces():
                if piece is None:
                    yield b": waiting\n\n"
                elif piece.text or piece.reasoning or piece.finish_reason or (piece.tokens and self.form.logprobs):
                    yield _event(self.form.event([self.form.chunk(index, piece)], **fields))
            if with_usage:
                yield _event(self.form.event([], usage=self._usage()))
        except RequestError as error:
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def end(self) -> None:
        """End what the engine still works on. To be called however the reply ended."""
        self.worker.cancel(self.under_way)
        for _ in self._going:
            self.metrics.ended("cancelled" if self.worker.failure is None else "error")
        self._going.clear()

    def _usage(self) -> dict[str, int]:
        return usage(self.prompt_tokens, sum(answer.count for answer in self.answers))

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Yield (index of the answer, piece) until all have ended; (0, None) now and then while nothing comes."""
        while self._going:
            event = await self.under_way.next_event(HEARTBEAT_SECONDS)
            if event is None:
                yield 0, None
            elif event.index in self._going:
                piece = self._piece(event)
                if piece.finish_reason is not None:  # perhaps by a stop string, of which the engine knows nothing
                    self._going.discard(event.index)
                    self.metrics.ended(piece.finish_reason)
                    self.worker.cancel(self.under_way, event.index)
                yield event.index, piece

    def _piece(self, event: Event) -> Piece:
        if event.error is not None:
            raise RequestError("the engine has failed, see the server's log", status=500)
        prompt_tokens: Sequence[Any] = ()
        if not self._is_begun[event.index]:
            self._is_begun[event.index] = True
            prompt_tokens = self.under_way.running[event.index].prompt_tokens
        return self.answers[event.index].add(event.tokens, event.finish_reason, prompt_tokens)


class _EventStream(Response):
    """Server-sent events. A client that goes away ends its answers."""

    def __init__(self, answering: _Answering) -> None:
        super().__init__(None, media_type="text/event-stream")
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> bool:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.answering.stream():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        try:
            await _unless_left(receive, write())
        finally:
            self.answering.end()


class KeyCheck:
    """Refuses requests to /v1 without the key. It is compared in constant time, and never shown."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            sent = headers.get(b"authorization", b"")
            if not hmac.compare_digest(sent, self._expected):
                problem = "is wrong" if sent else "is missing"
                message = f"the API key {problem}; send Authorization: Bearer KEY"
                refusal = _refusal(RequestError(message, None, "invalid_api_key", status=401))
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(app: App, api_key: str | None, lifespan: Callable[[Any], Any]) -> ASGIApp:
    """Return the ASGI application: routes, errors in OpenAI's form, counts of requests, and the check of the key."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _refusal(error)

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        message = f"{method} {path}: {error.detail.lower()}"
        if error.status_code == 404:
            message = f"{path[:200]}: no such path; /v1/models, /v1/chat/completions and /v1/completions are there"
        return _refusal(RequestError(message, status=error.status_code), error.headers)

    async def fail(request: Request, error: Exception) -> Response:
        return _refusal(RequestError("the server has failed, see its log", status=500))

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    handlers: Any = {RequestError: refuse, HTTPException: refuse_http, ClientDisconnect: left, Exception: fail}
    routes = app.routes()
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    checked: ASGIApp = inner if api_key is None else KeyCheck(inner, api_key)
    paths = {route.path for route in routes}

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                app.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await checked(scope, receive, note if scope["type"] == "http" else send)

    return counted


async def _read_body(request: Request) -> bytes:
    """Return a request's body. No more of it is kept than the limit.

    Raises RequestError: 415 for a web page's that is not said to be JSON and for a compressed one, 413 for one that is
    too long.
    """
    # Other types are what a page can post to a server on its reader's machine without asking that first. Browsers say
    # which page it is; other clients that leave out the type, as `curl -d` does, mean JSON.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type != "application/json" and "origin" in request.headers:
        shown = f"Content-Type '{media_type[:100]}'" if media_type else "no Content-Type"
        raise RequestError(f"{shown}; expected Content-Type: application/json", status=415)
    if encoding != "identity":
        raise RequestError(f"Content-Encoding '{encoding[:100]}'; expected the body as it is", status=415)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        elif size > DRAINED_BYTES:
            break
        else:
            chunks.clear()
    if size > MAX_BODY_BYTES:
        raise RequestError(f"the body has more than {MAX_BODY_BYTES} bytes; shorten messages or prompt", status=413)
    return b"".join(chunks)


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what `work` returns; cancel it and return None when the client goes away first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _json(body: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _refusal(error: RequestError, headers: Any = None) -> Response:
    headers = dict(headers or {})
    if error.status == 429:
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error.body(), error.status, headers)
