"""An engine that says what a function tells it to, and a server around it on a free port, for tests."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import openai

from bmjax.config import UserError
from bmjax.generate.requests import FinishReason, OnTokens, Request, Token
from bmjax.generate.server.asking import Served
from bmjax.generate.server.serve import EngineServer, listening
from bmjax.generate.settings import ServeSettings
from bmjax.log import silent
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


@dataclass(eq=False)
class ScriptedRunning:
    """A request in the scripted engine."""

    request: Request
    on_tokens: OnTokens
    script: list[int]
    prompt_tokens: Sequence[Token] = ()
    finish_reason: FinishReason | None = None
    is_cancelled: bool = False
    position: int = 0


@dataclass
class ScriptedEngine:
    """Says `answer(request)`, a token a step, of `slots` requests at once; log-probabilities are -id/100.

    Attributes:
        answer: from a request to its tokens.
        slots: requests that go on at once.
        seconds: that a step takes.
    """

    answer: Callable[[Request], Sequence[int]]
    slots: int = 4
    seconds: float = 0.0
    waiting: list[ScriptedRunning] = field(default_factory=list)
    running: list[ScriptedRunning] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def submit(self, request: Request, on_tokens: OnTokens) -> ScriptedRunning:
        if max(request.tokens) == 299:
            raise UserError("token 299 is refused by the engine")
        running = ScriptedRunning(request, on_tokens, list(self.answer(request)))
        self.waiting.append(running)
        return running

    def cancel(self, running: ScriptedRunning) -> None:
        running.is_cancelled = True

    def step(self) -> bool:
        self.threads.add(threading.get_ident())
        for running in [r for r in [*self.running, *self.waiting] if r.is_cancelled]:
            self._end(running, [], "cancelled")
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.pop(0))
        if self.running and self.seconds:
            time.sleep(self.seconds)
        for running in list(self.running):
            request, position = running.request, running.position
            if request.prompt_logprobs and not running.prompt_tokens:
                first, *others = request.tokens
                running.prompt_tokens = [Token(first), *(self.token(token, request) for token in others)]
            limit = request.sampling.max_new_tokens
            tokens = [self.token(token, request) for token in running.script[position : position + (limit > 0)]]
            running.position += 1
            if running.position >= limit:
                self._end(running, tokens, "length" if len(running.script) >= limit else "stop")
            elif running.position >= len(running.script):
                self._end(running, tokens, "stop")
            else:
                running.on_tokens(tokens, None)
        return bool(self.running or self.waiting)

    def token(self, token: int, request: Request) -> Token:
        count = request.sampling.logprobs
        if count is None:
            return Token(token)
        likeliest = tuple((rank, -rank / 100) for rank in range(30, 30 + count))
        return Token(token, -token / 100, likeliest)

    def _end(self, running: ScriptedRunning, tokens: Sequence[Token], reason: FinishReason) -> None:
        for members in (self.running, self.waiting):
            if running in members:
                members.remove(running)
        running.finish_reason = reason
        running.on_tokens(tokens, reason)


def encode(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids


def letters(text: str) -> list[int]:
    """The tokens of single characters; the tags of reasoning are text then, not special tokens."""
    return [token for character in text for token in encode(character)]


def question(request) -> str:
    """What the prompt's last turn says, or the whole prompt where it is no chat."""
    text = TOKENIZER.decode(request.tokens)
    return text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def echo(request) -> list[int]:
    """The question again, [ and ] being < and >."""
    return letters(question(request).replace("[", "<").replace("]", ">"))


def make_client(serving: "Serving", key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key=key, max_retries=0)


def ask(client, text, **fields):
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **fields)


class Serving:
    """A server in a thread, while used as a context manager.

    Attributes:
        url: where it is, without /v1.
        engine: what answers.
        worker: the server's.
    """

    def __init__(
        self,
        engine,
        *,
        api_key: str | None = None,
        context: int = 256,
        template: str = "",
        tokenizer=TOKENIZER,
        log=silent,
        **settings,
    ):
        self.engine = engine
        self.settings = ServeSettings.read(
            {"model": "tiny", "port": 0, "slots": getattr(engine, "slots", 4)} | settings
        )
        self.served = Served(
            "tiny",
            frozenset({"tiny", "models/tiny"}),
            tokenizer,
            template or tokenizer.chat_template,
            context,
            len(tokenizer),
        )
        self.server = EngineServer(engine, self.served, self.settings, api_key, log)
        self.worker = self.server.worker

    def __enter__(self):
        self._listening = listening(self.settings.host, self.settings.port)
        listener = self._listening.__enter__()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=(listener,), daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def __exit__(self, *_):
        self.stop()
        self._listening.__exit__(None, None, None)


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition; return how long it took. It fails after so many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - began
