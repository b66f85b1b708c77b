"""The steps of a training: batches in, metrics out, checkpoints when due, an end when asked for one.

`train` calls `loop` once. Each step goes to metrics.jsonl (reports read it), the log, a bar on a terminal and Weights &
Biases. Nothing here reads settings' files or exports.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from bmjax.branch import optimizer
from bmjax.branch.loader import Loader, read_ahead
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import State, StepPlan, compile_step, flops_per_token, memory_line
from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines, read_lines, write_jsonl
from bmjax.log import Log, progress_bar
from bmjax.parallel import processes
from bmjax.parallel.chips import peak_flops
from bmjax.parallel.processes import Stop
from bmjax.weights.checkpoint import Checkpoints
from bmjax.weights.student import Student


@dataclass(frozen=True)
class Run:
    """A training that is about to begin or to go on, made once by `train`."""

    settings: TrainSettings
    student: Student
    loader: Loader
    plan: StepPlan
    steps: int  # of the whole training
    fingerprint: dict[str, str]  # what its checkpoints have to share with it
    log: Log  # silent in all processes but the first
    progress: bool  # show a bar on a terminal

    @property
    def output(self) -> Path:
        """The directory that the training writes."""
        return Path(self.settings.output)


def saved(state: State) -> State:
    """Return the part of the state that a checkpoint needs; frozen parameters and the start come from the student."""
    return {"params": state["params"], "moments": state["moments"]}


def loop(run: Run, state: State, begin: int, seen: int, checkpoints: Checkpoints) -> tuple[State, dict[str, Any]]:
    """Take the optimizer steps that are left of a training.

    Arguments:
        state: the training state after `begin` steps, which saw `seen` real tokens; donated.
        checkpoints: where the state goes when a save is due.

    Returns:
        The state at the end, and a summary: tokens (real ones seen by all steps), loss and move of the last step.

    Raises:
        UserError: when the loss is no number.
        SystemExit: after SIGTERM, with the code `stop_code`, once the step under way is done and saved.
    """
    settings, loader, plan, steps = run.settings, run.loader, run.plan, run.steps
    step_function = compile_step(plan, loader.batch, loader.length)
    if begin < steps:
        run.log(memory_line(step_function, state, plan.mesh.local_devices[0]))
    first_profiled, last_profiled = (settings.profile_steps or (0, 0)) if processes.is_main() else (0, 0)
    values: dict[str, float] = {}
    pending: tuple[Any, ...] | None = None

    def settle() -> dict[str, float]:
        """Wait for the metrics of the pending step and record them."""
        assert pending is not None
        number, rate, tokens, metrics = pending
        numbers = {key: float(value) for key, value in metrics.items()}
        for key in ("loss", "grad_norm"):
            if not math.isfinite(numbers[key]):
                raise UserError(
                    f"step {number}: the {key} is {numbers[key]}; stopped, the checkpoints before it are kept in "
                    f"{run.output / 'checkpoints'}; lower learning_rate or look at the data"
                )
        if metrics_log:
            metrics_log.step(number, rate, tokens, numbers)
        return numbers

    with (
        MetricsLog(run, begin) if processes.is_main() else contextlib.nullcontext() as metrics_log,
        read_ahead(plan.mesh, loader, begin, steps) as batches,
        contextlib.ExitStack() as profile,
        Stop() as stop,
    ):
        for step in range(begin, steps):
            if step + 1 == max(first_profiled, begin + 1) <= last_profiled:
                jax.profiler.start_trace(str(run.output / "profile"))
                profile.callback(jax.profiler.stop_trace)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                rate = optimizer.learning_rate(step, steps, settings.learning_rate, settings.schedule, settings.warmup)
                state, metrics = step_function(state, next(batches), np.float32(rate))
                # The device computes this step while the host waits for the numbers of the one before.
                if pending:
                    values = settle()
                tokens = loader.real_tokens(step)
                pending = (step + 1, rate, tokens, metrics)
                seen += tokens
            if step + 1 == last_profiled:
                jax.block_until_ready(metrics)
                profile.close()
            stopped = stop.reached(step)
            if checkpoints.due(step + 1, last=steps) or stopped:
                values, pending = settle(), None
                meta = {"fingerprint": run.fingerprint, "tokens": seen, "values": values}
                checkpoints.save(step + 1, saved(state), meta)
            if stopped and step + 1 < steps:
                checkpoints.latest()  # waits until it is whole
                run.log(f"SIGTERM: saved after step {step + 1} of {steps}; the same command goes on from there")
                raise SystemExit(settings.stop_code)
    if not values:  # resumed after the last step: nothing was left to do but the export
        values = checkpoints.meta(None)["values"]
    return state, {"tokens": seen, "loss": values["loss"], "move": values.get("move")}


def import_wandb() -> Any:
    """Return the module of Weights & Biases; UserError where the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb: the package is not installed; pip install 'bmjax[wandb]', or remove the key") from None
    return wandb


class MetricsLog:
    """Appends one JSON object a step to DIR/metrics.jsonl and shows progress; a context manager.

    start: optimizer steps done before. Lines beyond it, which a killed training left, are cut off.
    """

    def __init__(self, run: Run, start: int) -> None:
        self._run, self._start = run, start
        path = run.output / "metrics.jsonl"
        lines = [line for _, _, line in read_lines(path)] if path.exists() else []
        write_jsonl(path, (line for line in lines if line["step"] <= start))
        self._file = JsonLines(path)
        self._flops = flops_per_token(run.plan.config, run.loader.length)
        self._peak = (peak_flops(jax.devices()[0].device_kind) or 0.0) * run.plan.mesh.size  # 0 where it is not known

    def __enter__(self) -> Self:
        run = self._run
        self._file.__enter__()
        self._bar = progress_bar(run.output.name, "step", run.steps, self._start, run.progress)
        project = run.settings.wandb
        self._wandb = project and import_wandb().init(
            project=project, name=run.output.name, config=run.settings.model_dump()
        )
        self._began = self._last = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)
        self._bar.close()
        if self._wandb:
            self._wandb.finish()

    def step(self, step: int, rate: float, tokens: int, values: dict[str, float]) -> None:
        """Record optimizer step `step`, from 1, its learning rate, real tokens, and metrics (see `make_step`)."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        done = step - self._start
        # The first step takes longer than those to come, whose pace is counted from its end on.
        if done == 1:
            self._began = now
        pace = (now - self._began) / (done - 1) if done > 1 else seconds
        run, eta = self._run, (self._run.steps - step) * pace
        line = {
            "step": step, "epoch": round(step / run.loader.steps_per_epoch, 4), **values, "learning_rate": rate,
            "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds, "eta_seconds": eta,
        }  # fmt: skip
        if self._peak:
            line["mfu"] = tokens * self._flops / seconds / self._peak
        self._file.append(line)
        if self._wandb:
            self._wandb.log(line, step=step)
        self._bar.update(1)
        if step % run.settings.log_every == 0 or step == run.steps:
            move = f" move {values['move']:.4f}" if "move" in values else ""
            mfu = f" mfu {line['mfu']:.1%}" if "mfu" in line else ""
            run.log(
                f"step {step}/{run.steps} epoch {line['epoch']:.2f} loss {values['loss']:.4f} lr {rate:.2e} "
                f"grad {values['grad_norm']:.3f}{move} {line['tokens_per_second']:,.0f} tok/s{mfu} "
                f"eta {int(eta // 60)}m{int(eta % 60):02d}s"
            )
