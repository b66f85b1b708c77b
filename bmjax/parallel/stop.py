"""An orderly end on SIGTERM, which schedulers send before they take a machine away. Training calls it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax


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
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Return whether to end after this step. All processes call it once a step."""
        if self._alone:
            return self._signalled
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
