"""Sliding windows: never more than the limit in any of them, and no more waiting than that takes."""

import asyncio
import random

import pytest

from bmjax.teach.limits import Entry, SlidingWindow, Stopped
from tests.teach.faulty import most_in_window


class Clock:
    """A clock that moves only when told, and an event loop's sleep that tells it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def admitted(window: SlidingWindow, clock: Clock, amount: float, step: float = 0.01) -> Entry:
    """Admit at the earliest time of the clock, which moves in steps."""
    work = asyncio.create_task(window.admit(amount))
    for _ in range(100_000):
        for _ in range(3):
            await asyncio.sleep(0)
        if work.done():
            return work.result()
        clock.now += step
        window._change.set()
    raise AssertionError("never admitted")


def test_amounts_in_any_window_stay_below_the_limit() -> None:
    async def main() -> None:
        rng, clock = random.Random(1), Clock()
        window = SlidingWindow(100, 60.0, clock)
        spent: list[tuple[float, float]] = []
        for _ in range(60):
            entry = await admitted(window, clock, 50, step=0.5)
            clock.now += rng.random()
            used = rng.randrange(1, 50)
            entry.close(used)
            spent.append((clock.now, used))
        for end, _ in spent:
            assert sum(used for moment, used in spent if end - 60 < moment <= end) <= 100
        # Not far from the limit either: the true amounts count, not the reserved ones.
        assert sum(used for _, used in spent) / spent[-1][0] * 60 > 50

    asyncio.run(main())


def test_requests_are_let_in_at_the_full_rate() -> None:
    async def main() -> None:
        clock = Clock()
        window = SlidingWindow(5, 1.0, clock)
        times = []
        for _ in range(40):
            (await admitted(window, clock, 1)).close()
            times.append(clock.now)
        assert most_in_window(times, 1.0) == 5
        assert times[-1] < 8.5

    asyncio.run(main())


def test_an_entry_counts_until_it_is_closed() -> None:
    async def main() -> None:
        clock = Clock()
        window = SlidingWindow(2, 1.0, clock)
        first, second = await window.admit(1), await window.admit(1)
        third = asyncio.create_task(window.admit(1))
        clock.now = 100.0
        await asyncio.sleep(0.01)
        assert not third.done()
        second.close(0)
        second.close(5)  # only the first word counts
        await asyncio.sleep(0.01)
        assert third.done()
        first.close()

    asyncio.run(main())


def test_who_waits_is_let_go_when_the_window_stops() -> None:
    async def main() -> None:
        window = SlidingWindow(1, 1000.0)
        (await window.admit(1)).close()
        waiting = [asyncio.create_task(window.admit(1)) for _ in range(5)]
        await asyncio.sleep(0.01)
        window.stop()
        assert all(isinstance(result, Stopped) for result in await asyncio.gather(*waiting, return_exceptions=True))
        with pytest.raises(Stopped):
            await window.admit(1)

    asyncio.run(main())
