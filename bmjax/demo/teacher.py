"""The demo's teacher: an OpenAI-compatible chat endpoint that solves the demo's problems, not always well.

It answers as DeepSeek-R1 does, `<think>...</think>` and the answer, and now and then slips, stops short, breaks the
form or fails a first attempt, so that everything a real teacher puts a collector through happens here. A request says
how often by its field `mistakes`. What happens to it is a pure function of the server's seed and of the request.
"""

import contextlib
import hashlib
import json
import random
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bmjax.chat.openai import ChatMessage
from bmjax.config import first_problem
from bmjax.demo.problems import solve, solve_with_slip
from bmjax.demo.settings import Mistakes

MODEL = "builtin-teacher"

_TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]|\n")
_MAX_BODY_BYTES = 2**22


class Request(BaseModel):
    """What this teacher reads of a chat request. `mistakes` says how often it may go wrong."""

    model_config = ConfigDict(strict=True)

    messages: list[ChatMessage] = Field(min_length=1)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=64)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: Literal[False] | None = None
    mistakes: Mistakes | None = None

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content or ""

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> Self:
        if self.messages[-1].role != "user" or self.messages[-1].content is None:
            raise ValueError("messages: the last one must be {role: user, content: text}")
        return self


def count_tokens(text: str) -> int:
    """Count tokens as this teacher bills them: a digit, a word, a sign or a line end each."""
    return len(_TOKEN.findall(text))


class DemoTeacher:
    """Serves `base_url` (http://127.0.0.1:PORT/v1) from a thread while used as a context manager.

    `mistakes` are those of requests that name none; `port` 0 is any free one. The counters `requests` and `refused`
    are for tests.
    """

    def __init__(self, seed: int = 0, mistakes: Mistakes | None = None, port: int = 0) -> None:
        self.seed, self.mistakes, self.port = seed, mistakes or Mistakes(), port
        self.requests = self.refused = 0
        self._attempted: set[bytes] = set()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    @property
    def base_url(self) -> str:
        """Return the address for clients; RuntimeError outside of a `with` block."""
        if self._server is None:
            raise RuntimeError("the demo's teacher serves inside a `with` block only")
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.shutdown()  # returns once the thread serves no more
        self._server.server_close()
        self._server = None

    def reply(
        self, prompt: str, seed: int, max_tokens: int | None = None, mistakes: Mistakes | None = None
    ) -> tuple[str, str]:
        """Return (content, finish reason) for a prompt; ValueError for a prompt that is none of the demo's problems."""
        mistakes = mistakes or self.mistakes
        rng = random.Random(self._digest("reply", prompt, seed))
        fate = rng.random()
        solution = solve(prompt)
        if fate < mistakes.wrong:
            solution = solve_with_slip(prompt, rng)
        fate -= mistakes.wrong
        thoughts = f"<think>\n{solution.reasoning}"
        content, finish = f"{thoughts}\n</think>\n{solution.answer}", "stop"
        if 0 <= fate < mistakes.truncated:
            content, finish = thoughts[: rng.randint(len("<think>\n") + 1, len(thoughts) - 1)], "length"
        elif 0 <= fate - mistakes.truncated < mistakes.malformed:
            no_end, no_answer = f"{thoughts}\n{solution.answer}", f"{thoughts}\n</think>\n"
            content = rng.choice((no_end, no_answer + content, no_answer))
        ends = [0, *(match.end() for match in _TOKEN.finditer(content))]
        if max_tokens is not None and len(ends) > max_tokens + 1:
            content, finish = content[: ends[max_tokens]], "length"
        return content, finish

    def refuses(self, prompt: str, seed: int, mistakes: Mistakes | None = None) -> int:
        """Return the HTTP status (429 or 500) that this attempt gets, 0 for an answer; counts attempts."""
        flaky = (mistakes or self.mistakes).flaky
        digest = self._digest("flaky", prompt, seed)
        with self._lock:
            self.requests += 1
            if int.from_bytes(digest[:4], "big") >= flaky * 2**32 or digest in self._attempted:
                return 0
            self._attempted.add(digest)
            self.refused += 1
        return 429 if digest[4] % 2 else 500

    def _digest(self, purpose: str, prompt: str, seed: int) -> bytes:
        return hashlib.sha256(json.dumps([purpose, self.seed, prompt, seed]).encode()).digest()

    def complete(self, request: Request) -> dict[str, Any]:
        """Return the body of a chat completion; ValueError as for `reply`."""
        prompt, seed = request.prompt, request.seed or 0
        seeds = range(seed, seed + (request.n or 1))
        replies = [self.reply(prompt, number, request.max_tokens, request.mistakes) for number in seeds]
        asked, told = count_tokens(prompt), sum(count_tokens(content) for content, _ in replies)
        choices = [
            {"index": i, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
            for i, (content, finish) in enumerate(replies)
        ]
        name = "chatcmpl-" + self._digest("id", prompt, seed).hex()[:24]
        return {
            "id": name, "object": "chat.completion", "created": 0, "model": MODEL, "choices": choices,
            "usage": {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told},
        }  # fmt: skip


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def __init__(self, teacher: DemoTeacher) -> None:
        self.teacher = teacher
        super().__init__(("127.0.0.1", teacher.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in mid-reply is its own affair: no traceback on the terminal."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 120
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bmjax"}]})
        else:
            self._fail(404, "not_found", f"no such path {self.path}")

    def do_POST(self) -> None:
        length, teacher = self.headers.get("Content-Length", ""), self.server.teacher
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True
            return self._refuse("Content-Length is missing or too large")
        body = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self._fail(404, "not_found", f"no such path {self.path}")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return self._refuse("the body is not JSON")
        if not isinstance(values, dict):
            return self._refuse("the body must be a JSON object")
        try:
            request = Request.model_validate(values)
            if status := teacher.refuses(request.prompt, request.seed or 0, request.mistakes):
                return self._fail(status, "rate_limit_exceeded" if status == 429 else "server_error", "try again")
            self._send(200, teacher.complete(request))
        except ValidationError as error:
            self._refuse(first_problem(values, error))
        except ValueError as error:
            self._refuse(f"the demo's teacher does not know this problem: {error}")

    def _refuse(self, message: str) -> None:
        self._fail(400, "invalid_request_error", message)

    def _fail(self, status: int, kind: str, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": kind, "code": kind}})

    def _send(self, status: int, values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: a collector reports failures itself."""


def main() -> None:
    """Serve until interrupted: python -m bmjax.demo.teacher [PORT]."""
    port = int(sys.argv[1]) if sys.argv[1:] else 8765
    with contextlib.suppress(KeyboardInterrupt), DemoTeacher(port=port) as teacher:
        print(f"the demo's teacher answers at {teacher.base_url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
