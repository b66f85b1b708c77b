"""Goes on from another training: with its moments, step and place in the data, and weights that come from elsewhere.

Branches are trained in rounds this way. Between two trainings their weights are merged, and every branch goes on from
the merged ones as if they were its own. Called by `train`, for a training that has no checkpoint itself.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bmjax.branch.export import checkpoint_of
from bmjax.branch.fingerprint import check_same
from bmjax.branch.settings import ChosenTraining, TrainSettings
from bmjax.config import UserError
from bmjax.urls import url_of
from bmjax.weights.checkpoint import load_part, meta_of


@dataclass(frozen=True)
class Predecessor:
    """The checkpoint of a training that another one goes on from."""

    checkpoint: str | Path
    step: int
    meta: Mapping[str, Any]  # as saved with it: fingerprint, tokens, values

    @property
    def identity(self) -> str:
        """The step, and a digest of all that its moments were made of."""
        text = json.dumps(self.meta["fingerprint"], sort_keys=True)
        return f"step {self.step} of {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def metrics(self) -> str | Path:
        """The metrics.jsonl of that training."""
        if url_of(self.checkpoint):
            return f"{str(self.checkpoint).rsplit('/', 2)[0]}/metrics.jsonl"
        return Path(self.checkpoint).parents[1] / "metrics.jsonl"

    def moments(self, abstract: Any, student: str) -> Any:
        """Read Adam's moments; UserError, which names the student, where they are those of another architecture.

        abstract: a pytree of jax.ShapeDtypeStruct with shardings.
        """
        try:
            return load_part(self.checkpoint, {"moments": abstract})["moments"]
        except UserError:
            raise UserError(
                f"continue_from: {self.checkpoint}: holds no moments of the shapes of student '{student}': it is of a "
                "student of other sizes, or damaged; go on with a student of the same sizes"
            ) from None


def predecessor(settings: TrainSettings) -> Predecessor | None:
    """Return the checkpoint that `continue_from` names; None without that key, UserError where there is none."""
    if settings.continue_from is None:
        return None
    checkpoint = checkpoint_of(settings.continue_from)
    if checkpoint is None:
        raise UserError(
            f"continue_from: {settings.continue_from}: no checkpoint there; name the output of a training, or one of "
            "its checkpoints (OUTPUT/checkpoints/STEP)"
        )
    return Predecessor(checkpoint, int(str(checkpoint).rpartition("/")[2]), meta_of(checkpoint))


def check_follows(earlier: Predecessor, expected: Mapping[str, str], settings: ChosenTraining, stop: int) -> None:
    """Raise UserError where a training cannot go on from an earlier one.

    All that decides the weights has to be the same, but for the student. expected: the fingerprint of the training;
    stop: its last step.
    """
    of_its_own = ("student", "continue_from")
    stored = {key: value for key, value in earlier.meta["fingerprint"].items() if key not in of_its_own}
    check_same(
        stored, {key: value for key, value in expected.items() if key not in of_its_own}, settings,
        f"continue_from: {earlier.checkpoint}", "a training goes on with the settings and data that it began with",
    )  # fmt: skip
    if earlier.step >= stop:
        raise UserError(
            f"continue_from: {earlier.checkpoint}: {earlier.step} steps are done there, and this training ends after "
            f"{stop}; raise until, or remove it (in `bmjax run`: fewer rounds)"
        )


def abstract_of(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of a pytree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
