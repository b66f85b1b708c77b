"""Runs the stages of a run: skips one that is done for the same inputs, begins it anew when they changed.

A stage's fingerprint is a hash of its name, its inputs and the fingerprints of the stages it reads. A marker with
it is written when the stage ends; another, when it starts, tells a killed stage (continue) from a stale one (wipe).
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.errors import UserError
from bmjax.io.atomic import write_atomic
from bmjax.log import Log
from bmjax.urls import url_of

DONE, BEGUN, TO_DO = "done", "begun", "to do"


def run_directory(chosen: str | Path | None) -> Path:
    """Return the run's directory; UserError for one that cannot be."""
    if chosen is None:
        raise UserError("output: no directory given; pass --output DIR or set output in the config")
    if url_of(chosen):
        raise UserError(
            f"output: {chosen}: a run's directory must be on a disk of this machine; its students, data and traces may "
            "be in a bucket, and `bmjax train` and `bmjax merge` write there"
        )
    directory = Path(chosen)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, expected a directory for the run")
    return directory


@dataclass(frozen=True)
class Stage:
    """A piece of work that is done once."""

    name: str
    inputs: Callable[[], Any]  # called when the stage's turn comes; returns the JSON values that the result depends on
    after: tuple[str, ...]  # names of the stages whose results it reads; they come before it
    outputs: tuple[str, ...]  # paths under the run's directory, removed first when they come from other inputs
    work: Callable[[], object]
    plan: Callable[[], list[str]] | None = None  # what the work will take, in lines; for a stage that is not done


class Stages:
    """The stages of one run directory. `measured` holds what each took."""

    def __init__(self, directory: Path, log: Log) -> None:
        self.directory, self._log = directory, log
        self._fingerprints: dict[str, str] = {}
        self.measured: dict[str, dict[str, float]] = {}

    def state(self, stage: Stage) -> str:
        """Return 'done', 'begun' or 'to do', doing nothing. To be asked of all stages in order."""
        try:
            fingerprint = self._fingerprint(stage)
        except (OSError, KeyError, UserError):  # what it reads is not there, or was made of other inputs
            self._fingerprints[stage.name] = "unknown"
            return TO_DO
        done, started = self._markers(stage)
        if _read(done).get("fingerprint") == fingerprint and all(path.exists() for path in self._paths(stage)):
            return DONE
        return BEGUN if _read(started).get("fingerprint") == fingerprint else TO_DO

    def _fingerprint(self, stage: Stage) -> str:
        inputs = [stage.name, stage.inputs(), [self._fingerprints[before] for before in stage.after]]
        text = json.dumps(inputs, sort_keys=True, default=str)
        self._fingerprints[stage.name] = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprints[stage.name]

    def _markers(self, stage: Stage) -> tuple[Path, Path]:
        """Return the files that say that a stage is done, and that it has begun."""
        name = self.directory / "stages" / stage.name.replace("/", "-")
        return name.with_name(f"{name.name}.json"), name.with_name(f"{name.name}.started")

    def _paths(self, stage: Stage) -> list[Path]:
        return [self.directory / output for output in stage.outputs]

    def run(self, stage: Stage) -> None:
        """Do the stage's work unless it is done."""
        name, fingerprint = stage.name, self._fingerprint(stage)
        done, started = self._markers(stage)
        paths = self._paths(stage)
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
