"""What the checkpoints of a training share wherever they are kept: their calls, their order, the check of their arrays.

checkpoint.py keeps them on disk and bucket_checkpoint.py in a bucket.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.config import UserError, first_line


class Checkpoints(ABC):
    """The checkpoints of a training run.

    All processes of a run make the same calls. An error of a background save is raised by the next call.
    """

    directory: Path | str

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save `state` (a pytree of jax.Array) and `meta` (JSON) as `step`, a number above all saved before.

        Returns once the arrays are copied, so they may be donated. Raises UserError when this or the save before it
        could not be written.
        """
        step, latest = operator.index(step), self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"{self.directory}: step {step} is not after the newest checkpoint, {latest}")
        self._save(step, state, {"meta": dict(meta), "leaves": leaf_types(state)})

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read (state, meta) of the newest checkpoint.

        abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, which may be those of another mesh. A float32
        leaf may be restored as bfloat16, and the other way round. Raises UserError when there is no checkpoint, when it
        is another model's (naming the first leaf that differs) or when it is damaged.
        """
        step = self._newest()
        facts = self._facts(step)
        check_leaves(facts["leaves"], leaf_types(abstract_state), f"{self.directory}/{step}")
        return self._load(step, abstract_state), facts["meta"]

    def meta(self) -> dict[str, Any]:
        """Return the `meta` of the newest checkpoint; UserError when there is none."""
        return self._facts(self._newest())["meta"]

    def _newest(self) -> int:
        step = self.latest()
        if step is None:
            raise UserError(f"{self.directory}: no checkpoint")
        return step

    @abstractmethod
    def latest(self) -> int | None:
        """Return the newest complete step, None when there is none. It waits for the save under way."""

    @abstractmethod
    def close(self) -> None:
        """Wait for the save under way. No other call may follow."""

    @abstractmethod
    def _save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Begin to write a step. facts: its `meta`, and its `leaves` as `leaf_types` has them."""

    @abstractmethod
    def _facts(self, step: int) -> Mapping[str, Any]:
        """Return the facts that were saved with a step."""

    @abstractmethod
    def _load(self, step: int, abstract_state: Any) -> Any:
        """Read the arrays of a step, of which the dtypes and shapes are known to be right."""


def damaged(path: object, error: Exception) -> UserError:
    """Return the error for a checkpoint that cannot be read."""
    return UserError(
        f"{path}: the checkpoint is damaged: {first_line(error)}; delete this directory to use an earlier one"
    )


def check_leaves(saved: Mapping[str, str], expected: Mapping[str, str], path: object) -> None:
    """Raise UserError, naming the first array that differs, for a checkpoint of another model or optimizer."""
    for name in [*expected, *saved]:
        stored, wanted = saved.get(name, "absent"), expected.get(name, "absent")
        # Reading casts.
        if stored.replace("bfloat16 ", "float32 ") != wanted.replace("bfloat16 ", "float32 "):
            raise UserError(
                f"{path}: the checkpoint is of another model or optimizer: {name} is {stored}, expected {wanted}; use "
                "another output, or delete the checkpoints"
            )


def leaf_name(path: Any) -> str:
    """Return the path of a leaf in a pytree, such as `a/b/0`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_types(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of every leaf, such as `float32 [3, 4]`, by its path."""
    return {name: f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}" for name, leaf in named_leaves(tree).items()}
