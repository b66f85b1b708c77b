"""Training checkpoints: written by Orbax in the background, the newest few kept, a half-written one never seen.

Orbax writes a step into a temporary directory and renames it when everything is on disk, so a process may die at any
moment. What it left is removed when the directory is opened again. Nothing else calls Orbax.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from bmjax.config import UserError, first_line
from bmjax.parallel.processes import is_main, wait_for_all
from bmjax.urls import url_of
from bmjax.weights import bucket_checkpoint
from bmjax.weights.bucket_checkpoint import BucketCheckpoints
from bmjax.weights.checkpoint_base import Checkpoints, damaged

# Orbax logs every step of its work, and each background error several times before it raises it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def open_checkpoints(directory: str | Path, keep: int, keep_every: int | None = None) -> Checkpoints:
    """Open the checkpoints of a training run, on disk or in a bucket; the arguments are those of `DiskCheckpoints`."""
    url = url_of(directory)
    return DiskCheckpoints(directory, keep, keep_every) if url is None else BucketCheckpoints(url, keep, keep_every)


class DiskCheckpoints(Checkpoints):
    """The checkpoints of a training run on disk.

    keep: how many of the newest stay. keep_every: checkpoints of a multiple of so many steps stay, too.
    """

    directory: Path

    def __init__(self, directory: str | Path, keep: int, keep_every: int | None = None) -> None:
        self.directory = Path(directory).resolve()
        policies = ocp.training.preservation_policies
        preserved = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        try:
            if is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clear_leftovers()
            wait_for_all("bmjax/checkpoints")
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(preserved),
            )
        except OSError as error:
            raise UserError(f"{self.directory}: cannot hold checkpoints: {error.strerror}") from None

    def _save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        with self._disk_errors():
            self._checkpointer.save_async(step, state, custom_metadata=dict(facts))

    def latest(self) -> int | None:
        with self._disk_errors():
            self._checkpointer.wait()
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def _facts(self, step: int) -> Mapping[str, Any]:
        try:
            saved = self._checkpointer.metadata(step).custom_metadata
            return {"meta": saved["meta"], "leaves": saved["leaves"]}
        except Exception as error:
            raise damaged(self.directory / str(step), error) from None

    def _load(self, step: int, abstract_state: Any) -> Any:
        try:
            return self._checkpointer.load(step, abstract_state)
        except Exception as error:
            raise damaged(self.directory / str(step), error) from None

    def close(self) -> None:
        try:
            self.latest()
        finally:
            self._checkpointer.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Remove what a failed save left, and raise a disk's error as a UserError."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if not isinstance(error, OSError) and not code:
                raise
            self._clear_leftovers()
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            raise UserError(
                f"{self.directory}: cannot write a checkpoint: {os.strerror(number)}; the earlier ones are intact, "
                "make room and run again to resume"
            ) from None

    def _clear_leftovers(self) -> None:
        if is_main():
            for path in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(path, ignore_errors=True)


def load_part(path: str | Path, abstract_state: Any) -> Any:
    """Read some arrays of a complete checkpoint, changing nothing there; a training may be writing beside it.

    abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, a part of what was saved. UserError for a
    checkpoint that is damaged or does not hold them.
    """
    if url := url_of(path):
        return bucket_checkpoint.load(url, abstract_state)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(path, abstract_state)
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of this student, or damaged: {first_line(error)}") from None


def meta_of(path: str | Path) -> dict[str, Any]:
    """Return the `meta` saved with a checkpoint, changing nothing there; UserError when there is none."""
    if url := url_of(path):
        return bucket_checkpoint.facts_of(url)["meta"]
    try:
        return ocp.metadata(path).custom_metadata["meta"]
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of a training: {first_line(error)}") from None
