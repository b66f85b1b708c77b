"""Training checkpoints: written by Orbax in the background, the newest few kept, a half-written one never seen.

Orbax writes a step into a temporary directory and renames it when everything is on disk, so a process may die at any
moment. What it left is removed when the directory is opened again. Nothing else calls Orbax.
"""

import contextlib
import errno
import logging
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bmjax.config import UserError, first_line
from bmjax.parallel.processes import is_main, wait_for_all

# Orbax logs every step of its work, and each background error several times before it raises it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a training run.

    keep: how many of the newest stay. keep_every: checkpoints of a multiple of so many steps stay, too. All processes
    of a run make the same calls. An error of a background save is raised by the next call.
    """

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

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save `state` (a pytree of jax.Array) and `meta` (JSON) as `step`, a number above all saved before.

        Returns once the arrays are copied, so they may be donated. Raises UserError when this or the save before it met
        a full disk.
        """
        step, latest = operator.index(step), self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"{self.directory}: step {step} is not after the newest checkpoint, {latest}")
        with self._disk_errors():
            self._checkpointer.save_async(step, state, custom_metadata={"meta": dict(meta), "leaves": _leaves(state)})

    def latest(self) -> int | None:
        """Return the newest complete step, None when there is none. It waits for the save under way."""
        with self._disk_errors():
            self._checkpointer.wait()
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read (state, meta) of the newest checkpoint.

        abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, which may be those of another mesh. A float32
        leaf may be restored as bfloat16, and the other way round. Raises UserError when there is no checkpoint, when it
        is another model's (naming the first leaf that differs) or when it is damaged.
        """
        step = self._newest()
        path, expected = self.directory / str(step), _leaves(abstract_state)
        try:
            saved = self._checkpointer.metadata(step).custom_metadata
            for name in [*expected, *saved["leaves"]]:
                stored, wanted = saved["leaves"].get(name, "absent"), expected.get(name, "absent")
                # Orbax casts what it restores.
                if stored.replace("bfloat16 ", "float32 ") != wanted.replace("bfloat16 ", "float32 "):
                    raise UserError(
                        f"{path}: the checkpoint is of another model or optimizer: {name} is {stored}, expected "
                        f"{wanted}; use another output, or delete the checkpoints"
                    )
            return self._checkpointer.load(step, abstract_state), saved["meta"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{path}: the checkpoint is damaged: {first_line(error)}; delete this directory to use an earlier one"
            ) from None

    def meta(self) -> dict[str, Any]:
        """Return the `meta` of the newest checkpoint; UserError when there is none."""
        return self._checkpointer.metadata(self._newest()).custom_metadata["meta"]

    def _newest(self) -> int:
        step = self.latest()
        if step is None:
            raise UserError(f"{self.directory}: no checkpoint")
        return step

    def close(self) -> None:
        """Wait for the save under way. No other call may follow."""
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


def load_part(path: Path, abstract_state: Any) -> Any:
    """Read some arrays of a complete checkpoint, changing nothing there; a training may be writing beside it.

    abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, a part of what was saved. UserError for a
    checkpoint that is damaged or does not hold them.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(path, abstract_state)
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of this student, or damaged: {first_line(error)}") from None


def meta_of(path: Path) -> dict[str, Any]:
    """Return the `meta` saved with a checkpoint, changing nothing there; UserError when there is none."""
    try:
        return ocp.metadata(path).custom_metadata["meta"]
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of a training: {first_line(error)}") from None


def _leaves(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of every leaf, such as `float32 [3, 4]`, by its path, such as `a/b/0`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
