"""Chooses what a training's config leaves out: row length, batch, learning rate, warm-up, precision, microbatches.

`train` and `bmjax run` come here. The choice follows from the student, the data and the devices. Every checkpoint holds
it, in the fingerprint and the settings, so a training that goes on takes the values that it began with.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bmjax.branch.continuing import Predecessor
from bmjax.branch.export import checkpoint_of
from bmjax.branch.loader import Loader
from bmjax.branch.optimizer import warmup_steps
from bmjax.branch.prepare import load_dataset, make_loader, step_plan, total_steps
from bmjax.branch.settings import ChosenTraining, TrainSettings
from bmjax.branch.step import abstract_state, compile_step, program_bytes, size_text, state_bytes
from bmjax.errors import UserError
from bmjax.io import bucket
from bmjax.log import Log, silent
from bmjax.model import spec
from bmjax.parallel import processes
from bmjax.parallel.chips import gpu_capability
from bmjax.parallel.memory import usable_memory
from bmjax.weights.checkpoint import meta_of
from bmjax.weights.student import Student

SIZES = {"seq_len": int, "batch": int}
KEYS: Mapping[str, Any] = {**SIZES, "learning_rate": float, "warmup": float, "compute_dtype": str}
LENGTH_MULTIPLE = 128  # tokens: the tiles of attention's kernels
SHORTEST = 512  # tokens: rows are not made shorter than this to fit into memory
DOCUMENTS = 32  # a step: as LIMA's fine-tuning has them (arXiv 2305.11206)
LEAST_STEPS = 100  # of a training whose length is given in epochs, where the rows allow it
FEW_STEPS = 30  # below this a student learns little, and a warm-up is too dear
MOST_WARMUP = 100  # steps


@dataclass(frozen=True)
class Choice:
    """A value that the config left out, and why it is what it is."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Chosen:
    """A training with nothing left to choose; its accumulate is 1 until `fit_memory` has seen the compiled step."""

    settings: ChosenTraining
    loader: Loader
    choices: tuple[Choice, ...]

    def lines(self) -> list[str]:
        """Return one block for the log: every chosen value and why."""
        if not self.choices:
            return []
        width = max(len(f"{choice.key}: {choice.value}") for choice in self.choices)
        lines = [f"  {f'{choice.key}: {choice.value}':<{width}}  {choice.reason}" for choice in self.choices]
        return ["chosen, because the config leaves them out:", *lines]


def choose(
    settings: TrainSettings, student: Student, mesh: Mesh, earlier: Predecessor | None = None, log: Log = silent
) -> Chosen:
    """Tokenize the data of a training and choose what its settings leave out, all but the microbatches.

    earlier: the training that it goes on from, whose values it takes.
    """
    choices = []
    for key, value, source in _stored(settings, earlier):
        choices.append(Choice(key, value, f"as in {source}"))
    settings = settings.model_copy(update={choice.key: choice.value for choice in choices})
    if settings.compute_dtype is None:
        choices.append(compute_dtype(mesh.devices.flat[0]))
        settings = settings.model_copy(update={"compute_dtype": choices[-1].value})
    sizes, (loader,) = choose_sizes([(settings, student)], mesh, log)
    settings = settings.model_copy(update={choice.key: choice.value for choice in sizes})
    steps = total_steps(settings, loader)
    rates = [learning_rate(spec.count(student.config))] if settings.learning_rate is None else []
    rates += [warmup(steps)] if settings.warmup is None else []
    choices = [*sizes, *rates, *choices]
    values = {choice.key: choice.value for choice in choices} | {"accumulate": settings.accumulate or 1}
    order = list(KEYS)
    choices.sort(key=lambda choice: order.index(choice.key))
    return Chosen(ChosenTraining.model_validate(settings.model_dump() | values), loader, tuple(choices))


def _stored(settings: TrainSettings, earlier: Predecessor | None) -> list[tuple[str, Any, str]]:
    """Return (key, value, where it stands) of the keys left out that a training took before."""
    missing = [key for key in KEYS if getattr(settings, key) is None]
    if not missing:
        return []
    checkpoint, result = checkpoint_of(settings.output), Path(settings.output) / "result.json"
    if checkpoint is not None:
        meta, source = meta_of(checkpoint), str(checkpoint)
    elif bucket.exists(result):
        meta, source = json.loads(bucket.local(result).read_text()), bucket.join(result)
    elif earlier is not None:
        meta, source = dict(earlier.meta), str(earlier.checkpoint)
    else:
        return []
    # Settings without the key are an earlier version's, whose default was bfloat16.
    values = {"compute_dtype": "bfloat16"} | meta.get("settings", {}) | meta["fingerprint"]
    return [(key, KEYS[key](values[key]), source) for key in missing]


def compute_dtype(device: Any) -> Choice:
    """Choose the type of activations and products by the device."""
    capability = gpu_capability(device)
    if device.platform == "cpu":
        return Choice("compute_dtype", "float32", "a CPU computes it faster than bfloat16")
    if device.platform == "gpu" and capability is not None and capability < (8, 0):
        return Choice("compute_dtype", "float32", f"{device.device_kind} has no fast bfloat16")
    return Choice("compute_dtype", "bfloat16", f"{device.device_kind} computes it fastest; weights stay float32")


def learning_rate(parameters: int) -> Choice:
    """Choose the peak rate: 1e-5 from 7 billion parameters on, above it by the root of how many fewer there are.

    The paper trains 32 billion parameters at 1e-5. Adam's rate for a matrix goes with 1 / width (muP, arXiv 2203.03466,
    table 3), and parameters with the square of the width.
    """
    rate = min(1e-3, 1e-5 * max(1.0, math.sqrt(7e9 / parameters)))
    return Choice("learning_rate", float(f"{rate:.1e}"), f"for {parameters:,} parameters: 1e-5 * sqrt(7e9 / them)")


def warmup(steps: int) -> Choice:
    """Choose the warm-up in steps, so that a longer training may have the same: a tenth, as the paper's."""
    if steps < FEW_STEPS:
        return Choice("warmup", 0, f"{steps} steps are too few for one, whose first step has rate 0")
    count = min(MOST_WARMUP, warmup_steps(steps, 0.1))
    return Choice("warmup", count, f"a tenth of {steps:,} steps, at most {MOST_WARMUP}")


def choose_sizes(
    branches: Sequence[tuple[TrainSettings, Student]], mesh: Mesh, log: Log = silent
) -> tuple[list[Choice], list[Loader]]:
    """Choose seq_len and batch where trainings leave them out, the same for all: the longest row, the smallest batch.

    The branches of a run share them, so that the mixture's steps see as many tokens as theirs. Returns the choices, and
    each training's loader.

    Arguments:
        branches: the trainings, which have a compute_dtype, and each one's student; all of one architecture.
        mesh: that of the first training.
    """
    trainings, student = [training for training, _ in branches], branches[0][1]
    limit = student.config.max_length // mesh.shape["context"] * mesh.shape["context"]
    datasets = [load_dataset(t, its, t.seq_len or limit, log) for t, its in branches]
    choices: dict[str, Choice] = {}
    longest = max(
        (len(e.tokens) for t, d in zip(trainings, datasets, strict=True) if not t.seq_len for e in d.examples),
        default=0,
    )
    if longest:
        multiple = math.lcm(LENGTH_MULTIPLE, mesh.shape["context"])
        length = min(limit, -(-longest // multiple) * multiple)
        cut = sum(d.truncated + d.dropped for t, d in zip(trainings, datasets, strict=True) if not t.seq_len)
        reason = (
            f"the student's context; {cut} documents are longer"
            if cut
            else f"the longest document has {longest} tokens"
        )
        choices["seq_len"] = Choice("seq_len", length, reason)
    while True:
        length = choices["seq_len"].value if longest else 0
        loaders = [
            make_loader(t, d, t.seq_len or length, t.batch or 1) for t, d in zip(trainings, datasets, strict=True)
        ]
        batches = [_batch(t, loader, mesh) for t, loader in zip(trainings, loaders, strict=True) if not t.batch]
        if batches:
            choices["batch"] = min(batches, key=lambda choice: choice.value)
            loaders = [loader.with_batch(t.batch or choices["batch"].value)
                       for t, loader in zip(trainings, loaders, strict=True)]  # fmt: skip
        if not longest or length <= SHORTEST:
            break
        # Rows that do not fit are made shorter, and what is longer is cut as overlong says.
        number = next(i for i, t in enumerate(trainings) if not t.seq_len)
        values = {"seq_len": length, "batch": loaders[number].batch, "learning_rate": 0.0, "warmup": 0.0}
        values["accumulate"] = trainings[number].accumulate or 1
        training = ChosenTraining.model_validate(trainings[number].model_dump() | values)
        fit = Fit.of(training, trainings[number].accumulate is None, student, mesh, loaders[number])
        if fit.fits or fit.state > fit.limit:
            break
        shorter = max(-(-SHORTEST // multiple) * multiple, length // 2 // multiple * multiple)
        reason = f"the longest document has {longest} tokens; a step of {length} does not fit: {fit.text}"
        choices["seq_len"] = Choice("seq_len", shorter, reason)
        datasets = [d if t.seq_len else load_dataset(t, its, shorter, log)
                    for (t, its), d in zip(branches, datasets, strict=True)]  # fmt: skip
    return list(choices.values()), loaders


def _batch(settings: TrainSettings, loader: Loader, mesh: Mesh) -> Choice:
    """Choose the rows of a step: a power of two that the mesh divides."""
    rows, documents = len(loader.rows), len(loader.dataset.examples)
    most, reason = rows, f"there are {rows} rows"
    if (enough := max(1, round(DOCUMENTS * rows / documents))) < most:
        most, reason = enough, f"at most {DOCUMENTS} documents a step, of which a row has {documents / rows:.1f}"
    if settings.epochs and (enough := int(rows * settings.epochs / LEAST_STEPS)) < most:
        most, reason = enough, f"so that {settings.epochs:g} epochs of {rows} rows make many steps"
    batch = 1 << (max(1, most).bit_length() - 1)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * (settings.accumulate or 1)
    if batch % unit:
        batch, reason = -(-batch // unit) * unit, f"a row for each of {mesh.size} devices"
    return Choice("batch", batch, reason)


@dataclass(frozen=True)
class Fit:
    """Whether a step fits into a device's memory, and in how many microbatches; sizes in bytes on one device."""

    accumulate: int
    total: float  # by the compiler's account
    state: float  # of it: parameters and optimizer
    limit: int

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def text(self) -> str:
        takes = "more than the compiler can lay out" if math.isinf(self.total) else size_text(self.total)
        return f"a step takes {takes} of {size_text(self.limit)} a device"

    @classmethod
    def of(cls, settings: ChosenTraining, may_split: bool, student: Student, mesh: Mesh, loader: Loader) -> "Fit":
        """Compile the step with as few microbatches as fit; with the most there can be where none do.

        may_split: whether the number of microbatches is to be chosen. The programs are kept for the training.
        """
        limit = processes.mains_number(usable_memory(mesh.local_devices[0]) // 2**20) * 2**20
        rows = loader.batch // (mesh.shape["data"] * mesh.shape["fsdp"])
        counts = [n for n in range(1, rows + 1) if rows % n == 0] if may_split else [settings.accumulate]
        state, total, tried = 0.0, 0.0, 0
        for count in counts:
            # What is not state shrinks with the microbatch: pass over those that cannot be small enough.
            guess = state + (total - state) * tried / count
            if tried and not math.isinf(total) and guess > limit and count != counts[-1]:
                continue
            plan = step_plan(settings.model_copy(update={"accumulate": count}), student.config, mesh, loader.documents)
            kinds = state_bytes(abstract_state(plan))
            state = kinds["parameters"] + kinds["optimizer"]
            try:
                total = program_bytes(compile_step(plan, loader.batch, loader.length))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                total = math.inf
            tried = count
            if total <= limit or state > limit:
                break
        return cls(tried, total, state, limit)


def fit_memory(chosen: Chosen, given: TrainSettings, student: Student, mesh: Mesh) -> tuple[Chosen, Fit]:
    """Choose the microbatches of a training, where `given` leaves them out, by the compiled step's memory."""
    settings = chosen.settings
    fit = Fit.of(settings, given.accumulate is None, student, mesh, chosen.loader)
    if given.accumulate is not None:
        return chosen, fit
    choice = Choice("accumulate", fit.accumulate, fit.text)
    settings = settings.model_copy(update={"accumulate": fit.accumulate})
    choices = list(chosen.choices)
    # The microbatches are no news where nothing else was chosen and one is enough.
    if choices or fit.accumulate > 1:
        choices.insert(sum(other.key in SIZES for other in choices), choice)
    return Chosen(settings, chosen.loader, tuple(choices)), fit


def without_data(settings: TrainSettings, purpose: str) -> ChosenTraining:
    """Return settings whose sizes are given, with what else is left out as an accelerator has it.

    For `bmjax plan`, which compiles a step and reads no data. Raises UserError, naming the key, for sizes left out.
    """
    for key in SIZES:
        if getattr(settings, key) is None:
            raise UserError(f"{key}: give it for {purpose}, which reads no data to choose it by")
    filled = {"accumulate": 1, "learning_rate": 1e-5, "warmup": 0.0, "compute_dtype": "bfloat16"}
    values = settings.model_dump()
    return ChosenTraining.model_validate(values | {k: v for k, v in filled.items() if values[k] is None})
