"""Training checkpoints: Orbax in the background, the newest few kept, a half-written one never seen.

Orbax writes a step into a temporary directory and renames it when everything is on disk; a process may die at any
moment. What it left is cleared when the directory is opened again.
"""

import errno
import logging
import operator
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bmjax.config import UserError, first_line
from bmjax.parallel.processes import is_main, wait_for_all

TEMPORARY = "*.orbax-checkpoint-tmp"


class _NotOrbax(logging.Filter):
    """Orbax logs every step of its work, and each background error several times before it raises it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_NotOrbax())


class Checkpoints:
    """The checkpoints of one training run in `directory`: one every `every` steps, of which the last `keep` stay and
    those of a multiple of `keep_every` steps.

    All processes of a run make the same calls. An error of a background save is raised by the next call.
    """

    def __init__(self, directory: str | Path, keep: int, every: int, keep_every: int | None = None) -> None:
        self.directory = Path(directory).resolve()
        self.every = every
        training = ocp.training
        preserved: Any = training.preservation_policies.LatestN(keep)
        if keep_every:
            multiples = training.preservation_policies.EveryNSteps(keep_every)
            preserved = training.preservation_policies.AnyPreservationPolicy([preserved, multiples])
        try:
            if is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clear_leftovers()
            wait_for_all("bmjax/checkpoints")
            self._checkpointer = training.Checkpointer(
                self.directory,
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=preserved,
            )
        except OSError as error:
            raise UserError(f"{self.directory}: cannot hold checkpoints: {error.strerror}") from None

    def due(self, step: int, last: int | None = None) -> bool:
        """Whether a run saves after `step` steps: every `every` steps, and at the `last`."""
        return step % self.every == 0 or step == last

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save `state` (a pytree of jax.Array) and `meta` (JSON) as `step`, a number above all saved before.

        Returns once the arrays are copied, so they may be donated; the files are written in the background.
        Raises UserError, one line naming the directory, when this or the save before it found the disk full.
        """
        step = operator.index(step)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"{self.directory}: step {step} is not after the newest checkpoint, {latest}")
        try:
            self._checkpointer.save_async(step, state, custom_metadata={"meta": dict(meta), "leaves": _leaves(state)})
        except Exception as error:
            raise self._failed(error) from None

    def latest(self) -> int | None:
        """The newest step that is whole, None when there is none."""
        self._wait()
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def restore(self, step: int | None, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, meta) of `step`, or of the newest for None.

        abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, which may be those of another mesh, and with
        dtypes, of which float32 and bfloat16 may stand for one another.
        Raises UserError when there is no such checkpoint, when it is another model's (naming the first leaf that
        differs) or when it is damaged.
        """
        step = self._known(step)
        where = self.directory / str(step)
        try:
            saved = self._checkpointer.metadata(step).custom_metadata
            _check_same(saved["leaves"], _leaves(abstract_state), where)
            return self._checkpointer.load(step, abstract_state), saved["meta"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{where}: the checkpoint is damaged: {first_line(error)}; delete this directory to use an earlier one"
            ) from None

    def meta(self, step: int | None) -> dict[str, Any]:
        """The `meta` saved with `step`, or with the newest for None; UserError when there is none."""
        return self._checkpointer.metadata(self._known(step)).custom_metadata["meta"]

    def _known(self, step: int | None) -> int:
        latest = self.latest()  # waits for the save under way, which may be the one asked for
        step = latest if step is None else operator.index(step)
        if step is None or step not in [found.step for found in self._checkpointer.checkpoints]:
            raise UserError(f"{self.directory}: no checkpoint" + ("" if step is None else f" of step {step}"))
        return step

    def close(self) -> None:
        """Wait for the save under way. No other call may follow."""
        try:
            self._wait()
        finally:
            self._checkpointer.close()

    def _wait(self) -> None:
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> Exception:
        """The UserError for a save that the file system refused, its files removed; other errors as they are."""
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, OSError) or code:
            self._clear_leftovers()
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            return UserError(
                f"{self.directory}: cannot write a checkpoint: {os.strerror(number)}; the earlier ones are intact, "
                "make room and run again to resume"
            )
        return error

    def _clear_leftovers(self) -> None:
        if is_main():
            for path in self.directory.glob(TEMPORARY):
                shutil.rmtree(path, ignore_errors=True)


def _leaves(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf, as `float32 [3, 4]`, by its path, as `a/b/0`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _same_but_for_precision(found: str | None, expected: str | None) -> bool:
    """Whether both are floating-point leaves of one shape: Orbax casts what it restores."""
    (kind, _, shape), (other, _, wanted) = ((text or "").partition(" ") for text in (found, expected))
    return shape == wanted and {kind, other} <= {"float32", "bfloat16"}


def _check_same(found: Mapping[str, str], expected: Mapping[str, str], where: Path) -> None:
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name) and not _same_but_for_precision(found.get(name), expected.get(name)):
            raise UserError(
                f"{where}: the checkpoint is of another model or optimizer: {name} is {found.get(name, 'absent')}, "
                f"expected {expected.get(name, 'absent')}; use another output, or delete the checkpoints"
            )
