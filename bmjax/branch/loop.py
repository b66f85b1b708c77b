"""The steps of a training: batches in, metrics out, checkpoints when due, an end when asked for one.

`train` calls `loop` once. Each step goes to metrics.jsonl (reports read it), the log, a bar on a terminal and the
trackers (trackers.py). Nothing here reads settings' files or exports.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.branch import optimizer
from bmjax.branch.continuing import Predecessor
from bmjax.branch.export import export_model
from bmjax.branch.loader import Loader, read_ahead
from bmjax.branch.settings import ChosenTraining
from bmjax.branch.step import State, StepPlan, compile_step, flops_per_token, memory_line
from bmjax.branch.trackers import tracking
from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.io.atomic import replacing
from bmjax.io.jsonl import JsonLines, read_lines, write_jsonl
from bmjax.log import Log, progress_bar, stage
from bmjax.model import spec
from bmjax.parallel import processes
from bmjax.parallel.chips import peak_flops
from bmjax.parallel.processes import delayed_sigterm
from bmjax.urls import url_of
from bmjax.weights.checkpoint_base import Checkpoints
from bmjax.weights.student import Student


@dataclass(frozen=True)
class Run:
    """A training that is about to begin or to go on, made once by `train`."""

    settings: ChosenTraining
    student: Student
    loader: Loader
    plan: StepPlan
    steps: int  # of the whole training: what its schedule spans
    stop: int  # the step after which it ends, `steps` or before
    fingerprint: dict[str, str]  # what its checkpoints have to share with it
    log: Log  # silent in all processes but the first
    progress: bool  # show a bar on a terminal
    earlier: Predecessor | None = None  # what it goes on from where it has no checkpoint itself

    @property
    def output(self) -> Path:
        """The directory that the training writes, of this machine or (with one slash after the scheme) of a bucket."""
        return Path(self.settings.output)


def saved(state: State) -> State:
    """Return the part of the state that a checkpoint needs; frozen parameters and the start come from the student."""
    return {"params": state["params"], "moments": state["moments"]}


def loop(run: Run, state: State, begin: int, seen: int, checkpoints: Checkpoints) -> tuple[State, dict[str, Any]]:
    """Take the optimizer steps that are left of a training. state: after `begin` steps and `seen` tokens; donated.

    Returns the state at the end, and a summary: tokens (real ones seen by all steps), loss and move of the last step.
    UserError when the loss is no number. SystemExit after SIGTERM, once the step under way is done and saved.
    """
    settings, loader, plan, steps, stop = run.settings, run.loader, run.plan, run.steps, run.stop
    if begin < stop:
        with stage("compiling the step", run.log, patience=2):
            step_function = compile_step(plan, loader.batch, loader.length)
        run.log(memory_line(step_function, state, plan.mesh.local_devices[0]))
    # The first process writes DIR/profile, an XProf trace of profile_steps.
    first_profiled, last_profiled = (settings.profile_steps or (0, 0)) if processes.is_main() else (0, 0)
    described = settings.model_dump(mode="json", exclude_defaults=True)  # for whoever exports a checkpoint
    if not url_of(settings.student) and Path(settings.student).expanduser().is_dir():
        described["student"] = str(run.student.directory.resolve())
    if (settings.template or "").endswith(".jinja"):
        described["template"] = str(Path(settings.template or "").resolve())
    values: dict[str, float] = {}
    pending: tuple[Any, ...] | None = None
    started = waited = 0.0

    def settle() -> dict[str, float]:
        """Wait for the metrics of the pending step and record them."""
        assert pending is not None
        number, rate, tokens, metrics = pending
        numbers = {key: float(value) for key, value in metrics.items()}
        for key in ("loss", "grad_norm"):
            if not math.isfinite(numbers[key]):
                raise UserError(
                    f"step {number}: the {key} is {numbers[key]}; stopped, the checkpoints before it are kept in "
                    f"{bucket.join(run.output, 'checkpoints')}, and `bmjax convert` exports them; lower "
                    "learning_rate or look at the data"
                )
        if write_metrics:
            write_metrics(number, rate, tokens, numbers)
        return numbers

    with (
        metrics_log(run, begin) if processes.is_main() else contextlib.nullcontext() as write_metrics,
        read_ahead(plan.mesh, loader, begin, stop) as batches,
        contextlib.ExitStack() as profile,
        delayed_sigterm() as ends_after,
    ):
        for step in range(begin, stop):
            if step + 1 == max(first_profiled, begin + 1) <= last_profiled:
                folder = profile.enter_context(replacing(run.output / "profile"))
                jax.profiler.start_trace(str(folder))
                profile.callback(jax.profiler.stop_trace)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                rate = optimizer.learning_rate(step, steps, settings.learning_rate, settings.schedule, settings.warmup)
                asked = time.monotonic()
                batch = next(batches)
                received = time.monotonic()
                # The first batch is asked for when nothing has been read ahead yet.
                started, waited = (received, 0.0) if step == begin else (started, waited + received - asked)
                state, metrics = step_function(state, batch, np.float32(rate))
                # The device computes this step while the host waits for the numbers of the one before.
                if pending:
                    values = settle()
                tokens = loader.real_tokens(step)
                pending = (step + 1, rate, tokens, metrics)
                seen += tokens
            if step + 1 == last_profiled:
                jax.block_until_ready(metrics)
                profile.close()
            stopped = ends_after(step)
            if (step + 1) % settings.save_every == 0 or step + 1 == stop or stopped:
                values, pending = settle(), None
                meta = {"fingerprint": run.fingerprint, "tokens": seen, "values": values, "settings": described}
                checkpoints.save(step + 1, saved(state), meta)
            if settings.export_every and (step + 1) % settings.export_every == 0 and step + 1 < stop:
                params = spec.join(state["params"], state["frozen"])
                export_model(run.output / "exports" / str(step + 1), params, settings, run.student, step + 1, seen)
            if stopped and step + 1 < stop:
                checkpoints.latest()  # waits until it is whole
                run.log(f"SIGTERM: saved after step {step + 1} of {steps}; the same command goes on from there")
                raise SystemExit(settings.stop_code)
    if stop - begin > 1:
        run.log(f"waited for data: {waited / (time.monotonic() - started):.2%} of the steps' time")
    if not values:  # resumed after the last step: nothing was left to do but the export
        values = checkpoints.meta()["values"]
    return state, {"tokens": seen, "loss": values["loss"], "move": values.get("move")}


@contextlib.contextmanager
def metrics_log(run: Run, begin: int) -> Iterator[Callable[[int, float, int, dict[str, float]], None]]:
    """Give the function that writes a step to DIR/metrics.jsonl and shows progress.

    Its arguments are the step, from 1, its learning rate, its real tokens, and its metrics (see `make_step`). begin:
    optimizer steps done before. Lines beyond it, which a killed training left, are cut off. A training that goes on
    from another one begins with that one's lines.
    """
    steps, settings, path = run.steps, run.settings, run.output / "metrics.jsonl"
    source = run.earlier.metrics if run.earlier and not bucket.exists(path) else path
    lines = [line for _, line in read_lines(source)] if bucket.exists(source) else []
    write_jsonl(path, (line for line in lines if line["step"] <= begin))
    flops = flops_per_token(run.plan.config, run.loader.length)
    peak = (peak_flops(jax.devices()[0].device_kind) or 0.0) * run.plan.mesh.size  # 0 where it is not known
    started = last = 0.0

    def write(step: int, rate: float, tokens: int, metrics: dict[str, float]) -> None:
        nonlocal started, last
        now = time.monotonic()
        seconds, last = now - last, now
        # The first step takes longer than those to come, whose pace is counted from its end on.
        if step - begin == 1:
            started = now
        pace = (now - started) / (step - begin - 1) if step - begin > 1 else seconds
        eta = (run.stop - step) * pace
        line = {
            "step": step, "epoch": round(step / run.loader.steps_per_epoch, 4), **metrics, "learning_rate": rate,
            "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds, "eta_seconds": eta,
        }  # fmt: skip
        if peak:
            line["mfu"] = tokens * flops / seconds / peak
        file.append(line)
        track(step, {key: value for key, value in line.items() if key not in ("step", "eta_seconds")})
        bar.update(1)
        if step % settings.log_every == 0 or step == run.stop:
            move = f" move {metrics['move']:.4f}" if "move" in metrics else ""
            mfu = f" mfu {line['mfu']:.1%}" if "mfu" in line else ""
            run.log(
                f"step {step}/{steps} epoch {line['epoch']:.2f} loss {metrics['loss']:.4f} lr {rate:.2e} "
                f"grad {metrics['grad_norm']:.3f}{move} {line['tokens_per_second']:,.0f} tok/s{mfu} "
                f"eta {int(eta // 60)}m{int(eta % 60):02d}s"
            )

    with (
        JsonLines(path) as file,
        tracking(settings, begin, run.log) as track,
        progress_bar(run.output.name, "steps", run.stop, begin, shown=run.progress, lines=False) as bar,
    ):
        last = time.monotonic()
        yield write
