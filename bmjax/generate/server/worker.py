"""The thread that runs the engine, and the door to it for the event loop.

JAX computes in one thread, requests live in the event loop of another. `Worker.ask` hands requests to the engine and
returns an `Asked`, whose events the loop awaits; the thread hands over all tokens of a step with one call.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bmjax.generate.requests import FinishReason, Generator, OnTokens, Request, Running, Token


class QueueFull(Exception):
    """More answers are under way and waiting than the server takes."""


@dataclass(frozen=True)
class Event:
    """What happened to one answer: its next tokens and why it ended, or the error that ended it."""

    index: int
    tokens: Sequence[Token] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Asked:
    """Requests that are answered together, as the event loop's thread sees them.

    Attributes:
        running: the engine's state of each.
        unfinished: indexes of the answers that the engine goes on with.
        began: when it was asked, by time.monotonic.
    """

    running: list[Running] = field(default_factory=list)
    unfinished: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    async def next_event(self, seconds: float) -> Event | None:
        """Return the next event; None when none came in so many seconds."""
        if not self.events.empty():
            return self.events.get_nowait()
        try:
            # Not wait_for: before Python 3.12 it forgets that it is cancelled where an event comes at the same time.
            async with asyncio.timeout(seconds):
                return await self.events.get()
        except TimeoutError:
            return None


class Worker:
    """Runs an engine in a thread of its own. All methods are called in the event loop's thread.

    Attributes:
        capacity: the most answers under way and waiting.
        active: how many those are.
        failure: what ended the engine; None while it lives.
    """

    def __init__(self, engine: Generator, capacity: int, on_failure: Callable[[], None] = lambda: None) -> None:
        """on_failure: called in the event loop when the engine raised and no answer can come any more."""
        self.capacity, self.active = capacity, 0
        self.failure: Exception | None = None
        self._engine, self._on_failure = engine, on_failure
        self._wake = threading.Condition()
        self._is_asked = self._is_stopped = False
        self._outbox: list[tuple[Asked, Event]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._observers: list[Callable[[Asked, Event], None]] = []
        self._under_way: set[Asked] = set()

    def observe(self, observer: Callable[[Asked, Event], None]) -> None:
        """Have an observer called with every event, for metrics."""
        self._observers.append(observer)

    def start(self) -> None:
        """Start the thread; the events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def ask(self, requests: Sequence[Request]) -> Asked:
        """Hand requests to the engine.

        Raises:
            QueueFull: where they would be more than `capacity` with those under way.
            UserError: for one that the model cannot answer; none of them is answered then.
        """
        if self.failure is not None:
            raise RuntimeError("the engine has ended") from self.failure
        if self.active + len(requests) > self.capacity:
            raise QueueFull
        asked = Asked()
        self._under_way.add(asked)
        try:
            for index, request in enumerate(requests):
                asked.running.append(self._engine.submit(request, self._reporter(asked, index)))
                asked.unfinished.add(index)
                self.active += 1
        except BaseException:
            self.cancel(asked)
            raise
        self._wake_up()
        return asked

    def cancel(self, asked: Asked, index: int | None = None) -> None:
        """End answers that go on: one of them, or all; their slots are free with the engine's next step."""
        for i in [index] if index is not None else sorted(asked.unfinished):
            if i in asked.unfinished:
                self._engine.cancel(asked.running[i])
        if not asked.unfinished:
            self._under_way.discard(asked)
        self._wake_up()

    def stop(self) -> None:
        """End the thread after its step and wait for it."""
        self._is_stopped = True
        self._wake_up()
        if self._thread.ident is not None:
            self._thread.join()

    def _wake_up(self) -> None:
        with self._wake:
            self._is_asked = True
            self._wake.notify()

    def _reporter(self, asked: Asked, index: int) -> OnTokens:
        def on_tokens(tokens: Sequence[Token], reason: FinishReason | None) -> None:  # in the engine's thread
            self._outbox.append((asked, Event(index, tuple(tokens), reason)))

        return on_tokens

    def _run(self) -> None:
        """Step while there is work. This is the engine's thread."""
        has_work = False
        while True:
            with self._wake:
                while not (has_work or self._is_asked):
                    self._wake.wait()
                self._is_asked = False
            if self._is_stopped:
                return
            failure = None
            try:
                has_work = self._engine.step()
            except Exception as error:  # whatever a computation raises: its answers are told, and the server ends
                failure = error
            outbox, self._outbox = self._outbox, []
            if (outbox or failure) and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, outbox, failure)
            if failure is not None:
                return

    def _deliver(self, outbox: list[tuple[Asked, Event]], failure: Exception | None) -> None:
        """Hand events to those who await them. This is the event loop's thread again."""
        if failure is not None:
            ended = {(asked, event.index) for asked, event in outbox if event.finish_reason is not None}
            going = ((asked, index) for asked in self._under_way for index in sorted(asked.unfinished))
            outbox += [(asked, Event(index, error=failure)) for asked, index in going if (asked, index) not in ended]
        for asked, event in outbox:
            if event.finish_reason is not None or event.error is not None:
                asked.unfinished.discard(event.index)
                self.active -= 1
                if not asked.unfinished:
                    self._under_way.discard(asked)
            asked.events.put_nowait(event)
            for observer in self._observers:
                observer(asked, event)
        if failure is not None:
            self.failure = failure
            self._on_failure()
