"""What a training writes for others to read: Hugging Face directories, at its end, on the way, or of any checkpoint.

The loop and `train` export the state at hand; `bmjax convert` exports a checkpoint that was kept.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.branch.optimizer import split_frozen
from bmjax.branch.settings import TrainSettings
from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.card import bases, code, dataset_ids, license_fields, public_name, public_values, read_head
from bmjax.model import spec
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.urls import url_of
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.bucket_checkpoint import is_whole
from bmjax.weights.card import write_card
from bmjax.weights.checkpoint import load_part, meta_of
from bmjax.weights.student import Student

# What says where a training ran and lies, and nothing of the model.
_SETTINGS_LEFT_OUT = {
    "output", "wandb", "mlflow", "coordinator", "num_processes", "process_id", "stop_code", "peer_timeout", "mesh",
    "log_every", "keep", "keep_every", "save_every", "export_every", "profile_steps", "continue_from",
}  # fmt: skip


def open_student(settings: TrainSettings) -> Student:
    """Open the student of a training, with the chat template that it is trained with."""
    return students.open(settings.student, template=settings.template, purpose="training", marks=settings.marks)


def load_start(student: Student, mesh: Any) -> dict[str, Any]:
    """Load a student's parameters as a training begins with them, float32 on the mesh, added tokens included."""
    params = hf.load_params(student.directory, student.config, mesh, dtype=np.float32)
    if not student.added:
        return params
    end = student.marks.end if student.marks else None
    return hf.start_added_tokens(params, student.added, end, student.stored_end_tokens)


def export_model(
    directory: str | Path, params: Any, settings: TrainSettings, student: Student, steps: int, tokens: int
) -> None:
    """Write parameters as the model of a training: weights in export_dtype, or as the student stores them.

    steps, tokens: what it was trained for and on, said in its card.
    """
    hf.save_hf(
        directory, params, student.hf_config, side_files=student.directory, tokenizer=student.tokenizer,
        # The template is part of the branch: it is served with the one that it was trained with.
        template=student.template if settings.template is not None else None,
        added=student.added, end=student.marks.end if student.marks else None,
        dtype=np.dtype(settings.export_dtype) if settings.export_dtype else hf.stored_dtype(student.directory),
        eos=student.end_tokens if student.end_tokens != student.stored_end_tokens else None,
        card=lambda folder: _write_card(folder, settings, student, steps, tokens),
    )  # fmt: skip


def _write_card(folder: Path, settings: TrainSettings, student: Student, steps: int, tokens: int) -> None:
    """Write the card of a training's model: what it was made of, and the settings beside the defaults."""
    data = [settings.data] if isinstance(settings.data, str) else settings.data
    heads, base = [read_head(student.directory)], public_name(settings.student)
    base_ids, datasets = bases(settings.student, heads), dataset_ids(data)
    head: dict[str, Any] = {"tags": ["bmjax", "sft"]}
    if base_ids:
        head |= {"base_model": base_ids, "base_model_relation": "finetune"}
    if datasets:
        head["datasets"] = datasets
    named = ", ".join(code(name) for name in dict.fromkeys(public_name(name) for name in data))
    changed = settings.model_dump(mode="json", exclude_defaults=True, exclude=_SETTINGS_LEFT_OUT)
    changed["data"] = [public_name(name) for name in data]
    write_card(
        folder,
        title=f"{public_name(settings.output)}, trained from {base}",
        head=head | license_fields(heads),
        versions={package: version(package) for package in ("jax", "flax", "optax", "transformers")},
        about=f"{code(base)}, fine-tuned by bmjax on {named}: {steps:,} steps, {tokens:,} tokens.",
        summary="AdamW, float32 weights. The settings beside bmjax's defaults:",
        settings=public_values(changed),
    )  # fmt: skip


def checkpoint_of(source: str) -> str | Path | None:
    """Return the checkpoint that a path means, itself or the newest of a training's output; None for other paths."""
    if url := url_of(source):
        parent, _, name = url.rpartition("/")
        if parent.endswith("/checkpoints") and name.isdigit():
            return url if bucket.exists(url) else None
        inside = url if name == "checkpoints" else f"{url}/checkpoints"
        whole = [int(step) for step in bucket.folders(inside) if step.isdigit() and is_whole(f"{inside}/{step}")]
        return f"{inside}/{max(whole)}" if whole else None
    path = Path(source).expanduser().resolve()
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()] if folder.is_dir() else []
    return folder / str(max(steps)) if steps else None


def export_checkpoint(checkpoint: str | Path, destination: str | Path) -> None:
    """Write the model that a training had at a checkpoint. The student that it began with must still be there.

    Raises:
        UserError: for a destination that exists, and a checkpoint that does not say what it is of.
    """
    if bucket.exists(destination) and not bucket.is_unfinished(destination):
        raise UserError(f"{destination}: exists already; choose a new directory")
    meta = meta_of(checkpoint)
    stored = meta.get("settings")
    if stored is None:
        raise UserError(
            f"{checkpoint}: an earlier version of bmjax wrote it and did not keep the settings; run its training "
            "again, which exports the newest one"
        )
    settings = TrainSettings.read(stored)
    student, mesh = open_student(settings), make_mesh()
    trained, frozen = split_frozen(spec.table(student.config), settings.freeze)
    shapes = spec.unflatten(
        (row.path, jax.ShapeDtypeStruct(row.shape, np.float32, sharding=sharding(mesh, row.axes, row.shape)))
        for row in trained
    )
    with jax.set_mesh(mesh):
        params = load_part(checkpoint, {"params": shapes})["params"]
        if frozen:
            params = spec.join(params, spec.pick(load_start(student, mesh), frozen))
        export_model(destination, params, settings, student, _step_of(checkpoint), meta["tokens"])


def _step_of(checkpoint: str | Path) -> int:
    return int(str(checkpoint).rpartition("/")[2])
