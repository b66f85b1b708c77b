"""The sizes that a run's branches and its mixture share, where the config leaves them out: chosen once, and kept."""

import json
from collections.abc import Sequence
from pathlib import Path

from bmjax.branch.choose import SIZES, choose_sizes, compute_dtype
from bmjax.branch.export import open_student
from bmjax.branch.prepare import check
from bmjax.branch.settings import Training, TrainSettings
from bmjax.io.atomic import write_atomic
from bmjax.log import Log
from bmjax.pipeline.settings import RunSettings

FILE = "sizes.json"  # in the run's directory


def are_missing(settings: RunSettings) -> bool:
    """Return whether a branch, or the mixture, leaves a size out."""
    trainings = [*map(settings.branch_training, settings.domains), settings.mixture_training(1)]
    return any(map(_left_out, trainings))


def _left_out(training: Training) -> list[str]:
    return [key for key in SIZES if getattr(training, key) is None]


def write(file: Path, branches: Sequence[TrainSettings], log: Log) -> None:
    """Choose the sizes for the branches of a run, of the rows of all domains, and write them to `file`."""
    trainings = [(training, open_student(training)) for training in branches]
    mesh = check(branches[0], trainings[0][1].config)
    dtype = compute_dtype(mesh.devices.flat[0]).value
    choices, _ = choose_sizes(
        [(t.model_copy(update={"compute_dtype": t.compute_dtype or dtype}), student) for t, student in trainings],
        mesh, log,
    )  # fmt: skip
    for choice in choices:
        log(f"{choice.key}: {choice.value} in all branches and the mixture: {choice.reason}")
    write_atomic(file, json.dumps({choice.key: choice.value for choice in choices}))


def filled(training: Training, file: Path) -> Training:
    """Return a training with the sizes that it leaves out, as `write` has written them."""
    missing = _left_out(training)
    sizes = json.loads(file.read_text()) if missing else {}
    return training.model_copy(update={key: sizes.get(key) for key in missing})
