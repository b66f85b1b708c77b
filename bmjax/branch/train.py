"""Train one branch: a student, a dataset, AdamW, checkpoints, and a Hugging Face directory at the end."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch import examples, fingerprint, optimizer
from bmjax.branch.loader import Loader
from bmjax.branch.loop import Progress, loop, saved
from bmjax.branch.metrics import Log, check_wandb, write_line
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.step import StepPlan, all_params, init_state
from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.io.rows import read_rows
from bmjax.model import spec
from bmjax.model.attention import cudnn
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.config import ModelConfig
from bmjax.parallel import processes
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.checkpoint import Checkpoints
from bmjax.weights.student import Student

UNROLL_UP_TO = 8  # layers: below this a CPU gains from unrolling the scan, and the program stays small


def _unroll(config: ModelConfig) -> int:
    return config.num_layers if jax.default_backend() == "cpu" and config.num_layers <= UNROLL_UP_TO else 1


def step_plan(settings: Training, config: ModelConfig, mesh: Mesh, documents: int = 0) -> StepPlan:
    """What the compiled step depends on. documents: the most of a row, 0 where it is not known (`AttentionOptions`)."""
    platform = mesh.devices.flat[0].platform
    needed = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}.get(settings.attention, platform)
    if platform != needed:
        raise UserError(
            f"attention: {settings.attention} runs on {needed.upper()}s, and there are none; use auto or xla"
        )
    if settings.attention == "cudnn" and not cudnn.runs_here():
        raise UserError(
            "attention: cudnn's packed rows need a Hopper or Blackwell GPU (H100, H200, B200); use auto or xla"
        )
    if platform != "gpu":
        documents = 0  # what does not matter must not make another program
    return StepPlan(
        config=config, freeze=tuple(settings.freeze), accumulate=settings.accumulate, beta1=settings.beta1,
        beta2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay, clip=settings.clip,
        compute_dtype=settings.compute_dtype, remat=settings.remat, unroll=_unroll(config),
        attention_options=AttentionOptions(
            settings.attention, settings.context_parallel, platform, documents=documents
        ),
        track_move=settings.track_move, mesh=mesh, moments_dtype=settings.moments_dtype,
    )  # fmt: skip


def total_steps(settings: TrainSettings, loader: Loader) -> int:
    """Optimizer steps of the whole training."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold exactly one of the two
    return max(1, math.ceil(settings.epochs * loader.steps_per_epoch))


def train(settings: TrainSettings, log: Log = write_line) -> dict[str, Any]:
    """Run or resume the training that `settings` describe; returns a summary, also written to DIR/result.json.

    Keys of the summary: hf (path), steps, tokens (real tokens seen), loss (of the last step), move.
    A finished run returns its summary at once. Where several processes train, each makes this call.
    Raises UserError for inputs that do not fit; SystemExit after SIGTERM, with a checkpoint written.
    """
    with processes.together(settings.coordinator, settings.num_processes, settings.process_id, settings.peer_timeout):
        return _train(settings, log if processes.is_main() else lambda line: None)


def open_student(settings: TrainSettings) -> Student:
    """Open the student of a training, with the chat template that it is trained with."""
    return students.open(settings.student, template=settings.template, purpose="training")


def load_data(settings: TrainSettings, student: Student) -> Loader:
    """Read and tokenize the rows of a training; UserError for what cannot be trained on."""
    assert student.template is not None  # the student was opened for training
    rows = read_rows(settings.data)
    dataset = examples.build_dataset(rows, student.tokenizer, student.template, settings.seq_len, settings.overlong)
    examples.check_vocabulary(dataset, student.config.vocab_size, student.directory)
    return Loader(dataset, settings.seq_len, settings.batch, settings.packing, settings.shuffle, settings.seed)


def _train(settings: TrainSettings, log: Log) -> dict[str, Any]:
    output = Path(settings.output)
    student = open_student(settings)
    config = student.config
    mesh = check(settings, config)
    loader = load_data(settings, student)
    dataset = loader.dataset
    steps = total_steps(settings, loader)
    expected = fingerprint.fingerprint(settings, student.directory, dataset.digest) | {"steps": str(steps)}
    own = settings.model_dump(exclude={"process_id", "student", "data"})
    processes.check_agreement({key: str(value) for key, value in own.items()} | expected)
    finished = _finished(output, expected, settings.importances) if processes.is_main() else None
    if processes.mains(finished is not None):
        finished = finished or json.loads((output / "result.json").read_text())
        log(f"{output}: already trained, {finished['steps']} steps")
        return finished

    overlong = (
        f", {dataset.truncated} truncated, {dataset.dropped} dropped" if dataset.truncated + dataset.dropped else ""
    )
    log(
        f"{output.name}: {len(dataset.examples)} documents, {dataset.tokens:,} tokens in {len(loader.rows)} rows of "
        f"{loader.length} ({loader.fill:.1%} filled){overlong}; {spec.count(config):,} parameters, {steps} steps"
    )
    plan = step_plan(settings, config, mesh, loader.documents)
    with jax.set_mesh(mesh):
        state = init_state(plan, hf.load_params(student.directory, config, mesh, dtype=np.float32))
        checkpoints = Checkpoints(output / "checkpoints", settings.keep, settings.save_every, settings.keep_every)
        try:
            state, begin = _resume(checkpoints, state, expected, log)
            state, summary = loop(plan, settings, loader, state, begin, steps, checkpoints, expected, log)
        finally:
            checkpoints.close()
        _export(output, settings, student, state)
        if settings.importances:
            found = optimizer.importances(state["moments"], state["frozen"], settings.beta2)
            hf.save_hf(output / "importances", found, student.hf_config, dtype=np.dtype(np.float32))
    result = {"hf": str(output / "hf"), "steps": steps, "fingerprint": expected, **summary}
    if processes.is_main():
        write_atomic(output / "result.json", json.dumps(result, indent=1))
    log(f"{output / 'hf'}: written, loss {summary['loss']:.4f} after {steps} steps and {summary['tokens']:,} tokens")
    return result


def check(settings: Training, config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a training over all `devices` (default: those at hand, of one process perhaps fewer), once everything
    that can be known before it begins is found right; else UserError."""
    check_wandb(settings.wandb)
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
    _check_divides(settings, config, mesh)
    optimizer.split_frozen(spec.table(config), settings.freeze)
    return mesh


def _check_divides(settings: Training, config: ModelConfig, mesh: Mesh) -> None:
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


def _finished(output: Path, expected: dict[str, str], importances: bool) -> dict[str, Any] | None:
    path = output / "result.json"
    if not path.exists() or not (output / "hf" / "config.json").exists():
        return None
    if importances and not (output / "importances" / "config.json").exists():
        return None
    result = json.loads(path.read_text())
    fingerprint.check_same(result["fingerprint"], expected, output)
    return result


def _resume(
    checkpoints: Checkpoints, state: dict[str, Any], expected: dict[str, str], log: Log
) -> tuple[dict[str, Any], Progress]:
    """(state, where it is) from the newest whole checkpoint, or the state given."""
    latest = checkpoints.latest()
    if latest is None:
        return state, Progress()
    fingerprint.check_same(checkpoints.meta(latest)["fingerprint"], expected, checkpoints.directory)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), saved(state))
    restored, meta = checkpoints.restore(latest, abstract)
    log(f"resuming at step {latest}")
    return state | restored, Progress(latest, meta["tokens"])


def _export(output: Path, settings: TrainSettings, student: Student, state: dict[str, Any]) -> None:
    """Write DIR/hf: the weights as the student stores them or in export_dtype, with its tokenizer and config."""
    dtype = np.dtype(settings.export_dtype) if settings.export_dtype else hf.stored_dtype(student.directory)
    tokenizer = None
    if settings.template is not None:
        # The template is part of the branch: it is served with the one that it was trained with.
        tokenizer = student.tokenizer
        tokenizer.chat_template = student.template
    new_end_tokens = student.end_tokens if student.end_tokens != student.stored_end_tokens else None
    hf.save_hf(
        output / "hf", all_params(state), student.hf_config, side_files=student.directory, tokenizer=tokenizer,
        dtype=dtype, eos=new_end_tokens,
    )  # fmt: skip
