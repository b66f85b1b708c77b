"""Train one branch: a student, a dataset, AdamW, checkpoints, and a Hugging Face directory at the end.

`bmjax train`, the pipeline and the Python interface call `train`; prepare.py and choose.py have what comes before.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch import optimizer
from bmjax.branch.choose import Chosen, choose, fit_memory
from bmjax.branch.continuing import Predecessor, abstract_of, check_follows, predecessor
from bmjax.branch.export import checkpoint_of, export_model, load_start, open_student
from bmjax.branch.fingerprint import check_same, fingerprint
from bmjax.branch.loop import Run, loop, saved
from bmjax.branch.prepare import check, last_step, step_plan, total_steps
from bmjax.branch.remarks import data_line, marks_line, warnings
from bmjax.branch.settings import ChosenTraining, TrainSettings
from bmjax.branch.step import State, abstract_state, compile_step, init_state, memory_line
from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.atomic import held, write_atomic
from bmjax.log import Log, silent, stage, write_line
from bmjax.model import spec
from bmjax.parallel import processes
from bmjax.urls import url_of
from bmjax.weights import hf
from bmjax.weights.checkpoint import meta_of, open_checkpoints
from bmjax.weights.checkpoint_base import Checkpoints
from bmjax.weights.student import Student

# What a training leaves in its output.
OWN_FILES = {"checkpoints", "metrics.jsonl", "result.json", "hf", "exports", "importances", "profile"}
OWN_FILES |= {"tensorboard", "trackers.json"}
BESIDE = {".log", ".out", ".err", ".txt", ".yaml", ".yml"}  # what a scheduler, or a user, may have put there


def train(settings: TrainSettings, log: Log = write_line, progress: bool = True) -> dict[str, Any]:
    """Run or resume a training. A finished one returns its summary at once.

    Where several processes train, each makes this call.

    Arguments:
        settings: the keys of `bmjax train`.
        log: takes one line a remark.
        progress: show a bar on a terminal.

    Returns:
        The summary, also written to DIR/result.json: hf (path, there relative to DIR), steps and tokens (real ones
        seen; both with those of a training that this one goes on from), loss (nats a target token of the last step),
        move (|delta|/|student|, or None) and fingerprint.

    Raises:
        UserError: for inputs that do not fit together.
        SystemExit: after SIGTERM, with a checkpoint written.
    """
    with processes.together(settings.coordinator, settings.num_processes, settings.process_id, settings.peer_timeout):
        if not processes.is_main():
            return _train(settings, silent, progress)
        _check_output(Path(settings.output))  # before its lock is there
        with held(Path(settings.output) / ".lock", "another training is writing here"):
            return _train(settings, log, progress)


@dataclass(frozen=True)
class _Prepared:
    """A training whose inputs fit together; no weights have been read."""

    student: Student
    mesh: Mesh
    chosen: Chosen
    steps: int  # of the whole training
    stop: int  # the step after which it ends
    earlier: Predecessor | None
    fingerprint: dict[str, str]


def _prepare(settings: TrainSettings, log: Log) -> _Prepared:
    """Open the student, tokenize the data, choose what is left out, refuse what does not fit together."""
    student = open_student(settings)
    mesh = check(settings, student.config)
    _check_output(Path(settings.output))
    earlier = predecessor(settings)
    chosen = choose(settings, student, mesh, earlier, log)
    settings = chosen.settings
    check(settings, student.config)
    steps = total_steps(settings, chosen.loader)
    stop = last_step(settings, steps)
    identity = earlier.identity if earlier else None
    expected = fingerprint(settings, student.directory, chosen.loader.dataset.digest, steps, identity)
    if earlier:
        check_follows(earlier, expected, settings, stop)
    if (checkpoint := checkpoint_of(settings.output)) is not None:
        _check_resumes(checkpoint, expected, settings, stop)
    return _Prepared(student, mesh, chosen, steps, stop, earlier, expected)


def _check_resumes(checkpoint: str | Path, expected: dict[str, str], settings: ChosenTraining, stop: int) -> None:
    """Raise UserError where the newest checkpoint is of another training, or behind the step that this one ends at."""
    folder, _, step = str(checkpoint).rpartition("/")
    check_same(meta_of(checkpoint)["fingerprint"], expected, settings, Path(folder))
    if int(step) > stop:
        raise UserError(f"until: {stop} steps, but {folder} holds step {step}; raise it")


def _check_output(output: Path) -> None:
    """Raise UserError, before minutes of work, for an output that cannot hold a training or holds something else."""
    if url_of(output):
        return
    directory = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not directory.is_dir():
        raise UserError(f"output: {directory}: is a file, expected a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"output: {directory}: no right to write there; give another output")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (output / "checkpoints").is_file():
        raise UserError(f"output: {output}/checkpoints: is a file and cannot hold checkpoints; give a new directory")
    foreign = sorted(n for n in names - OWN_FILES if Path(n).suffix not in BESIDE and not n.startswith("."))
    if foreign and not names & OWN_FILES:
        raise UserError(f"output: {output}: holds '{foreign[0]}' and no training; give a new directory")


def _train(given: TrainSettings, log: Log, progress: bool) -> dict[str, Any]:
    output = Path(given.output)
    ready = _prepare(given, log)
    student, mesh, steps, stop, expected = ready.student, ready.mesh, ready.steps, ready.stop, ready.fingerprint
    settings = ready.chosen.settings
    shared = settings.model_dump(exclude={"process_id", "student", "data", "continue_from"})
    processes.check_agreement({key: str(value) for key, value in shared.items()} | expected)

    # A training that is done only says so.
    summary = _finished(output, expected, settings, stop) if processes.is_main() else None
    if processes.mains(summary is not None):
        summary = summary or json.loads(bucket.local(output / "result.json").read_text())
        log(f"{bucket.join(output)}: already trained, {summary['steps']} steps")
        return summary | {"hf": bucket.join(output, "hf")}

    # Train, from the newest checkpoint on.
    log("compiling the step ...")  # a minute for a large model
    chosen, fit = fit_memory(ready.chosen, given, student, mesh)
    settings, loader = chosen.settings, chosen.loader
    for line in (
        *chosen.lines(), data_line(settings, loader, student, steps), marks_line(student), *loader.dataset.remarks,
        *warnings(settings, loader, steps, fit),
    ):  # fmt: skip
        log(line)
    plan = step_plan(settings, student.config, mesh, loader.documents)
    run = Run(settings, student, loader, plan, steps, stop, expected, log, progress, ready.earlier)
    with jax.set_mesh(mesh):
        with stage(f"loading {student.directory}", log, patience=2):
            state = init_state(plan, load_start(student, mesh))
        checkpoints = open_checkpoints(output / "checkpoints", settings.keep, settings.keep_every)
        try:
            state, begin, seen = _resume(run, state, checkpoints)
            state, summary = loop(run, state, begin, seen, checkpoints)
        finally:
            checkpoints.close()
        # Write the model. result.json comes last: it marks the training as done.
        _export(run, state, summary["tokens"])
    result = {"hf": "hf", "steps": stop, "fingerprint": expected, **summary}
    if processes.is_main():
        write_atomic(output / "result.json", json.dumps(result, indent=1))
    log(
        f"{bucket.join(output, 'hf')}: written, loss {summary['loss']:.4f} after {stop} steps and "
        f"{summary['tokens']:,} tokens"
    )
    return result | {"hf": bucket.join(output, "hf")}


def describe(given: TrainSettings) -> list[str]:
    """Return what a training would do, in lines: its data, rows and steps, what is chosen, and a step's memory.

    It tokenizes the data, compiles the step, and reads no weights. Raises UserError for what `train` would refuse.
    """
    ready = _prepare(given, write_line)
    chosen, fit = fit_memory(ready.chosen, given, ready.student, ready.mesh)
    settings, loader, student, steps = chosen.settings, chosen.loader, ready.student, ready.steps
    lines = [*chosen.lines(), data_line(settings, loader, student, steps), marks_line(student), *loader.dataset.remarks]
    lines += warnings(settings, loader, steps, fit)
    plan = step_plan(settings, student.config, ready.mesh, loader.documents)
    program = compile_step(plan, loader.batch, loader.length)
    lines.append(memory_line(program, abstract_state(plan), ready.mesh.local_devices[0]))
    axes = ", ".join(f"{axis} {size}" for axis, size in ready.mesh.shape.items() if size > 1) or "one device"
    done = 0
    if (checkpoint := checkpoint_of(given.output)) is not None:
        done = int(str(checkpoint).rpartition("/")[2])
        lines.append(f"goes on from {checkpoint}")
    elif ready.earlier:
        done = ready.earlier.step
        lines.append(f"goes on from step {done} of {ready.earlier.checkpoint} with the weights of {settings.student}")
    count = max(0, ready.stop - done)
    tokens = loader.dataset.tokens * count / loader.steps_per_epoch
    return [*lines, f"{count} steps of {settings.batch} rows, {count / loader.steps_per_epoch:.2f} epochs, about "
            f"{tokens:,.0f} tokens, on {axes}; nothing was written"]  # fmt: skip


def _finished(output: Path, expected: dict[str, str], settings: ChosenTraining, stop: int) -> dict[str, Any] | None:
    """Return the summary of a training that is done, with everything written that is asked for; else None."""
    path = output / "result.json"
    exports = [output / "hf"] + ([output / "importances"] if settings.importances else [])
    if not bucket.exists(path) or not all(bucket.exists(directory / "config.json") for directory in exports):
        return None
    result = json.loads(bucket.local(path).read_text())
    check_same(result["fingerprint"], expected, settings, output)
    return result if result["steps"] == stop and result["fingerprint"]["steps"] == expected["steps"] else None


def _resume(run: Run, state: State, checkpoints: Checkpoints) -> tuple[State, int, int]:
    """Return (state, steps done, real tokens seen) of the newest whole checkpoint.

    Without one, of the training that this one goes on from, or of a new one.
    """
    latest = checkpoints.latest()
    if latest is None and run.earlier is not None:
        moments = run.earlier.moments(abstract_of(state["moments"]), run.settings.student)
        run.log(f"going on from step {run.earlier.step} of {run.earlier.checkpoint}, with the weights of the student")
        return state | {"moments": moments}, run.earlier.step, run.earlier.meta["tokens"]
    if latest is None:
        return state, 0, 0
    restored, meta = checkpoints.restore(abstract_of(saved(state)))
    run.log(f"resuming at step {latest}")
    return state | restored, latest, meta["tokens"]


def _export(run: Run, state: State, tokens: int) -> None:
    """Write DIR/hf, and DIR/importances if asked for."""
    params = spec.join(state["params"], state["frozen"])
    export_model(run.output / "hf", params, run.settings, run.student, run.stop, tokens)
    if run.settings.importances:
        importances = optimizer.importances(state["moments"], state["frozen"], run.settings.beta2)
        directory = run.output / "importances"
        hf.save_hf(directory, importances, run.student.hf_config, dtype=np.dtype(np.float32))
