"""`bmjax plan`: compile the real training step for chips that are not there, and say what it takes.

No memory is taken: parameters are shapes with shardings. Memory and collectives are the compiler's own numbers. Times
are bounds from data sheets (each resource alone, at its peak), not promises.
"""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from bmjax.branch import prepare
from bmjax.branch.choose import without_data
from bmjax.branch.export import open_student
from bmjax.branch.remarks import data_line
from bmjax.branch.settings import ChosenTraining, TrainSettings
from bmjax.branch.step import GIB, StepPlan, abstract_arguments, flops_per_token, make_step, program_bytes, state_bytes
from bmjax.config import UserError, first_line
from bmjax.io import hub
from bmjax.io.rows import is_here
from bmjax.log import Log, silent, stage
from bmjax.model import spec
from bmjax.model.attention import rows as short_rows
from bmjax.model.attention.dispatch import backend
from bmjax.model.config import ModelConfig, known
from bmjax.parallel.chips import Chip, topology_devices
from bmjax.parallel.mesh import AXES
from bmjax.plan.hlo import SLICES, Program, totals
from bmjax.weights.tokenizer import has_tokenizer

MOST_MESHES = 6  # that a search compiles
KINDS = ("parameters", "optimizer", "gradients", "temporaries")
RECOMPUTING = ("full", "offload")  # remat that computes the forward pass again, attention included
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|for HLO temporaries \(([\d.]+)([KMG])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def student_config(student: str) -> ModelConfig:
    """Return the architecture of a student: of a directory, of a published model by its name, or from the hub."""
    if (Path(student) / "config.json").is_file():
        return ModelConfig.from_dir(student)
    return known(student) or ModelConfig.from_dir(hub.model_directory(student, weights=False))


def plan_training(
    settings: TrainSettings, topology: str, try_meshes: bool = False, log: Log = silent
) -> dict[str, Any]:
    """Plan a training from its settings, its number of steps included.

    Arguments:
        settings: of the training; the student's weights are not needed.
        topology: the slice, CHIP:SHAPE, for instance v5p:4x4x4, or several like 2xv5p:4x4x4.
        try_meshes: compile several meshes, microbatches and remat, and take the best that fits.
        log: gets lines about the stages and their seconds, and one about each mesh that a search compiles.

    Returns:
        What `plan` returns, with steps (of the whole training; None where they follow from data that is not here), data
        (a line on documents, tokens and rows; None without data) and, after a search, overrides: its changes to the
        settings.

    Raises:
        UserError: an unknown topology, or settings that cannot be trained with as they stand.
    """
    chip, devices = topology_devices(topology)
    chosen = without_data(settings, "a plan")
    config = student_config(chosen.student)
    steps, data = steps_and_data(chosen, log)
    make = search if try_meshes else plan
    return make(chosen, config, topology, chip, devices, log) | {"steps": steps, "data": data}


def steps_and_data(settings: ChosenTraining, log: Log = silent) -> tuple[int | None, str | None]:
    """Return the optimizer steps of a training, and a line on its data.

    The line is None without data or a student here, and so are the steps where they follow from the data.
    """
    names = [settings.data] if isinstance(settings.data, str) else settings.data
    directory = Path(settings.student).expanduser()
    if not all(is_here(name) for name in names) or not has_tokenizer(directory):
        return settings.steps, None
    student = open_student(settings)
    loader = prepare.load_data(settings, student, log)
    steps = prepare.total_steps(settings, loader)
    return steps, data_line(settings, loader, student, steps)


def plan(
    settings: ChosenTraining, config: ModelConfig, topology: str, chip: Chip, devices: Sequence[Any], log: Log = silent
) -> dict[str, Any]:
    """Compile the step of a training for devices of the kind `chip`, at hand or not; `topology` only names them.

    XLA's compiler takes nine tenths of the time, nearly all of it after memory is laid out, for the chips' own code.

    Returns what the step takes, and for how long at the least. A program sees one device of a chip, two of TPU7x, which
    all figures a chip are then of; devices_per_chip says so. gib_per_chip: GiB by kind (KINDS) and `total`.
    flops_per_step: FLOPs of all chips, recomputation included. collective_bytes: what a chip sends a step, by mesh
    axis. step_seconds_bound: the time of the slowest resource, `bound_by`. mfu_bound: the share of the peak that the
    model's own FLOPs reach in it. change: the setting to change where it does not fit. There is no program to read
    then: FLOPs are the model's, and collective_bytes may be empty.
    """
    began = time.perf_counter()
    with stage("lowering the step", log):
        step_plan, kinds, lowered = lower_step(settings, config, devices)
    mesh = step_plan.mesh

    # Compile it. Where it does not fit, the compiler's error says how much it would take.
    compiled: Any = None
    try:
        chips = mesh.size // chip.devices
        with stage(f"compiling for {chips} chips, {topology}", log, "1 to 3 minutes for a model of 32B"):
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

    # Read memory, FLOPs and collectives off the program.
    tokens = settings.batch * settings.seq_len
    model_flops = tokens * flops_per_token(config, settings.seq_len)
    flops, collectives = model_flops * (4 / 3 if settings.remat in RECOMPUTING else 1.0), {}
    if compiled is not None:
        with stage("reading the program", log):
            program = Program(compiled.as_text())
            total = program_bytes(compiled)
            flops = mesh.size * program.flops() + _kernel_flops(step_plan, settings)
            collectives = dict(totals(program.collectives(mesh)))
    kinds["temporaries"] = max(0.0, total - sum(kinds.values()))
    gib = {kind: round(size / GIB, 3) for kind, size in {**kinds, "total": total}.items()}
    fits = compiled is not None and total <= chip.hbm_gib * GIB

    # The step takes at least as long as its slowest resource. A chip's memory moves at least the weights, for every
    # microbatch, and the state once to and fro.
    passes = 2 if settings.remat == "none" else 3
    weights = 2.0 * spec.count(config) / mesh.shape["tensor"]
    traffic = settings.accumulate * passes * weights + 2 * (kinds["parameters"] + kinds["optimizer"])
    times = {
        "arithmetic": flops / mesh.size / chip.flops,
        "memory": traffic / chip.hbm_bandwidth,
        "communication": sum(size for axis, size in collectives.items() if axis != SLICES) / chip.link_bandwidth,
        "communication between slices": collectives.get(SLICES, 0.0) / chip.slice_bandwidth,
    }
    slowest = max(times, key=lambda name: times[name])
    bound = times[slowest]
    return {
        "fits": fits, "topology": topology, "chips": mesh.size // chip.devices, "devices_per_chip": chip.devices,
        "mesh": dict(mesh.shape), "hbm_gib": chip.hbm_gib,
        "gib_per_chip": gib, "flops_per_step": flops, "collective_bytes": collectives, "step_seconds_bound": bound,
        "bound_by": slowest, "tokens_per_second_bound": tokens / bound,
        "mfu_bound": model_flops / mesh.size / bound / chip.flops, "usd_per_chip_hour": chip.price,
        "compile_seconds": round(seconds, 1), "change": None if fits else _advice(settings, config, mesh, gib),
    }  # fmt: skip


def lower_step(
    settings: ChosenTraining, config: ModelConfig, devices: Sequence[Any]
) -> tuple[StepPlan, dict[str, float], jax.stages.Lowered]:
    """Return the step's plan, the bytes that a chip holds by kind, and the step ready to compile."""
    mesh = prepare.check(settings, config, devices)
    step_plan = dataclasses.replace(prepare.step_plan(settings, config, mesh), unroll=1)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(step_plan, settings.batch, settings.seq_len)
        return step_plan, state_bytes(arguments[0]), make_step(step_plan).lower(*arguments)


def _kernel_flops(step_plan: StepPlan, settings: ChosenTraining) -> float:
    """Count attention's FLOPs where the program's text does not show them: in kernels and loops of unknown length.

    Two products forward (again where layers are recomputed), five backward, of half the square.
    """
    config = step_plan.config
    q = jax.ShapeDtypeStruct((1, settings.seq_len, config.num_heads, config.head_dim), step_plan.compute_dtype)
    if backend(step_plan.attention_options, q, config.uses_windows) == "xla" and settings.seq_len <= short_rows.LONGEST:
        return 0.0
    products = 7 + (2 if settings.remat in RECOMPUTING else 0)
    square = settings.batch * settings.seq_len**2 / 2
    return 2.0 * products * square * config.num_layers * config.num_heads * config.head_dim


def _advice(settings: ChosenTraining, config: ModelConfig, mesh: Any, gib: dict[str, float]) -> str:
    """Return the setting to change first where it does not fit."""
    state = gib["parameters"] + gib["optimizer"] + gib["gradients"]
    rows = settings.batch // settings.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
    if mesh.shape["data"] > 1:
        return f"mesh: data {mesh.shape['data']} holds the state as often; move its chips to fsdp"
    if settings.remat not in RECOMPUTING:
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


def candidates(settings: ChosenTraining, config: ModelConfig, chips: int) -> list[dict[str, Any]]:
    """Return meshes and microbatches worth compiling, the likeliest first: little splitting, few microbatches."""
    ranked = []
    powers = [2**i for i in range(int(math.log2(chips)) + 1) if chips % 2**i == 0]
    for tensor, context in itertools.product(powers, powers):
        if config.num_heads % (tensor * context) or config.num_kv_heads % tensor or tensor * context > chips:
            continue
        if settings.seq_len % context:
            continue
        fsdp = chips // (tensor * context)
        mesh = {"fsdp": fsdp, "context": context, "tensor": tensor}
        for accumulate in range(1, settings.batch + 1):
            rows, rest = divmod(settings.batch, accumulate)
            if not rest and rows % fsdp == 0:
                cost = (math.log2(tensor * context) + 1, rows // fsdp > 1, accumulate)
                ranked.append((cost, {"mesh": mesh, "accumulate": accumulate, "remat": settings.remat}))
    return [changes for _, changes in sorted(ranked, key=lambda candidate: candidate[0])]


def search(
    settings: ChosenTraining, config: ModelConfig, topology: str, chip: Chip, devices: Sequence[Any], log: Log
) -> dict[str, Any]:
    """Compile a few meshes and microbatches, then other remat on the best of them.

    Returns the best plan that fits, with its overrides; where none fits, the one that lacks the least memory. Raises
    UserError when no mesh divides the batch and the heads.
    """
    plans: list[dict[str, Any]] = []

    def attempt(changes: dict[str, Any]) -> None:
        candidate = plan(settings.model_copy(update=changes), config, topology, chip, devices, log)
        log(
            f"{json.dumps(changes)}: {'fits' if candidate['fits'] else 'does not fit'}, "
            f"{candidate['gib_per_chip']['total']:.1f} GiB, {candidate['step_seconds_bound']:.2f} s"
        )
        plans.append(candidate | {"overrides": changes})

    def best() -> dict[str, Any]:
        """Return the fastest plan that fits; of others the one nearest to fitting."""
        fitting = [candidate for candidate in plans if candidate["fits"]]
        if fitting:
            return min(fitting, key=lambda candidate: candidate["step_seconds_bound"])
        return min(plans, key=lambda candidate: candidate["gib_per_chip"]["total"])

    for changes in candidates(settings, config, len(devices))[:MOST_MESHES]:
        attempt(changes)
    if not plans:
        raise UserError(
            f"--search: no mesh of {len(devices)} chips divides batch {settings.batch} and {config.num_heads} heads; "
            "change batch"
        )
    first = best()
    # The best mesh's spare memory may hold what would be computed again; what lacks a little may go to the host.
    for remat in ("save_attention", "minimal") if first["fits"] else ("full", "offload"):
        if remat != settings.remat:
            attempt({**first["overrides"], "remat": remat})
    return best()


def lines(pod_plan: dict[str, Any], settings: ChosenTraining) -> Iterator[str]:
    """Yield the lines of the report that a user reads."""
    if pod_plan.get("data"):
        yield pod_plan["data"]
    mesh = " x ".join(f"{axis} {pod_plan['mesh'][axis]}" for axis in AXES if pod_plan["mesh"][axis] > 1) or "one device"
    rows = f"{settings.batch} rows of {settings.seq_len:,} tokens a step"
    several = pod_plan["devices_per_chip"]
    part = "a chip" if several == 1 else "a device"
    chips = f"{pod_plan['chips']} chips" + ("" if several == 1 else f" with {several} devices each")
    yield f"{pod_plan['topology']}: {chips} of {pod_plan['hbm_gib']:g} GiB; {mesh}; {rows}"
    total = pod_plan["gib_per_chip"]["total"]
    yield f"{'fits' if pod_plan['fits'] else 'DOES NOT FIT'}: {total:.2f} GiB {part}, {total / pod_plan['hbm_gib']:.0%}"
    for kind in KINDS:
        yield f"  {kind:<12} {pod_plan['gib_per_chip'][kind]:8.2f} GiB"
    if pod_plan["change"]:
        yield f"change {pod_plan['change']}"
    if not pod_plan["fits"]:
        return
    yield f"a step: {pod_plan['flops_per_step']:.3g} FLOPs, recomputation included; {part} sends"
    for axis, size in sorted(pod_plan["collective_bytes"].items(), key=lambda pair: -pair[1]):
        yield f"  {axis:<20} {size / 1e9:10.2f} GB"
    yield (
        f"at the least {pod_plan['step_seconds_bound']:.2f} s a step ({pod_plan['bound_by']}): at most "
        f"{pod_plan['tokens_per_second_bound']:,.0f} tokens/s, MFU {pod_plan['mfu_bound']:.0%}"
    )
    steps = pod_plan["steps"] or 1000
    hours = steps * pod_plan["chips"] * pod_plan["step_seconds_bound"] / 3600
    price = pod_plan["usd_per_chip_hour"]
    cost = "no published price" if price is None else f"US$ {hours * price:,.0f} at US$ {price:.2f} a chip-hour"
    epochs = f" ({settings.epochs:g} epochs)" if pod_plan["steps"] and settings.epochs else ""
    yield f"{steps:,} steps{epochs}: at least {hours:,.0f} chip-hours, {cost}"
    yield f"compiled in {pod_plan['compile_seconds']:.0f} s"
