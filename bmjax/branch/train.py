"""Train one branch: a student, a dataset, AdamW, checkpoints, and a Hugging Face directory at the end.

`bmjax train`, the pipeline and the Python interface call `train`; `bmjax plan` asks the same `check` and `step_plan`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch import cache, examples, optimizer
from bmjax.branch.examples import Encoding
from bmjax.branch.export import export_model, load_start, open_student
from bmjax.branch.fingerprint import check_same, fingerprint
from bmjax.branch.loader import Loader
from bmjax.branch.loop import Run, import_wandb, loop, saved
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.step import State, StepPlan, init_state
from bmjax.config import UserError
from bmjax.io.atomic import held, write_atomic
from bmjax.log import Log, silent, write_line
from bmjax.model import spec
from bmjax.model.attention.dispatch import check_backend
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.config import ModelConfig
from bmjax.parallel import processes
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from bmjax.weights.checkpoint import Checkpoints
from bmjax.weights.student import Student

UNROLL_UP_TO = 8  # layers: below this a CPU gains from unrolling the scan, and the program stays small


def train(settings: TrainSettings, log: Log = write_line, progress: bool = True) -> dict[str, Any]:
    """Run or resume a training. A finished one returns its summary at once.

    Where several processes train, each makes this call.

    Arguments:
        settings: the keys of `bmjax train`.
        log: takes one line a remark.
        progress: show a bar on a terminal.

    Returns:
        The summary, also written to DIR/result.json: hf (path, there relative to DIR), steps, tokens (real ones seen),
        loss (nats a target token of the last step), move (|delta|/|student|, or None) and fingerprint.

    Raises:
        UserError: for inputs that do not fit together.
        SystemExit: after SIGTERM, with a checkpoint written.
    """
    with processes.together(settings.coordinator, settings.num_processes, settings.process_id, settings.peer_timeout):
        if not processes.is_main():
            return _train(settings, silent, progress)
        with held(Path(settings.output) / ".lock", "another training is writing here"):
            return _train(settings, log, progress)


def _train(settings: TrainSettings, log: Log, progress: bool) -> dict[str, Any]:
    output = Path(settings.output)
    # Open the student, tokenize the data, refuse what does not fit together. No weights are read yet.
    student = open_student(settings)
    config = student.config
    mesh = check(settings, config)
    loader = load_data(settings, student, log)
    steps = total_steps(settings, loader)
    expected = fingerprint(settings, student.directory, loader.dataset.digest, steps)
    shared = settings.model_dump(exclude={"process_id", "student", "data"})
    processes.check_agreement({key: str(value) for key, value in shared.items()} | expected)

    # A training that is done only says so.
    summary = _finished(output, expected, settings) if processes.is_main() else None
    if processes.mains(summary is not None):
        summary = summary or json.loads((output / "result.json").read_text())
        log(f"{output}: already trained, {summary['steps']} steps")
        return summary | {"hf": str(output / "hf")}

    # Train, from the newest checkpoint on.
    for line in (_data_line(settings, loader, student, steps), _marks_line(student), *loader.dataset.remarks):
        log(line)
    if remark := _rate_line(settings, steps):
        log(remark)
    plan = step_plan(settings, config, mesh, loader.documents)
    run = Run(settings, student, loader, plan, steps, expected, log, progress)
    with jax.set_mesh(mesh):
        state = init_state(plan, load_start(student, mesh))
        checkpoints = Checkpoints(output / "checkpoints", settings.keep, settings.keep_every)
        try:
            state, begin, seen = _resume(run, state, checkpoints)
            state, summary = loop(run, state, begin, seen, checkpoints)
        finally:
            checkpoints.close()
        # Write the model. result.json comes last: it marks the training as done.
        _export(run, state)
    result = {"hf": "hf", "steps": steps, "fingerprint": expected, **summary}
    if processes.is_main():
        write_atomic(output / "result.json", json.dumps(result, indent=1))
    log(f"{output / 'hf'}: written, loss {summary['loss']:.4f} after {steps} steps and {summary['tokens']:,} tokens")
    return result | {"hf": str(output / "hf")}


def describe(settings: TrainSettings) -> list[str]:
    """Return what a training would do, in lines: its data, rows and steps, and which marks end a turn.

    It tokenizes the data and reads no weights. Raises UserError for what `train` would refuse.
    """
    student = open_student(settings)
    mesh = check(settings, student.config)
    loader = load_data(settings, student, write_line)
    steps = total_steps(settings, loader)
    lines = [_data_line(settings, loader, student, steps), _marks_line(student), *loader.dataset.remarks]
    lines += [remark for remark in [_rate_line(settings, steps)] if remark]
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    tokens = loader.dataset.tokens * steps / loader.steps_per_epoch
    return [*lines, f"{steps} steps of {settings.batch} rows, {steps / loader.steps_per_epoch:.2f} epochs, about "
            f"{tokens:,.0f} tokens, on {axes}"]  # fmt: skip


def check(settings: Training, config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a training; UserError, naming the key to change, for one that cannot run.

    It reads no data and no weights. devices: those to train on, all of them; None: those at hand, of which one process
    may leave some unused.
    """
    if settings.wandb:
        import_wandb()
    if settings.seq_len > config.max_length:
        raise UserError(
            f"seq_len: {settings.seq_len} is more than the student's context of {config.max_length} tokens; lower it"
        )
    mesh = make_mesh(settings.mesh, devices)
    count = jax.device_count() if devices is None else len(devices)
    if mesh.size != count and (devices is not None or jax.process_count() > 1):
        raise UserError(
            f"mesh: {settings.mesh} uses {mesh.size} of {count} devices; give one axis -1, or sizes whose product is "
            f"{count}"
        )
    check_backend(settings.attention, mesh.devices.flat[0].platform)
    # The mesh has to divide rows, heads and tokens.
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = settings.batch // settings.accumulate
    if rows % ways:
        raise UserError(
            f"batch: {settings.batch} rows / accumulate {settings.accumulate} = {rows} a microbatch, not a multiple of "
            f"mesh data x fsdp = {ways}; change batch, accumulate or mesh"
        )
    heads = mesh.shape["tensor"] * (mesh.shape["context"] if settings.context_parallel == "ulysses" else 1)
    if config.num_heads % heads:
        raise UserError(
            f"mesh: the student's {config.num_heads} attention heads cannot be shared by {heads} devices along "
            f"{'tensor x context' if heads != mesh.shape['tensor'] else 'tensor'}; change mesh"
        )
    if settings.packing and settings.seq_len % mesh.shape["context"]:
        raise UserError(f"seq_len: {settings.seq_len} is not a multiple of mesh context = {mesh.shape['context']}")
    optimizer.split_frozen(spec.table(config), settings.freeze)
    return mesh


def load_data(settings: TrainSettings, student: Student, log: Log = silent) -> Loader:
    """Read and tokenize the rows of a training; UserError for what cannot be trained on."""
    assert student.template is not None  # the student was opened for training
    encoding = Encoding(
        student.tokenizer, student.template, settings.seq_len, settings.overlong, settings.turns, settings.ignore,
        student.end_tokens,
    )  # fmt: skip
    dataset = cache.load(settings.data, settings.columns, encoding, log)
    examples.check_vocabulary(dataset, student.config.vocab_size, student.directory)
    return Loader(dataset, settings.seq_len, settings.batch, settings.packing, settings.shuffle, settings.seed)


def _data_line(settings: TrainSettings, loader: Loader, student: Student, steps: int) -> str:
    data = loader.dataset
    cut = f", {data.truncated} truncated, {data.dropped} dropped" if data.truncated + data.dropped else ""
    rows = f"{len(loader.rows)} rows of {loader.length} ({loader.fill:.1%} filled)"
    return (
        f"{Path(settings.output).name}: {len(data.examples)} documents, {data.tokens:,} tokens in {rows}{cut}; "
        f"{spec.count(student.config):,} parameters, {steps} steps"
    )


def _marks_line(student: Student) -> str:
    """Say which tokens end a turn, and which were added."""
    assert student.marks is not None  # the student was opened for training
    names = student.tokenizer.convert_ids_to_tokens(list(student.end_tokens))
    line = f"an answer ends with {student.marks.end}; a generation ends at {', '.join(map(str, names))}"
    rows = ", ".join(f"{text} ({token})" for text, token in student.added.items())
    return f"{line}; new tokens in free rows of the vocabulary: {rows}" if rows else line


def _rate_line(settings: TrainSettings, steps: int) -> str | None:
    """Say where the learning rate stays zero, or never reaches its peak; None where it does."""
    peak = settings.learning_rate
    rates = (optimizer.learning_rate(s, steps, peak, settings.schedule, settings.warmup) for s in range(steps))
    highest = max(rates)
    if highest == 0:
        return (
            f"the learning rate is 0 in {'the only step' if steps == 1 else f'all {steps} steps'} (learning_rate "
            f"{peak:g}, warmup {settings.warmup:g}): nothing will be learned; give more steps, or warmup: 0"
        )
    if highest < 0.99 * peak:
        return (
            f"the learning rate reaches {highest:.3g} of {peak:g} in {steps} steps (warmup {settings.warmup:g}, "
            f"schedule {settings.schedule}); give more steps, or a shorter warmup"
        )
    return None


def total_steps(settings: TrainSettings, loader: Loader) -> int:
    """Return the optimizer steps of the whole training."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold exactly one of the two
    return max(1, math.ceil(settings.epochs * loader.steps_per_epoch))


def step_plan(settings: Training, config: ModelConfig, mesh: Mesh, documents: int = 0) -> StepPlan:
    """Make the plan that a step is compiled from.

    documents: the most that a row of the data holds, padding counted as one; 0 where there is no data.
    """
    platform = mesh.devices.flat[0].platform
    # Only GPU kernels are compiled for a number of documents; elsewhere all data share one program.
    documents = documents if platform == "gpu" else 0
    unroll = config.num_layers if jax.default_backend() == "cpu" and config.num_layers <= UNROLL_UP_TO else 1
    options = AttentionOptions(settings.attention, settings.context_parallel, platform, documents=documents)
    return StepPlan(
        config=config, freeze=tuple(settings.freeze), accumulate=settings.accumulate, beta1=settings.beta1,
        beta2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay, clip=settings.clip,
        compute_dtype=settings.compute_dtype, remat=settings.remat, unroll=unroll,
        attention_options=options, track_move=settings.track_move, mesh=mesh, moments_dtype=settings.moments_dtype,
    )  # fmt: skip


def _finished(output: Path, expected: dict[str, str], settings: TrainSettings) -> dict[str, Any] | None:
    """Return the summary of a training that is done, with everything written that is asked for; else None."""
    path = output / "result.json"
    exports = [output / "hf"] + ([output / "importances"] if settings.importances else [])
    if not path.exists() or not all((directory / "config.json").exists() for directory in exports):
        return None
    result = json.loads(path.read_text())
    check_same(result["fingerprint"], expected, settings, output)
    return result if result["fingerprint"]["steps"] == expected["steps"] else None


def _resume(run: Run, state: State, checkpoints: Checkpoints) -> tuple[State, int, int]:
    """Return (state, steps done, real tokens seen) of the newest whole checkpoint; without one, of a new training."""
    latest = checkpoints.latest()
    if latest is None:
        return state, 0, 0
    check_same(checkpoints.meta()["fingerprint"], run.fingerprint, run.settings, checkpoints.directory)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), saved(state))
    restored, meta = checkpoints.restore(abstract)
    run.log(f"resuming at step {latest}")
    return state | restored, latest, meta["tokens"]


def _export(run: Run, state: State) -> None:
    """Write DIR/hf, and DIR/importances if asked for."""
    params = spec.join(state["params"], state["frozen"])
    export_model(run.output / "hf", params, run.settings, run.student)
    if run.settings.importances:
        importances = optimizer.importances(state["moments"], state["frozen"], run.settings.beta2)
        directory = run.output / "importances"
        hf.save_hf(directory, importances, run.student.hf_config, dtype=np.dtype(np.float32))
