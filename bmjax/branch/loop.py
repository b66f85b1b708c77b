"""The steps of a run, one after another: batches in, metrics out, checkpoints when due, an end when asked for one."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from bmjax.branch import memory, optimizer
from bmjax.branch.loader import Loader
from bmjax.branch.metrics import Log, MetricsLog
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import StepPlan, compile_step, load_batch
from bmjax.config import UserError
from bmjax.parallel import processes
from bmjax.parallel.processes import Stop
from bmjax.weights.checkpoint import Checkpoints

State = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a run begins or goes on: optimizer steps done, tokens seen by them."""

    step: int = 0
    tokens: int = 0


def saved(state: State) -> State:
    """What a checkpoint needs: the frozen parameters and the start come from the student again."""
    return {"params": state["params"], "moments": state["moments"]}


def loop(
    plan: StepPlan, settings: TrainSettings, loader: Loader, state: State, begin: Progress, steps: int,
    checkpoints: Checkpoints, fingerprint: dict[str, str], log: Log,
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """(state, {tokens, loss, move}) after `steps` optimizer steps.

    SIGTERM ends it after the step under way: a checkpoint is written, and SystemExit raised, with stop_code.
    """
    output = Path(settings.output)
    step_function = compile_step(plan, loader.batch, loader.length)
    if begin.step < steps:
        log(memory.text(step_function, state, plan.mesh.local_devices[0]))
    values: dict[str, float] = {}
    pending: tuple[Any, ...] | None = None
    seen = begin.tokens

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
        if metrics_log:
            metrics_log.step(number, rate, tokens, numbers)
        return numbers

    with (
        _metrics_log(plan, settings, loader, begin.step, steps, log) as metrics_log,
        _Profile(settings, output) as profile,
        Stop() as stop,
    ):
        for step in range(begin.step, steps):
            with profile.step(step + 1):
                rate = optimizer.learning_rate(step, steps, settings.learning_rate, settings.schedule, settings.warmup)
                state, metrics = step_function(state, *load_batch(plan.mesh, loader, step), np.float32(rate))
                if pending:
                    values = settle()
                tokens = loader.real_tokens(step)
                pending = (step + 1, rate, tokens, metrics)
                seen += tokens
            profile.done(step + 1, metrics)
            stopped = stop.reached(step)
            if checkpoints.due(step + 1, last=steps) or stopped:
                values, pending = settle(), None
                checkpoints.save(step + 1, saved(state), {"fingerprint": fingerprint, "tokens": seen, "values": values})
            if stopped and step + 1 < steps:
                checkpoints.latest()  # waits until it is whole
                log(f"SIGTERM: saved after step {step + 1} of {steps}; the same command goes on from there")
                raise SystemExit(settings.stop_code)
    if not values:  # resumed after the last step: nothing was left to do but the export
        values = checkpoints.meta(None)["values"]
    return state, {"tokens": seen, "loss": values["loss"], "move": values.get("move")}


@contextlib.contextmanager
def _metrics_log(
    plan: StepPlan, settings: TrainSettings, loader: Loader, start: int, steps: int, log: Log
) -> Iterator[MetricsLog | None]:
    """The run's metrics.jsonl; None in all processes but the first."""
    if not processes.is_main():
        yield None
        return
    output = Path(settings.output)
    metrics_log = MetricsLog(
        output / "metrics.jsonl", output.name, plan.config, loader.length, start, steps, loader.steps_per_epoch,
        plan.mesh.size, log, settings.log_every, settings.wandb, settings.model_dump(),
    )  # fmt: skip
    try:
        yield metrics_log
    finally:
        metrics_log.close()


class _Profile:
    """DIR/profile, an XProf trace of the first process: from the first to the last of profile_steps (from 1)."""

    def __init__(self, settings: TrainSettings, output: Path) -> None:
        self._first, self._last = (settings.profile_steps or (0, 0)) if processes.is_main() else (0, 0)
        self._folder = str(output / "profile")
        self._recording = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Around step `number`."""
        if self._first <= number <= self._last and not self._recording:
            jax.profiler.start_trace(self._folder)
            self._recording = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, result: Any) -> None:
        """After step `number`, whose result may not be there yet."""
        if self._recording and number >= self._last:
            jax.block_until_ready(result)
            self.__exit__()
