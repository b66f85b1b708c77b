"""An orderly end on SIGTERM, which schedulers send before they take a machine away."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax


class Stop:
    """Within it SIGTERM ends nothing by itself; `reached` says when to end.

    In a run of several processes JAX's runtime passes one process's SIGTERM to all of them and picks the step after
    which they end together.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        # Only the main thread may say what a signal does; with several processes JAX has said it.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to end after this step. To be asked once a step, by all processes."""
        if self._alone:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
