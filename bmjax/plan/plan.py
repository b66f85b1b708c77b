"""`bmjax plan`: compiles the real training step for a slice of chips that is not there, and says what it takes.

Nothing is held: parameters are shapes with shardings. Memory and collectives are the compiler's own; times are bounds
from data sheets (each resource alone, at its peak), not promises.
"""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bmjax.branch import train as training
from bmjax.branch.memory import GIB, held, program_bytes
from bmjax.branch.metrics import flops_per_token
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.step import StepPlan, abstract_arguments, make_step
from bmjax.config import UserError, first_line
from bmjax.io import hub
from bmjax.model import spec
from bmjax.model.attention import rows as short_rows
from bmjax.model.attention.dispatch import backend
from bmjax.model.config import ModelConfig
from bmjax.model.published import known
from bmjax.parallel.chips import Chip, topology_devices
from bmjax.parallel.mesh import AXES
from bmjax.plan.hlo import SLICES, Program, totals
from bmjax.weights import hf

KINDS = ("parameters", "optimizer", "gradients", "temporaries")
WHOLE = ("full", "offload")  # remat that computes the forward pass again, attention included
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|for HLO temporaries \(([\d.]+)([KMG])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Plan:
    """What one step takes; per chip where it says so. GiB, seconds, bytes, FLOPs of the whole step on all chips.

    flops_per_step counts what is computed, recomputation included; mfu_bound only what the model needs. Where it does
    not fit there is no program to read: FLOPs are then the model's, and collective_bytes is empty. steps: of the whole
    training; None where they follow from data that is not here.
    """

    fits: bool
    topology: str
    chips: int
    mesh: dict[str, int]
    hbm_gib: float
    gib_per_chip: dict[str, float]
    flops_per_step: float
    collective_bytes: dict[str, float]
    step_seconds_bound: float
    bound_by: str
    tokens_per_second_bound: float
    mfu_bound: float
    usd_per_chip_hour: float
    compile_seconds: float
    change: str | None
    steps: int | None = None

    def to_json(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan as plain values; `overrides` are the changes to the settings that a search made."""
        return dataclasses.asdict(self) | ({"overrides": dict(changes)} if changes else {})


def student_config(student: str) -> ModelConfig:
    """The architecture: of a directory, of a published student by its name, or from the hub."""
    if (Path(student) / "config.json").is_file():
        return ModelConfig.from_dir(student)
    if (found := known(student)) is not None:
        return found
    return ModelConfig.from_dir(hub.model_directory(student))


def plan_training(
    settings: TrainSettings, topology: str, try_meshes: bool = False, log: Callable[[str], None] = lambda line: None
) -> tuple[Plan, dict[str, Any]]:
    """Plan a training from its settings, its number of steps included.

    Arguments:
        settings: of the training; the student's weights are not needed.
        topology: the slice, CHIP:SHAPE, for instance v5p:4x4x4.
        try_meshes: compile several meshes, microbatches and remat, and take the best that fits.
        log: gets a line before the first compilation, and one after each that a search makes.

    Returns:
        The plan, and the changes to the settings that it is made with (empty without `try_meshes`).

    Raises:
        UserError: an unknown topology, or settings that cannot be trained with as they stand.
    """
    config = student_config(settings.student)
    steps = training_steps(settings, config)
    log(f"compiling the training step for {topology} ...")
    if try_meshes:
        best, changes = search(settings, config, topology, log=log)
    else:
        best, changes = plan(settings, config, topology), {}
    return dataclasses.replace(best, steps=steps), changes


def plan(settings: Training, config: ModelConfig, topology: str) -> Plan:
    """Compiles `settings`' step for `topology`; raises UserError for what cannot be trained as it stands."""
    chip, devices = topology_devices(topology)
    return plan_on(settings, config, topology, chip, devices)


def training_steps(settings: TrainSettings, config: ModelConfig) -> int | None:
    """Optimizer steps of the training; None where they are given in epochs of data, or for a student, not here."""
    if settings.steps is not None:
        return settings.steps
    files = [settings.data] if isinstance(settings.data, str) else settings.data
    student = Path(settings.student)
    if not (student.is_dir() and all(Path(file).is_file() for file in files)):
        return None
    if hf.load_tokenizer(student) is None:
        return None
    return training.total_steps(settings, training.load_data(settings, training.open_student(settings)))


def plan_on(settings: Training, config: ModelConfig, topology: str, chip: Chip, devices: Sequence[Any]) -> Plan:
    """As `plan`, for devices at hand or not."""
    began = time.perf_counter()
    step_plan, kinds, lowered = lower_step(settings, config, devices)
    mesh = step_plan.mesh
    compiled: Any = None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _OUT_OF_MEMORY.search(str(error))
        if used is None:
            raise UserError(f"--topology: {topology}: the compiler failed: {first_line(error)}") from error
        if used[1]:
            total = float(used[1]) * _UNITS[used[2]]
        else:  # temporaries alone; gradients are among them
            total = float(used[3]) * _UNITS[used[4]] + kinds["parameters"] + kinds["optimizer"]
    seconds = time.perf_counter() - began
    tokens = settings.batch * settings.seq_len
    needed = tokens * flops_per_token(config, settings.seq_len)
    flops, collectives = needed * (4 / 3 if settings.remat in WHOLE else 1.0), {}
    if compiled is not None:
        program = Program(compiled.as_text())
        total = program_bytes(compiled)
        flops = mesh.size * program.flops() + _kernel_flops(step_plan, settings)
        collectives = dict(totals(program.collectives(mesh)))
    kinds["temporaries"] = max(0.0, total - sum(kinds.values()))
    gib = {kind: round(size / GIB, 3) for kind, size in {**kinds, "total": total}.items()}
    fits = compiled is not None and total <= chip.hbm_gib * GIB
    times = {
        "arithmetic": flops / mesh.size / chip.flops,
        "memory": _least_traffic(step_plan, settings, kinds) / chip.hbm_bandwidth,
        "communication": sum(size for axis, size in collectives.items() if axis != SLICES) / chip.link_bandwidth,
        "communication between slices": collectives.get(SLICES, 0.0) / chip.slice_bandwidth,
    }
    slowest = max(times, key=lambda name: times[name])
    bound = times[slowest]
    return Plan(
        fits=fits, topology=topology, chips=mesh.size, mesh=dict(mesh.shape), hbm_gib=chip.hbm_gib, gib_per_chip=gib,
        flops_per_step=flops, collective_bytes=collectives, step_seconds_bound=bound, bound_by=slowest,
        tokens_per_second_bound=tokens / bound, mfu_bound=needed / mesh.size / bound / chip.flops,
        usd_per_chip_hour=chip.price, compile_seconds=round(seconds, 1),
        change=None if fits else _advice(settings, config, mesh, gib),
    )  # fmt: skip


def lower_step(
    settings: Training, config: ModelConfig, devices: Sequence[Any]
) -> tuple[StepPlan, dict[str, float], jax.stages.Lowered]:
    """(the step's plan, bytes that a chip holds by kind, the step ready to compile) for devices at hand or not."""
    mesh = training.check(settings, config, devices)
    step_plan = dataclasses.replace(training.step_plan(settings, config, mesh), unroll=1)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(step_plan, settings.batch, settings.seq_len)
        return step_plan, held(arguments[0]), make_step(step_plan).lower(*arguments)


def _kernel_flops(step_plan: StepPlan, settings: Training) -> float:
    """FLOPs of attention where the program's text does not show them: in kernels, and in loops of unknown length.

    Two products forward (again where layers are recomputed), five backward, of half the square.
    """
    c = step_plan.config
    q = jax.ShapeDtypeStruct((1, settings.seq_len, c.num_heads, c.head_dim), step_plan.compute_dtype)
    if backend(step_plan.attention_options, q, c.uses_windows) == "xla" and settings.seq_len <= short_rows.LONGEST:
        return 0.0
    products = 7 + (2 if settings.remat in WHOLE else 0)
    square = settings.batch * settings.seq_len**2 / 2
    return 2.0 * products * square * c.num_layers * c.num_heads * c.head_dim


def _least_traffic(step_plan: StepPlan, settings: Training, kinds: dict[str, float]) -> float:
    """Bytes that a chip's memory moves at the least: weights for every microbatch, the state once to and fro."""
    weights = 2.0 * spec.count(step_plan.config) / step_plan.mesh.shape["tensor"]
    passes = 2 if settings.remat == "none" else 3
    return settings.accumulate * passes * weights + 2 * (kinds["parameters"] + kinds["optimizer"])


def _advice(settings: Training, config: ModelConfig, mesh: Any, gib: dict[str, float]) -> str:
    """The setting to change first where it does not fit."""
    state = gib["parameters"] + gib["optimizer"] + gib["gradients"]
    rows = settings.batch // settings.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
    if mesh.shape["data"] > 1:
        return f"mesh: data {mesh.shape['data']} holds the state as often; move its chips to fsdp"
    if settings.remat not in WHOLE:
        return "remat: full, which keeps one activation a layer"
    if gib["temporaries"] > state and rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        return f"accumulate: {settings.accumulate * factor}; a device has {rows} rows at a time"
    if gib["temporaries"] > state and mesh.shape["context"] * 2 <= config.num_kv_heads:
        ways = f"context {mesh.shape['context'] * 2} with half of fsdp, or twice the chips"
        return f"mesh: {ways}, which splits rows"
    if settings.track_move:
        return "track_move: false, one copy of the weights less"
    return f"the number of chips: the share of the state alone is {state:.1f} GiB"


def candidates(settings: TrainSettings, config: ModelConfig, chips: int) -> Iterator[TrainSettings]:
    """Meshes and microbatches worth compiling, the likeliest first: little splitting, few microbatches."""
    found = []
    powers = [2**i for i in range(int(math.log2(chips)) + 1) if chips % 2**i == 0]
    for tensor, context in itertools.product(powers, powers):
        if config.num_heads % (tensor * context) or config.num_kv_heads % tensor or tensor * context > chips:
            continue
        if settings.seq_len % context:
            continue
        fsdp = chips // (tensor * context)
        for accumulate in range(1, settings.batch + 1):
            rows, left = divmod(settings.batch, accumulate)
            if left or rows % fsdp:
                continue
            a_device = rows // fsdp
            cost = (math.log2(tensor * context) + 1, a_device > 1, accumulate)
            mesh = {"fsdp": fsdp, "context": context, "tensor": tensor}
            found.append((cost, {"mesh": mesh, "accumulate": accumulate}))
    for _, changes in sorted(found, key=lambda one: one[0]):
        yield settings.model_copy(update=changes)


def search(
    settings: TrainSettings, config: ModelConfig, topology: str, most: int = 6,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, dict[str, Any]]:  # fmt: skip
    """(the best plan that fits, its overrides) of up to `most` meshes and microbatches, and other remat on the best of
    them; the nearest one where none fits."""
    chip, devices = topology_devices(topology)
    tried: list[tuple[Plan, dict[str, Any]]] = []

    def attempt(one: TrainSettings) -> None:
        overrides = {"mesh": one.mesh, "accumulate": one.accumulate, "remat": one.remat}
        found = plan_on(one, config, topology, chip, devices)
        log(f"{json.dumps(overrides)}: {'fits' if found.fits else 'does not fit'}, "
            f"{found.gib_per_chip['total']:.1f} GiB, {found.step_seconds_bound:.2f} s")  # fmt: skip
        tried.append((found, overrides))

    for one in itertools.islice(candidates(settings, config, len(devices)), most):
        attempt(one)
    if not tried:
        raise UserError(
            f"--search: no mesh of {len(devices)} chips divides batch {settings.batch} and {config.num_heads} heads; "
            "change batch"
        )
    found, overrides = min(tried, key=_merit)
    # The best mesh's spare memory may hold what would be computed again; what lacks a little may go to the host.
    for other in ("save_attention", "minimal") if found.fits else ("full", "offload"):
        if other != settings.remat:
            attempt(settings.model_copy(update={**overrides, "remat": other}))
    return min(tried, key=_merit)


def _merit(one: tuple[Plan, dict[str, Any]]) -> tuple[bool, float]:
    """Smaller is better: one that fits before others, then the faster one, or the nearer one to fitting."""
    found = one[0]
    return not found.fits, found.step_seconds_bound if found.fits else found.gib_per_chip["total"]


def lines(found: Plan, settings: Training) -> Iterator[str]:
    """The report a user reads."""
    mesh = " x ".join(f"{axis} {found.mesh[axis]}" for axis in AXES if found.mesh[axis] > 1) or "one chip"
    rows = f"{settings.batch} rows of {settings.seq_len:,} tokens a step"
    yield f"{found.topology}: {found.chips} chips of {found.hbm_gib:g} GiB; {mesh}; {rows}"
    total = found.gib_per_chip["total"]
    yield f"{'fits' if found.fits else 'DOES NOT FIT'}: {total:.2f} GiB a chip, {total / found.hbm_gib:.0%}"
    for kind in KINDS:
        yield f"  {kind:<12} {found.gib_per_chip[kind]:8.2f} GiB"
    if found.change:
        yield f"change {found.change}"
    if not found.fits:
        return
    yield f"a step: {found.flops_per_step:.3g} FLOPs, recomputation included; a chip sends"
    for axis, size in sorted(found.collective_bytes.items(), key=lambda pair: -pair[1]):
        yield f"  {axis:<20} {size / 1e9:10.2f} GB"
    yield (
        f"at the least {found.step_seconds_bound:.2f} s a step ({found.bound_by}): at most "
        f"{found.tokens_per_second_bound:,.0f} tokens/s, MFU {found.mfu_bound:.0%}"
    )
    steps = found.steps or 1000
    hours = steps * found.chips * found.step_seconds_bound / 3600
    cost = f"US$ {hours * found.usd_per_chip_hour:,.0f} at US$ {found.usd_per_chip_hour:.2f} a chip-hour"
    epochs = f" ({settings.epochs:g} epochs)" if found.steps and settings.epochs else ""
    yield f"{steps:,} steps{epochs}: at least {hours:,.0f} chip-hours, {cost}"
    yield f"compiled in {found.compile_seconds:.0f} s"
