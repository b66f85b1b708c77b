"""Runs the stages of a run: skips one that is done for the same inputs, begins it anew when they changed.

A stage's fingerprint is a hash of its name, its inputs and the fingerprints of the stages it reads. A marker with
it is written when the stage ends; another, when it starts, tells a killed stage (continue) from a stale one (wipe).
"""

import contextlib
import glob
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.io.atomic import write_atomic
from bmjax.log import Log


@dataclass(frozen=True)
class Stage:
    """A piece of work that is done once."""

    name: str
    inputs: Callable[[], Any]  # called when the stage's turn comes; returns the JSON values that the result depends on
    after: tuple[str, ...]  # names of the stages whose results it reads; they come before it
    outputs: tuple[str, ...]  # paths under the run's directory, removed first when they come from other inputs
    work: Callable[[], object]


class Stages:
    """The stages of one run directory. `measured` holds what each took."""

    def __init__(self, directory: Path, log: Log) -> None:
        self.directory, self._log = directory, log
        self._fingerprints: dict[str, str] = {}
        self.measured: dict[str, dict[str, float]] = {}

    def run(self, stage: Stage) -> None:
        """Do the stage's work unless it is done."""
        name = stage.name
        inputs = [name, stage.inputs(), [self._fingerprints[before] for before in stage.after]]
        text = json.dumps(inputs, sort_keys=True, default=str)
        fingerprint = self._fingerprints[name] = hashlib.sha256(text.encode()).hexdigest()
        done, started = (
            self.directory / "stages" / f"{name.replace('/', '-')}.{suffix}" for suffix in ("json", "started")
        )
        paths = [self.directory / output for output in stage.outputs]
        # Done already?
        marker = _read(done)
        if marker.pop("fingerprint", None) == fingerprint and all(path.exists() for path in paths):
            self.measured[name] = marker
            return
        # Continue what was killed; begin anew where the inputs changed.
        done.unlink(missing_ok=True)
        if _read(started).get("fingerprint") != fingerprint:
            for path in paths:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            write_atomic(started, json.dumps({"fingerprint": fingerprint}))
        self._log(f"== {name}")
        begun = time.monotonic()
        reset_peak_memory()
        stage.work()
        measured = {"seconds": round(time.monotonic() - begun, 2), "peak_rss_mib": round(peak_memory(), 1)}
        write_atomic(done, json.dumps({"fingerprint": fingerprint, **measured}))
        self.measured[name] = measured


def _read(marker: Path) -> dict[str, Any]:
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}


def file_states(names: Iterable[str]) -> list[list[Any]]:
    """Return names with the state of what they name, for a stage's inputs: a changed file redoes what depends on it."""
    return [[name, *_state(name)] for name in names]


def _state(name: str) -> list[Any]:
    """Size and time of a file, or of all files in a directory or of a pattern; nothing of other names (a hub id)."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path.stat().st_size, path.stat().st_mtime_ns]
    if path.is_dir():
        files = [(str(file.relative_to(path)), file) for file in path.rglob("*")]
    else:
        files = [(file, Path(file)) for file in glob.glob(str(path), recursive=True)]
    return [[label, file.stat().st_size, file.stat().st_mtime_ns] for label, file in sorted(files) if file.is_file()]


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the highest resident memory of this process since the reset, MiB; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0
