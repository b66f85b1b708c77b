"""An orderly end on SIGTERM, which schedulers send before they take a machine away. Training calls it."""

import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Stop:
    """A context in which SIGTERM does not end the process; `reached` returns when to end.

    In a run of several processes JAX's runtime passes a SIGTERM of any process to all of them and picks the step after
    which they end together.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        # Only the main thread may set a signal's handler; with several processes JAX has set it.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_signalled", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Return whether to end after this step. All processes call it once a step."""
        return self._signalled if self._alone else multihost_utils.reached_preemption_sync_point(step)
