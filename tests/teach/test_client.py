import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.teach import client as client_module
from bmjax.teach.client import ChatClient, Reply, RequestFailed, api_key, backoff, run_async

Answer = tuple[int, dict[str, str], bytes]


class Scripted:
    """An endpoint that gives the next answer of a script to each request and remembers what it was sent."""

    def __init__(self, script: list[Answer] | Callable[[int], Answer]) -> None:
        self.script, self.seen, self.lock = script, [], threading.Lock()
        self.inside = self.most_inside = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.seen)
                    outer.seen.append((self.path, dict(self.headers), body, time.monotonic()))
                    outer.inside += 1
                    outer.most_inside = max(outer.most_inside, outer.inside)
                answer = outer.script(number) if callable(outer.script) else outer.script[number]
                with outer.lock:
                    outer.inside -= 1
                status, headers, content = answer
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(content: str | None = "<think>\nhm\n</think>\n7", finish: str | None = "stop", **message: Any) -> Answer:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()


def error(status: int, text: str = "nope", **headers: str) -> Answer:
    return (
        status,
        {k.replace("_", "-"): v for k, v in headers.items()},
        json.dumps({"error": {"message": text}}).encode(),
    )


@pytest.fixture
def serve() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(script: Any) -> Scripted:
        servers.append(Scripted(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.01)


def ask(url: str, sampling: dict[str, Any] | None = None, **options: Any) -> Reply:
    async def main() -> Reply:
        async with ChatClient(url, "r1", **options) as client:
            return await client.complete([{"role": "user", "content": "3 + 4?"}], sampling or {})

    return run_async(main())


def test_the_request_is_openais_and_the_reply_is_read(serve: Callable[..., Scripted]) -> None:
    server = serve([completion(), completion("7", reasoning_content="hm"), completion(None, None, reasoning="hm")])
    expected = Reply("hm", "7", "stop", {"completion_tokens": 3}, 1)
    assert ask(server.url, {"temperature": 0.6, "seed": 3}, key="secret") == expected
    assert ask(server.url + "/") == expected
    assert ask(server.url) == Reply("hm", "", "stop", {"completion_tokens": 3}, 1)
    path, headers, body, _ = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "r1",
        "messages": [{"role": "user", "content": "3 + 4?"}],
        "temperature": 0.6,
        "seed": 3,
    }
    assert "Authorization" not in server.seen[1][1]


def test_failures_that_pass_are_retried(serve: Callable[..., Scripted]) -> None:
    server = serve(
        [
            error(500),
            error(429, Retry_After="0"),
            (0, {}, b""),
            (200, {}, b"<html>"),
            (200, {}, b'{"choices": []}'),
            (200, {}, b"[1]"),
            (200, {}, b'{"choices": [{"message": "text"}]}'),
            completion(),
        ]
    )
    assert ask(server.url).attempts == 8


def test_retry_after_is_honoured(serve: Callable[..., Scripted]) -> None:
    server = serve([error(429, Retry_After="0.4"), completion()])
    ask(server.url)
    assert 0.39 < server.seen[1][3] - server.seen[0][3] < 2


def test_what_cannot_pass_is_not_retried(serve: Callable[..., Scripted]) -> None:
    server = serve([error(400, "prompt too\nlong")] * 3)
    with pytest.raises(RequestFailed, match="HTTP 400: prompt too long") as failure:
        ask(server.url)
    assert (failure.value.status, failure.value.attempts, len(server.seen)) == (400, 1, 1)


def test_attempts_end(serve: Callable[..., Scripted]) -> None:
    server = serve([error(503)] * 9)
    with pytest.raises(RequestFailed, match="HTTP 503") as failure:
        ask(server.url, retries=2)
    assert (failure.value.attempts, len(server.seen)) == (3, 3)
    server.close()
    with pytest.raises(RequestFailed, match="ConnectError") as failure:
        ask(server.url, retries=1)
    assert failure.value.status is None


def test_a_slow_answer_times_out(serve: Callable[..., Scripted]) -> None:
    def slow(number: int) -> Answer:
        time.sleep(1)
        return completion()

    with pytest.raises(RequestFailed, match="Timeout"):
        ask(serve(slow).url, timeout=0.2, retries=0)


def test_no_more_requests_are_in_flight_than_allowed(serve: Callable[..., Scripted]) -> None:
    def slow(number: int) -> Answer:
        time.sleep(0.05)
        return completion()

    async def main(url: str, concurrency: int) -> list[Reply]:
        async with ChatClient(url, "r1", concurrency=concurrency) as client:
            return await asyncio.gather(*(client.complete([{"role": "user", "content": "x"}], {}) for _ in range(20)))

    for concurrency in (1, 5):
        server = serve(slow)
        assert len(run_async(main(server.url, concurrency))) == 20
        assert server.most_inside == concurrency


def test_backoff_grows_and_is_bounded() -> None:
    first = client_module.FIRST_WAIT
    for attempt in range(1, 40):
        limit = min(client_module.LONGEST_WAIT, first * 2 ** (attempt - 1))
        assert limit / 2 <= backoff(attempt) <= limit
    assert len({backoff(5) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("3", 3, 3),
        ("-3", 0, 0),
        ("1e9", 600, 600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("soon", None, None),
        ("nan", None, None),
        (None, None, None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, low: float | None, high: float | None) -> None:
    seconds = client_module._retry_after(value)
    assert seconds is None if low is None else low <= seconds <= high


def test_what_a_user_gets_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="base_url: found 'localhost:8000'"):
        ask("localhost:8000")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        api_key("NO_SUCH_KEY")
    monkeypatch.setenv("NO_SUCH_KEY", " abc\n")
    assert api_key("NO_SUCH_KEY") == "abc"
    assert api_key(None) is None


def test_a_coroutine_runs_where_a_loop_already_runs() -> None:
    async def inner() -> int:
        return 7

    async def bad() -> int:
        raise UserError("x")

    async def outer() -> int:
        with pytest.raises(UserError):
            run_async(bad())
        return run_async(inner())

    assert asyncio.run(outer()) == 7
