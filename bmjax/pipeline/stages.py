"""Runs the stages of a run: skips one that is done for the same inputs, begins it anew when they changed.

A stage's fingerprint is a hash of its name, its inputs and the fingerprints of the stages it reads. A marker with
it is written when the stage ends; another, when it starts, tells a killed stage (continue) from a stale one (wipe).
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.log import Log


@dataclass(frozen=True)
class Stage:
    """A piece of work that is done once.

    inputs: called when the stage's turn comes; returns the JSON values that the result depends on.
    after: names of the stages whose results it reads; they come before it.
    outputs: paths under the run's directory that it makes, removed first when they come from other inputs.
    """

    name: str
    inputs: Callable[[], Any]
    after: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[], object]


class Stages:
    """The stages of one run directory: which are done, what each took."""

    def __init__(self, directory: Path, log: Log) -> None:
        self.directory, self._log = directory, log
        self._markers = directory / "stages"
        self._fingerprints: dict[str, str] = {}
        self.measured: dict[str, dict[str, float]] = {}
        try:
            self._markers.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from None

    def run(self, stage: Stage) -> None:
        """Do the stage's work unless it is done."""
        name = stage.name
        inputs = [name, stage.inputs(), [self._fingerprints[before] for before in stage.after]]
        text = json.dumps(inputs, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._fingerprints[name] = fingerprint
        slug = name.replace("/", "-")
        done, started = self._markers / f"{slug}.json", self._markers / f"{slug}.started"
        paths = [self.directory / output for output in stage.outputs]
        marker = _read(done)
        if marker.get("fingerprint") == fingerprint and all(path.exists() for path in paths):
            self.measured[name] = {key: marker[key] for key in ("seconds", "peak_rss_mib")}
            return
        done.unlink(missing_ok=True)
        before = _read(started)
        if before.get("fingerprint") != fingerprint:
            for path in paths:
                _remove(path)
            write_atomic(started, json.dumps({"fingerprint": fingerprint}))
        self._log(f"== {name}")
        begun = time.monotonic()
        with PeakMemory() as memory:
            stage.work()
        measured = {"seconds": round(time.monotonic() - begun, 2), "peak_rss_mib": round(memory.mib, 1)}
        write_atomic(done, json.dumps({"fingerprint": fingerprint, **measured}))
        self.measured[name] = measured


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class PeakMemory:
    """Sample the resident memory of this process, MiB, while a block runs (the kernel's own peak never falls)."""

    def __init__(self, interval: float = 0.1) -> None:
        self.mib = 0.0
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _sample(self) -> None:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return
        self.mib = max(self.mib, pages * os.sysconf("SC_PAGESIZE") / 2**20)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
