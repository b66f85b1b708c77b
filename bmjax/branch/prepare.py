"""What a training needs before its first step: a mesh that fits, tokenized rows, the number of steps, the step's plan.

`train`, its --check, the choice of what a config leaves out, `bmjax plan` and the pipeline share it. No weights are
read here.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bmjax.branch import cache, examples, optimizer
from bmjax.branch.examples import Dataset, Encoding
from bmjax.branch.loader import Loader
from bmjax.branch.settings import ChosenTraining, Training, TrainSettings
from bmjax.branch.step import StepPlan
from bmjax.branch.trackers import check_installed
from bmjax.config import UserError
from bmjax.log import Log, silent
from bmjax.model import spec
from bmjax.model.attention.dispatch import check_backend
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh
from bmjax.weights.student import Student

UNROLL_UP_TO = 8  # layers: below this a CPU gains from unrolling the scan, and the program stays small


def check(settings: Training, config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a training; UserError, naming the key to change, for one that cannot run.

    It reads no data and no weights, and passes over keys that are still to be chosen. devices: those to train on, all
    of them; None: those at hand, of which one process may leave some unused.
    """
    check_installed(settings)
    if settings.seq_len is not None and settings.seq_len > config.max_length:
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
    accumulate = settings.accumulate or 1
    if settings.batch is not None and settings.batch // accumulate % ways:
        raise UserError(
            f"batch: {settings.batch} rows / accumulate {accumulate} = {settings.batch // accumulate} a microbatch, "
            f"not a multiple of mesh data x fsdp = {ways}; change batch, accumulate or mesh"
        )
    heads = mesh.shape["tensor"] * (mesh.shape["context"] if settings.context_parallel == "ulysses" else 1)
    if config.num_heads % heads:
        raise UserError(
            f"mesh: the student's {config.num_heads} attention heads cannot be shared by {heads} devices along "
            f"{'tensor x context' if heads != mesh.shape['tensor'] else 'tensor'}; change mesh"
        )
    if settings.packing and (settings.seq_len or 0) % mesh.shape["context"]:
        raise UserError(f"seq_len: {settings.seq_len} is not a multiple of mesh context = {mesh.shape['context']}")
    optimizer.split_frozen(spec.table(config), settings.freeze)
    return mesh


def load_dataset(settings: TrainSettings, student: Student, seq_len: int, log: Log = silent) -> Dataset:
    """Read and tokenize a training's rows, at most `seq_len` tokens each; UserError for what cannot be trained on."""
    assert student.template is not None  # the student was opened for training
    encoding = Encoding(
        student.tokenizer, student.template, seq_len, settings.overlong, settings.turns, settings.ignore,
        student.end_tokens,
    )  # fmt: skip
    dataset = cache.load(settings.data, settings.columns, encoding, log)
    examples.check_vocabulary(dataset, student.config.vocab_size, student.directory)
    return dataset


def load_data(settings: ChosenTraining, student: Student, log: Log = silent) -> Loader:
    """Read, tokenize and pack the rows of a training whose sizes are known."""
    dataset = load_dataset(settings, student, settings.seq_len, log)
    return make_loader(settings, dataset, settings.seq_len, settings.batch)


def make_loader(settings: Training, dataset: Dataset, seq_len: int, batch: int) -> Loader:
    """Pack the documents of a training into rows of `seq_len` tokens, `batch` rows a step."""
    return Loader(dataset, seq_len, batch, settings.packing, settings.shuffle, settings.seed)


def total_steps(settings: Training, loader: Loader) -> int:
    """Return the optimizer steps of the whole training."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold exactly one of the two
    return max(1, math.ceil(settings.epochs * loader.steps_per_epoch))


def last_step(settings: TrainSettings, steps: int) -> int:
    """Return the step after which a training of `steps` steps ends, see `until`."""
    if settings.until is None:
        return steps
    if settings.until > steps or (settings.until >= 1 and settings.until % 1):
        raise UserError(f"until: {settings.until:g}: expected a share below 1, or a whole number up to {steps} steps")
    return int(settings.until) if settings.until >= 1 else max(1, round(settings.until * steps))


def step_plan(settings: ChosenTraining, config: ModelConfig, mesh: Mesh, documents: int = 0) -> StepPlan:
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
