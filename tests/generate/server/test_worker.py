"""What the event loop sees of the engine's thread."""

import asyncio

import pytest

from bmjax.generate.server.worker import Asked, Event


def test_a_wait_that_is_cancelled_as_an_event_comes_is_cancelled():
    """A client that goes away just then would else be answered to the end, and keep its slot."""

    async def wait() -> None:
        asked = Asked()
        waiting = asyncio.ensure_future(asked.next_event(30))
        for _ in range(5):  # until it waits
            await asyncio.sleep(0)
        asked.events.put_nowait(Event(0))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # One that is let do returns it, and None where none comes.
        assert asked.events.empty() or await asked.next_event(30) == Event(0)
        assert await asked.next_event(0.01) is None

    asyncio.run(wait())
