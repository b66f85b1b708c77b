"""What makes a run the one that a checkpoint belongs to."""

import hashlib
from pathlib import Path

from bmjax.branch.settings import TrainSettings
from bmjax.config import UserError

# Settings that change nothing but rounding: where things are, how they are split and shown, what is kept of them.
NO_RESULT = {
    "output", "student", "data", "save_every", "keep", "keep_every", "log_every", "wandb", "profile_steps", "mesh",
    "accumulate", "remat", "attention", "context_parallel", "coordinator", "num_processes", "process_id",
    "peer_timeout", "stop_code",
}  # fmt: skip
# Settings that a run may go on with another value of.
MAY_CHANGE = NO_RESULT | {"compute_dtype", "moments_dtype", "export_dtype", "importances"}


def fingerprint(settings: TrainSettings, student: Path, digest: str) -> dict[str, str]:
    """What a checkpoint must share with the run that resumes from it, by the key to blame."""
    keys = {key: str(value) for key, value in settings.model_dump().items() if key not in MAY_CHANGE}
    return {**keys, "data": digest, "student": student_digest(student)}


def student_digest(student: Path) -> str:
    """A hash of config.json and of the weights: sizes, and of each file 64 KiB at 256 places (all, up to 16 MiB)."""
    digest = hashlib.sha256()
    for file in [*sorted(student.glob("*.safetensors")), student / "config.json"]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for place in range(256):
                start = max(place * 2**16, place * (size - 2**16) // 255)
                if start < size:
                    stream.seek(start)
                    digest.update(stream.read(2**16))
    return digest.hexdigest()


def check_same(found: dict[str, str], expected: dict[str, str], directory: Path) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            detail = "its contents differ" if key in ("data", "student") else f"it had {found.get(key)}, now {value}"
            raise UserError(
                f"{directory}: the checkpoint belongs to another run: {key}: {detail}; "
                "use another output, or delete the checkpoints to start anew"
            )
