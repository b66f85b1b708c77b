import asyncio
import contextlib
import email.utils
import json
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.teach import waits
from bmjax.teach.client import ChatClient, Reply, RequestFailed, run_async
from bmjax.teach.endpoint import api_key, proxy_of
from bmjax.teach.limits import Stopped
from bmjax.teach.waits import backoff
from bmjax.urls import Address
from tests.teach import faulty

Answer = tuple[int, dict[str, str], bytes]


class Scripted:
    """An endpoint that gives the next answer of a script to each request and remembers what it was sent."""

    def __init__(
        self,
        script: list[Answer] | Callable[[int], Answer],
        host: str = "127.0.0.1",
        context: ssl.SSLContext | None = None,
    ) -> None:
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

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.server = Server((host, 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server.server_address[1]}/v1"

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
    monkeypatch.setattr(waits, "FIRST_WAIT", 0.01)
    proxies = [
        name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
    ]
    for name in [
        *proxies,
        *map(str.upper, proxies),
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
    ]:
        monkeypatch.delenv(name, raising=False)


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
            (200, {}, b'{"choices": [{}]}'),
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
    first = waits.FIRST_WAIT
    for attempt in range(1, 40):
        limit = min(waits.LONGEST_WAIT, first * 2 ** (attempt - 1))
        assert limit / 2 <= backoff(attempt) <= limit
    assert len({backoff(5) for _ in range(20)}) > 1


# Times are filled in when the test runs, which may be long after the tests were collected.
IN_300_SECONDS_AS_DATE, IN_300_SECONDS_IN_MS, IN_300_SECONDS = "DATE", "MILLISECONDS", "SECONDS"


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "3"}, 3, 3),
        ({"retry-after": "0.25"}, 0.25, 0.25),
        ({"retry-after": "-3"}, 0, 0),
        ({"retry-after": "1e9"}, 0, 600),
        ({"retry-after": "inf"}, 600, 600),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0),
        ({"retry-after": IN_300_SECONDS_AS_DATE}, 290, 301),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": "nan"}, None, None),
        ({}, None, None),
        ({"retry-after": "9", "retry-after-ms": "1500"}, 1.5, 1.5),
        ({"x-ratelimit-reset-requests": "120ms"}, 0.12, 0.12),
        ({"x-ratelimit-reset-tokens": "1m30s", "x-ratelimit-reset-requests": "1s"}, 90, 90),
        (
            {
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-remaining-tokens": "500",
            },
            2,
            2,
        ),
        ({"x-ratelimit-reset": IN_300_SECONDS_IN_MS}, 290, 301),
        ({"x-ratelimit-reset": IN_300_SECONDS}, 290, 301),
        ({"ratelimit-reset": "7"}, 7, 7),
        ({"anthropic-ratelimit-requests-reset": "2015-10-21T07:28:00Z"}, 0, 0),
    ],
)
def test_when_to_come_back_is_read_in_every_form(headers: dict[str, str], low: float | None, high: float) -> None:
    then = time.time() + 300
    times = {
        IN_300_SECONDS_AS_DATE: email.utils.formatdate(then, usegmt=True),
        IN_300_SECONDS_IN_MS: str(int(1000 * then)), IN_300_SECONDS: str(int(then)),
    }  # fmt: skip
    headers = {name: times.get(value, value) for name, value in headers.items()}
    seconds = waits.retry_after(headers, 429)
    assert seconds is None if low is None else low <= seconds <= high
    if "retry-after" not in str(headers):
        assert waits.retry_after(headers, 500) is None


@pytest.mark.parametrize(
    "status", [408, 409, 425, 429, 498, 500, 501, 502, 503, 504, 505, 520, 521, 522, 523, 524, 529, 530]
)
def test_failures_of_the_moment_are_retried(serve: Callable[..., Scripted], status: int) -> None:
    assert ask(serve([error(status), completion()]).url).attempts == 2


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422, 451, 308])
def test_refusals_are_not_retried(serve: Callable[..., Scripted], status: int) -> None:
    with pytest.raises(RequestFailed) as failure:
        ask(serve([error(status), completion()]).url)
    assert (failure.value.status, failure.value.attempts) == (status, 1)


def test_an_error_object_in_a_200_is_an_error_by_its_code(serve: Callable[..., Scripted]) -> None:
    def said(**fields: Any) -> Answer:
        return 200, {}, json.dumps({"error": {"message": "the words", **fields}}).encode()

    assert ask(serve([said(code=502), said(), completion()]).url).attempts == 3
    with pytest.raises(RequestFailed, match="the words") as failure:
        ask(serve([said(code=400), completion()]).url)
    assert (failure.value.status, failure.value.attempts) == (400, 1)
    no_balance = 429, {}, json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}}).encode()
    with pytest.raises(RequestFailed, match="HTTP 429: pay") as failure:
        ask(serve([no_balance, completion()]).url)
    assert failure.value.status == 402


def test_an_answer_that_cannot_be_read_is_not_asked_again(serve: Callable[..., Scripted]) -> None:
    server = serve([completion([{"type": "audio", "data": "x"}]), completion()])
    reply = ask(server.url)
    assert (reply.finish_reason, reply.attempts, len(server.seen)) == ("unreadable", 1, 1)
    assert "audio" in reply.response and reply.usage == {"completion_tokens": 3}


def test_a_stream_is_asked_for_and_null_leaves_a_parameter_out(serve: Callable[..., Scripted]) -> None:
    server = serve([completion()] * 3)
    ask(server.url, {"temperature": None, "max_tokens": None, "max_completion_tokens": 9, "seed": 1}, stream=True)
    ask(server.url, {"stream_options": None}, stream=True)
    ask(server.url, {"stream_options": None, "top_k": 3})
    bodies = [{k: v for k, v in body.items() if k not in ("model", "messages")} for _, _, body, _ in server.seen]
    assert bodies == [
        {"max_completion_tokens": 9, "seed": 1, "stream": True, "stream_options": {"include_usage": True}},
        {"stream": True},
        {"top_k": 3},
    ]


def test_an_answer_without_reason_is_cut_where_it_is_as_long_as_may_be(serve: Callable[..., Scripted]) -> None:
    server = serve([completion("7", None)] * 3)
    assert ask(server.url, {"max_tokens": 4}).finish_reason == "stop"
    assert ask(server.url, {"max_tokens": 3}).finish_reason == "length"
    assert ask(server.url, {"max_completion_tokens": 3}).finish_reason == "length"


@pytest.mark.parametrize("act", ["endless_blanks", "trickle", "hang"])
def test_an_attempt_has_one_deadline_whatever_trickles_in(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    monkeypatch.setattr(faulty, "FAULTS", {act: faulty.FAULTS[act]})
    with faulty.FaultyServer(share=1.0, hang_seconds=4.0) as server:
        started = time.monotonic()
        with pytest.raises(RequestFailed, match=r"Timeout: no whole answer within timeout = 0\.6 s") as failure:
            ask(server.base_url, timeout=0.6, retries=1)
        assert failure.value.attempts == 2
        assert time.monotonic() - started < 3.5


def test_many_429_in_a_row_hold_back_all_requests(serve: Callable[..., Scripted]) -> None:
    server = serve(lambda number: error(429, Retry_After="1") if number < 8 else completion())

    async def main() -> None:
        async with ChatClient(server.url, "r1", concurrency=4) as client:
            await asyncio.gather(*(client.complete([{"role": "user", "content": "x"}], {}) for _ in range(20)))

    run_async(main())
    assert len(server.seen) <= 8 + 20


def test_an_ipv6_endpoint_and_one_with_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # this machine is reached without a proxy
    server = Scripted([completion()], "::1")
    assert ask(server.url).response == "7"
    server.close()
    assert Address.parse("http://[fe80::1]:80/v1/").url == "http://[fe80::1]:80/v1/chat/completions"
    azure = Address.parse("https://u:pw@x.com/d/gpt/chat/completions?api-version=2")
    assert azure.url == "https://u:pw@x.com/d/gpt/chat/completions?api-version=2"
    assert azure.label == "https://x.com/d/gpt"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000", "base_url: found 'localhost:8000'"),
        ("http://::1:8000/v1", "in brackets"),
        ("http://[::1/v1", "in brackets"),
        ("http://host:80a/v1", "is no address"),
        ("ftp://user:hunter2@host/v1", r"found 'ftp://\*\*\*@host/v1'"),
        ("", "base_url: found ''"),
    ],
)
def test_an_address_that_is_none_is_named(url: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Address.parse(url)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("sk-SECRET\nSECRET", "a line break at position 10"),
        ("sk-SECRET SECRET", "a space"),
        ("\u201csk-SECRET\u201d", "LEFT DOUBLE QUOTATION MARK"),
        ("sk-SECRET\u200bX", "ZERO WIDTH SPACE"),
        ("sk-SECRET\x07", "U\\+0007"),
        ('"sk-SECRET"', "quotation marks"),
        ("Bearer sk-SECRET", "a space"),
        ("sk-SECRET\u00e9", "E WITH ACUTE"),
    ],
)
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, key: str, problem: str
) -> None:
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(UserError, match=problem) as caught:
        api_key("A_KEY")
    assert "SECRET" not in str(caught.value) and "A_KEY" in str(caught.value)


def test_a_server_that_repeats_the_key_does_not_have_it_shown(serve: Callable[..., Scripted]) -> None:
    key = "sk-SECRET/SECRET+SECRET"
    echo = f"{'x' * 285} Incorrect API key provided: {key} or {urllib.parse.quote(key, safe='')}"
    answers = [error(401, echo), (401, {}, echo.encode()), (200, {}, echo.encode()), error(401, f"key {key}")]
    for answer in answers:
        with pytest.raises(RequestFailed) as failure:
            ask(serve([answer]).url, key=key, retries=0)
        assert "SECRET" not in str(failure.value)
    assert str(failure.value) == "HTTP 401: key ***"
    assert "SECRET" not in ask(serve([completion(f"your key is {key}")]).url, key=key).response


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"HTTPS_PROXY": "socks://127.0.0.1:9/"}, "HTTPS_PROXY names no proxy that can be used"),
        ({"https_proxy": "http://127.0.0.1:99999"}, "https_proxy names no proxy"),
        (
            {"ALL_PROXY": "socks5://127.0.0.1:9"},
            r"ALL_PROXY names a SOCKS proxy, which needs socksio; run pip install '.\[socks\]'",
        ),
        ({"SSL_CERT_FILE": "/no/such/file.pem"}, "SSL_CERT_FILE names '/no/such/file.pem': No such file"),
        ({"REQUESTS_CA_BUNDLE": __file__}, "REQUESTS_CA_BUNDLE names .*no certificate in it"),
    ],
)
def test_a_wrong_variable_of_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=problem):
        ask("https://teacher.invalid/v1")


def test_a_proxy_is_used_and_named(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve([completion(), completion()])
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    assert ask("http://teacher.invalid/v1").response == "7"
    assert proxy.seen[0][0] == "http://teacher.invalid/v1/chat/completions"
    monkeypatch.setenv("no_proxy", "teacher.invalid")
    with pytest.raises(UserError, match=r"the host 'teacher\.invalid' has no address"):
        ask("http://teacher.invalid/v1")
    monkeypatch.setenv("no_proxy", "")
    proxy.close()
    with pytest.raises(RequestFailed, match="through the proxy of http_proxy"):
        ask("http://teacher.invalid/v1", retries=0)


@pytest.mark.parametrize(
    ("no_proxy", "host", "exempt"),
    [
        ("teacher.com", "teacher.com", True),
        (".teacher.com", "api.teacher.com", True),
        ("other.com, 10.0.0.0/8", "10.1.2.3", True),
        ("fd00::/8,::1", "[fd00::5]", True),
        ("*", "x.com", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("teacher.com", "myteacher.org", False),
    ],
)
def test_hosts_that_need_no_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str, host: str, exempt: bool) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    proxy = proxy_of(Address.parse(f"https://{host}/v1"))
    assert proxy == (None if exempt else ("http://127.0.0.1:9", "HTTPS_PROXY"))


def test_a_socks_proxy_is_used(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio")
    server = serve([completion()])
    port = server.server.server_address[1]

    class Socks(socketserver.StreamRequestHandler):
        """Connects every request to the server, whatever host it names."""

        def handle(self) -> None:
            self.connection.recv(2 + self.connection.recv(2, socket.MSG_PEEK)[1])
            self.connection.sendall(b"\x05\x00")
            asked.append(self.connection.recv(1024))
            self.connection.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50")
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall(self.connection.recv(65536))
                upstream.settimeout(1)
                with contextlib.suppress(TimeoutError):
                    while data := upstream.recv(65536):
                        self.connection.sendall(data)

    asked: list[bytes] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Socks) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{proxy.server_address[1]}")
        assert ask("http://teacher.invalid/v1").response == "7"
        proxy.shutdown()
    assert b"teacher.invalid" in asked[0]


def test_names_and_certificates_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the host 'teacher\.invalid' has no address"):
        ask("http://teacher.invalid/v1")
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    options = ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate, *options]
    if shutil.which("openssl") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("openssl makes no certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Scripted([completion()], context=context)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    with pytest.raises(UserError, match=r"its certificate is not trusted.*SSL_CERT_FILE"):
        ask(url)
    with pytest.raises(UserError, match="does not speak TLS"):
        plain = Scripted([completion()])
        ask(plain.url.replace("http:", "https:"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask(url).response == "7"
    server.close()
    plain.close()
    assert time.monotonic() - started < 30


def test_requests_that_wait_are_given_up_when_the_client_stops(serve: Callable[..., Scripted]) -> None:
    server = serve([error(503, Retry_After="500")] * 3)

    async def main() -> None:
        async with ChatClient(server.url, "r1") as client:
            work = asyncio.create_task(client.complete([{"role": "user", "content": "x"}], {}))
            await asyncio.sleep(0.5)
            client.stop()
            with pytest.raises(Stopped):
                await work
            with pytest.raises(Stopped):
                await client.complete([{"role": "user", "content": "x"}], {})

    run_async(main())
    assert len(server.seen) == 1


def test_what_a_user_gets_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
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
