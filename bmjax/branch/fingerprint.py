"""A training's fingerprint: settings, data, student. A checkpoint with another one is refused."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from bmjax.branch.optimizer import warmup_steps
from bmjax.branch.settings import MAY_CHANGE, SAME_RESULT, ChosenTraining
from bmjax.config import UserError

BLOCK, BLOCKS = 2**16, 256  # bytes of a weights file that are hashed at a time; how many of them, spread over the file


def fingerprint(
    settings: ChosenTraining, student: Path, data_digest: str, steps: int, earlier: str | None = None
) -> dict[str, str]:
    """Return what a checkpoint must share with the training that resumes from it, by the key to blame.

    earlier: the identity of the training that this one goes on from.
    """
    values = settings.model_dump(include=settings.keys_without(SAME_RESULT, MAY_CHANGE))
    values |= {"data": data_digest, "student": student_digest(student), "steps": steps, "continue_from": earlier}
    return {key: str(value) for key, value in values.items()}


def student_digest(student: Path) -> str:
    """Hash config.json and the weights: sizes, and of each file 256 blocks of 64 KiB (all of it up to 16 MiB)."""
    digest = hashlib.sha256()
    for file in [*sorted(student.glob("*.safetensors")), student / "config.json"]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS):
                start = max(block * BLOCK, block * (size - BLOCK) // (BLOCKS - 1))
                if start < size:
                    stream.seek(start)
                    digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def check_same(
    stored: Mapping[str, str], expected: Mapping[str, str], settings: ChosenTraining, directory: Path | str,
    advice: str = "use another output, or delete the checkpoints to start anew",
) -> None:  # fmt: skip
    """Raise UserError, naming the key, where the fingerprint stored in `directory` is not the expected one.

    More steps than there were are allowed where the steps before them would have been the same: with a constant
    schedule and a warm-up of the same length.
    """
    # A key of a later version was at its default.
    differing = {key: value for key, value in expected.items() if stored.get(key, value) != value}
    differing.pop("epochs", None)  # the number of steps says it
    warm_steps = warmup_steps(int(stored["steps"]), float(stored["warmup"]))
    if warm_steps == warmup_steps(int(expected["steps"]), settings.warmup):
        differing.pop("warmup", None)
    for key, value in differing.items():
        detail = "its contents differ" if key in ("data", "student") else f"it had {stored[key]}, now {value}"
        if key == "steps" and int(stored[key]) < int(value):
            if settings.schedule == "constant" and warm_steps == warmup_steps(int(value), settings.warmup):
                continue
            detail += (
                f"; schedule: {settings.schedule} ended there, only constant goes on"
                if settings.schedule != "constant"
                else f", and warmup: {settings.warmup:g} is a share of them; set warmup: {warm_steps} (steps) to go on"
            )
        raise UserError(f"{directory}: the checkpoint belongs to another run: {key}: {detail}; {advice}")
