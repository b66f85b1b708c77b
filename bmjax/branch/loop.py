"""The steps of a training: batches in, metrics out, checkpoints when due, an end when asked for one.

`train` calls `loop` once. It reads no settings' files and exports nothing.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from bmjax.branch import optimizer
from bmjax.branch.loader import read_ahead
from bmjax.branch.metrics import MetricsLog
from bmjax.branch.run import Progress, Run
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import State, compile_step, memory_line
from bmjax.config import UserError
from bmjax.parallel import processes
from bmjax.parallel.processes import delayed_sigterm
from bmjax.weights.checkpoint import Checkpoints


def saved(state: State) -> State:
    """Return the part of the state that a checkpoint needs; frozen parameters and the start come from the student."""
    return {"params": state["params"], "moments": state["moments"]}


def loop(run: Run, state: State, begin: Progress, checkpoints: Checkpoints) -> tuple[State, dict[str, Any]]:
    """Take the optimizer steps that are left of a training.

    Arguments:
        state: the training state after `begin.step` steps; donated.
        checkpoints: where the state goes when a save is due.

    Returns:
        The state at the end, and a summary: tokens (real ones seen by all steps), loss and move of the last step.

    Raises:
        UserError: when the loss is no number.
        SystemExit: after SIGTERM, with the code `stop_code`, once the step under way is done and saved.
    """
    settings, loader, plan, steps = run.settings, run.loader, run.plan, run.steps
    step_function = compile_step(plan, loader.batch, loader.length)
    if begin.step < steps:
        run.log(memory_line(step_function, state, plan.mesh.local_devices[0]))
    values: dict[str, float] = {}
    pending: tuple[Any, ...] | None = None
    seen = begin.tokens

    def settle() -> dict[str, float]:
        """Wait for the metrics of the pending step and record them."""
        assert pending is not None
        number, rate, tokens, metrics = pending
        numbers = {key: float(value) for key, value in metrics.items()}
        _check_finite(number, numbers, run.output)
        if metrics_log:
            metrics_log.step(number, rate, tokens, numbers)
        return numbers

    with (
        MetricsLog(run, begin.step) if processes.is_main() else contextlib.nullcontext() as metrics_log,
        read_ahead(plan.mesh, loader, begin.step, steps) as batches,
        _Profile(settings, run.output) as profile,
        delayed_sigterm() as ends_after,
    ):
        for step in range(begin.step, steps):
            with profile.step(step + 1):
                rate = optimizer.learning_rate(step, steps, settings.learning_rate, settings.schedule, settings.warmup)
                state, metrics = step_function(state, next(batches), np.float32(rate))
                # The device computes this step while the host waits for the numbers of the one before.
                if pending:
                    values = settle()
                tokens = loader.real_tokens(step)
                pending = (step + 1, rate, tokens, metrics)
                seen += tokens
            profile.done(step + 1, metrics)
            stopped = ends_after(step)
            if (step + 1) % settings.save_every == 0 or step + 1 == steps or stopped:
                values, pending = settle(), None
                meta = {"fingerprint": run.fingerprint, "tokens": seen, "values": values}
                checkpoints.save(step + 1, saved(state), meta)
            if stopped and step + 1 < steps:
                checkpoints.latest()  # waits until it is whole
                run.log(f"SIGTERM: saved after step {step + 1} of {steps}; the same command goes on from there")
                raise SystemExit(settings.stop_code)
    if not values:  # resumed after the last step: nothing was left to do but the export
        values = checkpoints.meta()["values"]
    return state, {"tokens": seen, "loss": values["loss"], "move": values.get("move")}


def _check_finite(step: int, numbers: dict[str, float], output: Path) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(numbers[key]):
            raise UserError(
                f"step {step}: the {key} is {numbers[key]}; stopped, the checkpoints before it are kept in "
                f"{output / 'checkpoints'}; lower learning_rate or look at the data"
            )


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
        """Return the context of step `number`."""
        if self._first <= number <= self._last and not self._recording:
            jax.profiler.start_trace(self._folder)
            self._recording = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, result: Any) -> None:
        """End the trace after its last step. result: of step `number`, which the device may still compute."""
        if self._recording and number >= self._last:
            jax.block_until_ready(result)
            self.__exit__()
