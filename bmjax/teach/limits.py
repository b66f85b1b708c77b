"""Limits of an endpoint that hold in every sliding window: requests a second, requests a minute, tokens a minute."""

import asyncio
import heapq
from collections.abc import Callable

_MARGIN = 0.05  # seconds more than a window, for clocks that differ


class Stopped(Exception):
    """A wait that ended because no more requests are sent."""


class Entry:
    """An amount that counts against a window: until it is closed, and for the window's length after that."""

    def __init__(self, window: "SlidingWindow", amount: float) -> None:
        self._window, self._amount, self._is_open = window, amount, True

    def close(self, amount: float | None = None) -> None:
        """Say that it happened by now, and how much it was; a second time changes nothing."""
        if self._is_open:
            self._is_open = False
            self._window._close(self._amount, self._amount if amount is None else amount)


class SlidingWindow:
    """Lets in no more than `limit` in any `seconds`, first come, first served.

    An endpoint counts a request when it arrives, an unknown moment after it was sent. An entry therefore counts until
    it is known to have happened, and a whole window longer. now: the clock.
    """

    def __init__(self, limit: float, seconds: float, now: Callable[[], float] | None = None) -> None:
        self.limit, self.seconds = limit, seconds
        self._now = now
        self._open = self._closed = 0.0
        self._ends: list[tuple[float, float]] = []  # (when it leaves the window, amount), a heap
        self._turn = asyncio.Lock()
        self._change = asyncio.Event()
        self._is_stopped = False

    async def admit(self, amount: float) -> Entry:
        """Wait until the window has room for an amount. Raises Stopped after `stop`."""
        async with self._turn:
            while not self._is_stopped:
                self._forget()
                if self._open + self._closed + amount <= self.limit:
                    self._open += amount
                    return Entry(self, amount)
                self._change.clear()
                wait = self._ends[0][0] - self._time() if self._ends else None
                try:
                    await asyncio.wait_for(self._change.wait(), wait)
                except TimeoutError:
                    continue
        raise Stopped

    def stop(self) -> None:
        """Let nothing in any more; who waits, gets Stopped."""
        self._is_stopped = True
        self._change.set()

    def _time(self) -> float:
        return asyncio.get_running_loop().time() if self._now is None else self._now()

    def _forget(self) -> None:
        while self._ends and self._ends[0][0] <= self._time():
            self._closed -= heapq.heappop(self._ends)[1]
        if not self._ends:
            self._closed = 0.0

    def _close(self, reserved: float, amount: float) -> None:
        self._open -= reserved
        if amount:
            self._closed += amount
            heapq.heappush(self._ends, (self._time() + self.seconds + _MARGIN, amount))
        self._change.set()
