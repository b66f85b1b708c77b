"""A chat endpoint that fails in every way that public reports know, for a share of its calls, and counts what it gave.

It runs in a thread, on asyncio, and speaks just enough HTTP/1.1. What a call gets is drawn from a seeded generator.
"""

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

Write = Callable[[bytes], Awaitable[None]]


def answer_body(prompt: str, parts: bool = False) -> dict[str, Any]:
    """The whole answer to a prompt, with text that names it."""
    text: Any = f"so {prompt}"
    content: Any = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}] if parts else text
    message = {"role": "assistant", "content": content} | ({} if parts else {"reasoning_content": "hm"})
    usage = {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def http(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def error_body(status: int, message: str = "nope") -> bytes:
    return json.dumps({"error": {"message": message, "code": status}}).encode()


START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
# What a call may get in place of an answer: functions of (write, prompt, server) that tell whether it stays connected.
FAULTS: dict[str, Callable[..., Awaitable[bool]]] = {}


def fault(function: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
    FAULTS[function.__name__] = function
    return function


@fault
async def too_many(write: Write, prompt: str, server: "FaultyServer") -> bool:
    headers = server.random.choice(
        ["Retry-After: 0", "Retry-After: 0.05", "retry-after-ms: 30", "x-ratelimit-reset-requests: 20ms"]
    )
    await write(http(429, error_body(429, "slow down"), headers))
    return True


@fault
async def server_error(write: Write, prompt: str, server: "FaultyServer") -> bool:
    status = server.random.choice([500, 502, 503, 504, 520, 521, 522, 523, 524, 529, 530, 408, 409, 425, 498])
    await write(http(status, server.random.choice([error_body(status), b"<html><h1>Bad</h1></html>", b""])))
    return True


@fault
async def hang(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await asyncio.sleep(server.hang_seconds)
    return False


@fault
async def cut_before(write: Write, prompt: str, server: "FaultyServer") -> bool:
    return False


@fault
async def cut_within(write: Write, prompt: str, server: "FaultyServer") -> bool:
    whole = http(200, json.dumps(answer_body(prompt)).encode())
    await write(whole[: server.random.randrange(1, len(whole) - 1)])
    return False


@fault
async def invalid_json(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, json.dumps(answer_body(prompt)).encode()[:-2]))
    return True


@fault
async def html(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, b"<!DOCTYPE html><title>Login</title>", "Content-Type: text/html"))
    return True


@fault
async def error_object(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, error_body(server.random.choice([500, 502, 429]))))
    return True


@fault
async def empty_choices(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, b'{"choices": [], "usage": {"completion_tokens": 0}}'))
    return True


@fault
async def trickle(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(START)
    for byte in json.dumps(answer_body(prompt)).encode():
        await write(chunked(bytes([byte])))
        await asyncio.sleep(server.hang_seconds / 20)
    return False


@fault
async def endless_blanks(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(START)
    for _ in range(100):
        await write(chunked(b"\n"))
        await asyncio.sleep(server.hang_seconds / 20)
    return False


# Odd forms of whole answers: each is paid, and must not be asked again.


async def content_parts(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, json.dumps(answer_body(prompt, parts=True)).encode()))
    server.note_paid(prompt)
    return True


async def blanks_before(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(START + chunked(b"\n\n") + chunked(b"\n"))
    await asyncio.sleep(0.01)
    await write(chunked(json.dumps(answer_body(prompt)).encode()) + b"0\r\n\r\n")
    server.note_paid(prompt)
    return True


async def streamed(write: Write, prompt: str, server: "FaultyServer") -> bool:
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning": "hm"}}]}]
    events += [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("so ", prompt)]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    events += [{"choices": [], "usage": answer_body(prompt)["usage"]}]
    lines = b": keep-alive\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    await write(START + chunked(lines + b"data: [DONE]\n\n") + b"0\r\n\r\n")
    server.note_paid(prompt)
    return True


async def plain(write: Write, prompt: str, server: "FaultyServer") -> bool:
    await write(http(200, json.dumps(answer_body(prompt)).encode()))
    server.note_paid(prompt)
    return True


class FaultyServer:
    """Serves `base_url` while used as a context manager.

    share: of calls that get a fault. arrivals: (time, prompt) of every call. paid, paid_at: the prompt and time of each
    whole answer.
    """

    def __init__(
        self, share: float = 0.3, seed: int = 0, hang_seconds: float = 8.0, think_seconds: float = 0.0
    ) -> None:
        self.share, self.hang_seconds, self.think_seconds = share, hang_seconds, think_seconds
        self.random = random.Random(seed)
        self.arrivals: list[tuple[float, str]] = []
        self.paid: list[str] = []
        self.paid_at: list[float] = []

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
        port = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def note_paid(self, prompt: str) -> None:
        self.paid.append(prompt)
        self.paid_at.append(time.monotonic())

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                )
                body = json.loads(await reader.readexactly(length))
                prompt = body["messages"][-1]["content"]
                self.arrivals.append((time.monotonic(), prompt))
                if self.think_seconds:
                    await asyncio.sleep(self.think_seconds)
                if self.random.random() < self.share:
                    act = FAULTS[self.random.choice(sorted(FAULTS))]
                elif body.get("stream"):
                    act = streamed
                else:
                    act = self.random.choice([plain, plain, content_parts, blanks_before, streamed])
                if not await act(write, prompt, self):
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def most_in_window(times: list[float], seconds: float) -> int:
    """The most events in any window of time."""
    times, start, most = sorted(times), 0, 0
    for end, moment in enumerate(times):
        while times[start] <= moment - seconds:
            start += 1
        most = max(most, end - start + 1)
    return most
