"""What the parts of one training share: its settings, student, data, step and log."""

from dataclasses import dataclass
from pathlib import Path

from bmjax.branch.loader import Loader
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import StepPlan
from bmjax.log import Log
from bmjax.weights.student import Student


@dataclass(frozen=True)
class Run:
    """A training that is about to begin or to go on, made once by `train`.

    steps: optimizer steps of the whole training. fingerprint: what its checkpoints have to share with it. log: takes
    one line a remark; silent in all processes but the first. progress: show a bar on a terminal.
    """

    settings: TrainSettings
    student: Student
    loader: Loader
    plan: StepPlan
    steps: int
    fingerprint: dict[str, str]
    log: Log
    progress: bool

    @property
    def output(self) -> Path:
        """The directory that the training writes."""
        return Path(self.settings.output)


@dataclass(frozen=True)
class Progress:
    """How far a training has come: optimizer steps done, real tokens seen by them."""

    step: int = 0
    tokens: int = 0
