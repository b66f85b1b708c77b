"""Tells a dead endpoint from requests that failed, so that a run ends before every request has tried in vain."""

import time
from dataclasses import dataclass

LOST_AT_START = 5  # connections lost before the endpoint was ever heard from, that end a run
LOST_LATER = 20  # and after that
_START_SECONDS = 3.0


class Health:
    """Whether an endpoint lives, by how its attempts end one after the other."""

    def __init__(self, concurrency: int) -> None:
        self._most_errors = max(50, 2 * concurrency)
        self.was_heard = False
        self._lost, self._errors, self._throttled = _Streak(), _Streak(), _Streak()

    def note_lost(self) -> None:
        """Note a connection that was lost without a word."""
        self._lost.add()

    def note_heard(self, status: int | None) -> None:
        """Note a reply with an HTTP status; None for an error without."""
        self.was_heard = True
        self._lost.end()
        for streak, belongs in ((self._errors, (status or 0) >= 500), (self._throttled, status == 429)):
            streak.add() if belongs else streak.end()

    @property
    def is_throttled(self) -> bool:
        """Whether the endpoint refuses several requests in a row for their number."""
        return self._throttled.count > 1

    def problem(self, is_last: bool, patience: float) -> str | None:
        """Return what is wrong with an endpoint that is taken for dead, else None.

        is_last: whether the attempt that just failed was the last one of its request.
        """
        lost, errors = self._lost, self._errors
        if not self.was_heard:
            is_dead = lost.count >= LOST_AT_START and (is_last or lost.seconds >= min(patience, _START_SECONDS))
        else:
            is_dead = lost.count >= LOST_LATER and lost.seconds >= patience
        if is_dead:
            return f"{lost.count} connections lost in a row"
        if errors.count >= self._most_errors and errors.seconds >= 10 * patience:
            return f"{errors.count} errors of the server in a row"
        return None


@dataclass
class _Streak:
    """Events in a row, and when the first of them was."""

    count: int = 0
    since: float = 0.0

    def add(self) -> None:
        self.since = self.since if self.count else time.monotonic()
        self.count += 1

    def end(self) -> None:
        self.count = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since
