"""Descriptors of many files under a limit of open files: what was used longest ago is closed, and opened again."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

MOST = 256
LEAST = 8


def most_open_files() -> int:
    """Return how many files one pool may keep open: a quarter of the system's limit, half of what is free, 8 to 256."""
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = limit - len(os.listdir("/dev/fd"))  # the process may hold many sockets and files of others
    return max(LEAST, min(MOST, limit // 4, free // 2))


class OpenFiles:
    """A pool of descriptors, one a file, that threads share."""

    def __init__(self, opener: Callable[[Path], int]) -> None:
        """opener: opens a file and returns its descriptor."""
        self._opener, self._most, self._lock = opener, most_open_files(), threading.Lock()
        self._descriptors: dict[Path, int] = {}  # used longest ago first
        self._users: dict[Path, int] = {}

    @contextlib.contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """Give the descriptor of a file, which stays open inside of the `with` block."""
        with self._lock:
            if path not in self._descriptors:
                idle = [p for p in self._descriptors if not self._users[p]]
                for other in idle[: max(0, len(self._descriptors) + 1 - self._most)]:
                    os.close(self._descriptors.pop(other))
                self._descriptors[path] = self._opener(path)
            descriptor = self._descriptors[path] = self._descriptors.pop(path)
            self._users[path] = self._users.get(path, 0) + 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1

    def close(self) -> None:
        """Close all files; a later use opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
