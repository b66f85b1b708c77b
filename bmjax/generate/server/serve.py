"""`bmjax serve`: loads a model, listens, and stops when it is told to, after the answers that are under way."""

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from bmjax.config import UserError
from bmjax.generate.load import load_engine, open_model
from bmjax.generate.requests import Generator
from bmjax.generate.server.app import App, make_app
from bmjax.generate.server.asking import Served
from bmjax.generate.server.metrics import Metrics
from bmjax.generate.server.worker import Worker
from bmjax.generate.settings import ServeSettings
from bmjax.log import Log, silent, stage

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Clients drop a connection that was idle for a time of their own: httpx and the openai client for 5 seconds. A server
# with the same limit may close it just as the next request is sent, and that request is lost.
KEEP_ALIVE_SECONDS = 75


def serve(settings: ServeSettings, api_key: str | None = None, log: Log = silent) -> None:
    """Serve a model until SIGTERM or SIGINT.

    Arguments:
        settings: the model, the address, the limits.
        api_key: what clients must send, in place of the variable that `settings.api_key_env` names.
        log: takes a line when the model is loaded, when the server listens, and when it stops.

    Raises:
        UserError: for a model that cannot be loaded, an address that cannot be listened at and a key that is not set.
    """
    key = read_key(settings.api_key_env) if api_key is None else api_key
    if key == "":
        raise UserError("--api-key: empty; give a key, or leave the option out")
    with listening(settings.host, settings.port) as listener:
        student = open_model(settings.model, settings.template)
        engine = load_engine(student, settings, settings.slots, log)
        if settings.compile_ahead:
            # Else the first requests would wait, and a client that leaves meanwhile would keep its slot.
            with stage("compiling every size of the batch", log):
                engine.compile_ahead()
        name = settings.name or served_name(settings.model)
        served = Served(
            name, frozenset({name, settings.model}), student.tokenizer, student.template, engine.context,
            student.config.vocab_size, settings.max_tokens, settings.seed,
        )  # fmt: skip
        serve_engine(engine, served, settings, listener, key, log)


def serve_engine(
    engine: Generator, served: Served, settings: ServeSettings, listener: socket.socket, key: str | None, log: Log
) -> None:
    """Serve an engine at a socket that listens, until a signal; then refuse what is new and answer what was asked."""
    server = EngineServer(engine, served, settings, key, log)
    log(address_line(served.name, settings, listener, key))
    handlers = {number: signal.signal(number, lambda *_: server.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(listener)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if server.worker.failure is not None:
        raise server.worker.failure
    left = f"; {server.worker.active} answers were cut off" if server.worker.active else ""
    log(f"{served.name}: stopped{left}")


class EngineServer:
    """uvicorn around the routes and the worker. log: told of unknown fields in requests.

    Attributes:
        worker: the thread that runs the engine.
    """

    def __init__(
        self, engine: Generator, served: Served, settings: ServeSettings, key: str | None, log: Log = silent
    ) -> None:
        self.worker = Worker(engine, settings.slots + settings.queue, on_failure=self.stop)
        app = App(served, self.worker, Metrics(self.worker, settings.slots), log)
        config = uvicorn.Config(
            make_app(app, key, self._lifespan), log_config=None, access_log=False, lifespan="on",
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds), timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False, ws="none",
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    def run(self, listener: socket.socket) -> None:
        """Serve at a socket until `stop`."""
        self._server.run(sockets=[listener])

    def stop(self) -> None:
        """Take no further requests, answer those under way and end. Any thread may call it."""
        self._server.should_exit = True


def read_key(variable: str | None) -> str | None:
    """Return the API key in an environment variable; None without a variable. UserError where it is not set."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(f"api_key_env: the environment variable {variable} is not set or empty; set it to the key")
    return key


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen at an address; UserError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{host}:{port}: cannot listen there: {reason}; set --port or --host") from None
    with listener:
        yield listener


def address_line(name: str, settings: ServeSettings, listener: socket.socket, key: str | None) -> str:
    """Return the line that says where a model is served, and who can reach it."""
    host, port = listener.getsockname()[:2]
    is_all = host in ("0.0.0.0", "::")
    shown = "127.0.0.1" if is_all else f"[{host}]" if ":" in host else host
    line = f"{name}: serving at http://{shown}:{port}/v1, {settings.slots} answers at once, {settings.queue} may wait"
    if is_all or host not in LOOPBACK:
        reach = "every address of this machine" if is_all else f"the address {host}"
        who = "clients need the key" if key else "anyone who reaches it may ask: set --api-key-env"
        line += f"; it listens at {reach}, and {who}"
    return line


def served_name(model: str) -> str:
    """Return the name of a model at its endpoint: a hub id as it stands, or the name of a directory."""
    return Path(model).resolve().name if Path(model).exists() or "://" in model else model
