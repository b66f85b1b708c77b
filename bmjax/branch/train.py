"""Train one branch: a student, a dataset, AdamW, checkpoints, and a Hugging Face directory at the end."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch import examples, optimizer
from bmjax.branch.loader import Loader
from bmjax.branch.metrics import Log, MetricsLog, check_wandb, write_line
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.step import StepPlan, all_params, init_state, make_step, place_batch
from bmjax.config import UserError
from bmjax.model import spec
from bmjax.model.how import How
from bmjax.model.spec import Qwen2Config, read_hf_config
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from bmjax.weights.checkpoint import Checkpoints
from bmjax.weights.safetensors import write_atomic

UNROLL_UP_TO = 8  # layers: below this a CPU gains from unrolling the scan, and the program stays small


def _unroll(config: Qwen2Config) -> int:
    return config.num_layers if jax.default_backend() == "cpu" and config.num_layers <= UNROLL_UP_TO else 1


def step_plan(settings: Training, config: Qwen2Config, mesh: Mesh) -> StepPlan:
    """What the compiled step depends on."""
    platform = mesh.devices.flat[0].platform
    if settings.attention == "splash" and platform != "tpu":
        raise UserError("attention: splash runs on TPUs, and there are none; use auto or xla")
    return StepPlan(
        config=config, freeze=tuple(settings.freeze), accumulate=settings.accumulate, beta1=settings.beta1,
        beta2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay, clip=settings.clip,
        compute_dtype=settings.compute_dtype, remat=settings.remat, unroll=_unroll(config),
        how=How(settings.attention, settings.context_parallel, platform), track_move=settings.track_move, mesh=mesh,
    )  # fmt: skip


def _total_steps(settings: TrainSettings, loader: Loader) -> int:
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold exactly one of the two
    return max(1, math.ceil(settings.epochs * loader.steps_per_epoch))


def _fingerprint(settings: TrainSettings, student: Path, digest: str) -> dict[str, str]:
    """What a checkpoint must share with the run that resumes from it, by the key to blame."""
    ignored = {
        "output",
        "student",
        "data",
        "save_every",
        "keep",
        "log_every",
        "wandb",
        "mesh",
        "export_dtype",
        "remat",
        "attention",
        "context_parallel",
        "importances",
    }
    keys = {key: str(value) for key, value in settings.model_dump().items() if key not in ignored}
    return {**keys, "data": digest, "student": _student_digest(student)}


def _student_digest(student: Path) -> str:
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


def _check_same(found: dict[str, str], expected: dict[str, str], directory: Path) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            detail = "its contents differ" if key in ("data", "student") else f"it had {found.get(key)}, now {value}"
            raise UserError(
                f"{directory}: the checkpoint belongs to another run: {key}: {detail}; "
                "use another output, or delete the checkpoints to start anew"
            )


def train(settings: TrainSettings, log: Log = write_line) -> dict[str, Any]:
    """Run or resume the training that `settings` describe; returns a summary, also written to DIR/result.json.

    Keys of the summary: hf (path), steps, tokens (real tokens seen), loss (of the last step), move.
    A finished run returns its summary at once.
    """
    output = Path(settings.output)
    student = hf.resolve_model(settings.student)
    config = Qwen2Config.from_dir(student)
    mesh = check(settings, config)
    tokenizer = hf.load_tokenizer(student)
    if tokenizer is None:
        raise UserError(f"{student}: no tokenizer files (tokenizer.json or vocab.json); training needs a tokenizer")
    template = examples.chat_template(tokenizer, settings.template)
    dataset = examples.build_dataset(
        examples.read_rows(settings.data), tokenizer, template, settings.seq_len, settings.overlong
    )
    examples.check_vocabulary(dataset, config.vocab_size, student)
    loader = Loader(dataset, settings.seq_len, settings.batch, settings.packing, settings.shuffle, settings.seed)
    steps = _total_steps(settings, loader)
    expected = _fingerprint(settings, student, dataset.digest) | {"steps": str(steps)}
    finished = _finished(output, expected, settings.importances)
    if finished:
        log(f"{output}: already trained, {finished['steps']} steps")
        return finished

    overlong = (
        f", {dataset.truncated} truncated, {dataset.dropped} dropped" if dataset.truncated + dataset.dropped else ""
    )
    log(
        f"{output.name}: {len(dataset.examples)} documents, {dataset.tokens:,} tokens in {len(loader.rows)} rows of "
        f"{loader.length} ({loader.fill:.1%} filled){overlong}; {spec.count(config):,} parameters, {steps} steps"
    )
    plan = step_plan(settings, config, mesh)
    with jax.set_mesh(mesh):
        state = init_state(plan, hf.load_params(student, config, mesh, dtype=np.float32))
        checkpoints = Checkpoints(output / "checkpoints", keep=settings.keep, every=settings.save_every)
        try:
            state, start, seen = _resume(checkpoints, state, expected, log)
            state, summary = _loop(plan, settings, loader, state, start, steps, seen, checkpoints, expected, log)
        finally:
            checkpoints.close()
        dtype = np.dtype(settings.export_dtype) if settings.export_dtype else None
        eos = _end_tokens(student, config, tokenizer, template)
        _export(output, student, state, dtype, template if settings.template else None, eos)
        if settings.importances:
            found = optimizer.importances(state["moments"], state["frozen"], settings.beta2)
            hf.save_hf(output / "importances", found, read_hf_config(student), dtype=np.dtype(np.float32))
    result = {"hf": str(output / "hf"), "steps": steps, "fingerprint": expected, **summary}
    write_atomic(output / "result.json", json.dumps(result, indent=1))
    log(f"{output / 'hf'}: written, loss {summary['loss']:.4f} after {steps} steps and {summary['tokens']:,} tokens")
    return result


def check(settings: Training, config: Qwen2Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a training over `devices` (default: those at hand), once everything that can be known before it
    begins is found right; else UserError."""
    check_wandb(settings.wandb)
    if settings.seq_len > config.max_length:
        raise UserError(
            f"seq_len: {settings.seq_len} is more than the student's context of {config.max_length} tokens; lower it"
        )
    mesh = make_mesh(settings.mesh, devices)
    _check_divides(settings, config, mesh)
    optimizer.split_frozen(spec.table(config), settings.freeze)
    return mesh


def _check_divides(settings: Training, config: Qwen2Config, mesh: Mesh) -> None:
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
    _check_same(result["fingerprint"], expected, output)
    return result


def _resume(
    checkpoints: Checkpoints, state: dict[str, Any], expected: dict[str, str], log: Log
) -> tuple[dict[str, Any], int, int]:
    """(state, steps done, tokens seen) from the newest whole checkpoint, or the state given."""
    latest = checkpoints.latest()
    if latest is None:
        return state, 0, 0
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _saved(state))
    restored, meta = checkpoints.restore(latest, abstract)
    _check_same(meta["fingerprint"], expected, checkpoints.directory)
    log(f"resuming at step {latest}")
    return state | restored, latest, meta["tokens"]


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint needs: the frozen parameters and the start come from the student again."""
    return {"params": state["params"], "moments": state["moments"]}


def _loop(
    plan: StepPlan, settings: TrainSettings, loader: Loader, state: dict[str, Any], start: int, steps: int, seen: int,
    checkpoints: Checkpoints, fingerprint: dict[str, str], log: Log,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    output = Path(settings.output)
    step_function = make_step(plan)
    metrics_log = MetricsLog(
        output / "metrics.jsonl", output.name, plan.config, loader.length, start, steps, loader.steps_per_epoch,
        plan.mesh.size, log, settings.log_every, settings.wandb, settings.model_dump(),
    )  # fmt: skip
    values: dict[str, float] = {}
    pending: tuple[Any, ...] | None = None

    def settle() -> dict[str, float]:
        """Wait for the step before this one: the device computes while the next batch is laid out."""
        assert pending is not None
        number, rate, tokens, metrics = pending
        numbers = {key: float(value) for key, value in metrics.items()}
        bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(numbers[key])), None)
        if bad:
            raise UserError(
                f"step {number}: the {bad} is {numbers[bad]}; stopped, the checkpoints before it are kept in "
                f"{output / 'checkpoints'}; lower learning_rate or look at the data"
            )
        metrics_log.step(number, rate, tokens, numbers)
        return numbers

    try:
        for step in range(start, steps):
            batch = loader.at(step)
            rate = optimizer.learning_rate(step, steps, settings.learning_rate, settings.schedule, settings.warmup)
            arrays = place_batch(plan.mesh, batch.tokens, batch.segment_ids, batch.loss_mask)
            state, metrics = step_function(state, *arrays, np.float32(rate))
            if pending:
                values = settle()
            pending = (step + 1, rate, batch.real_tokens, metrics)
            seen += batch.real_tokens
            if checkpoints.due(step + 1, last=steps):
                values = settle()
                pending = None
                checkpoints.save(
                    step + 1, _saved(state), {"fingerprint": fingerprint, "tokens": seen, "values": values}
                )
    finally:
        metrics_log.close()
    if not values:  # resumed after the last step: nothing was left to do but the export
        values = checkpoints.meta(None)["values"]
    return state, {"tokens": seen, "loss": values["loss"], "move": values.get("move")}


def _end_tokens(student: Path, config: Qwen2Config, tokenizer: Any, template: str) -> list[int] | None:
    """The end tokens with the one that ends a turn of `template`; None where the student names it already."""
    known = list(hf.end_tokens(student, config, tokenizer))
    end = examples.end_of_turn(tokenizer, template)
    return None if end is None or end in known else [*known, end]


def _export(
    output: Path, student: Path, state: dict[str, Any], dtype: Any, template: str | None, eos: list[int] | None
) -> None:
    """DIR/hf: the weights in `dtype` (or as the student stores them), with the student's tokenizer and config."""
    hf_config = read_hf_config(student)
    if dtype is None:
        dtype = hf.stored_dtype(student)
    tokenizer = None
    if template is not None:
        tokenizer = hf.load_tokenizer(student)
        tokenizer.chat_template = template  # the template is part of the branch: serve with what it was trained on
    hf.save_hf(
        output / "hf", all_params(state), hf_config, side_files=student, tokenizer=tokenizer, dtype=dtype, eos=eos
    )
