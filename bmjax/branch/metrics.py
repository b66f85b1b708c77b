"""What a training says of each step: metrics.jsonl, lines in the log, a bar on a terminal, Weights & Biases.

The training loop of the first process writes here; reports read metrics.jsonl.
"""

import time
from typing import Any

import jax

from bmjax.branch.run import Run
from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines, read_lines, write_jsonl
from bmjax.log import progress_bar
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from bmjax.parallel.chips import peak_flops


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Count the training FLOPs a token: 6 per matrix parameter used, and causal attention over rows of `length` tokens.

    Attention costs 12 N H T per layer over the square, half of it under the causal mask (PaLM, appendix B).
    """
    matrices = spec.count(config) - config.vocab_size * config.hidden_size * (0 if config.tied else 1)
    return 6.0 * matrices + 6.0 * config.num_layers * config.num_heads * config.head_dim * length


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
        lines = [line for _, line in read_lines(path)] if path.exists() else []
        write_jsonl(path, (line for line in lines if line["step"] <= start))
        self._file = JsonLines(path)
        self._flops = flops_per_token(run.plan.config, run.loader.length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * run.plan.mesh.size if peak else None

    def __enter__(self) -> "MetricsLog":
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
        """Record optimizer step `step`, from 1.

        Arguments:
            rate: its learning rate.
            tokens: real tokens of its batch.
            values: the step's own metrics, see `step.make_step`.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        done = step - self._start
        # The first step takes longer than those to come, whose pace is counted from its end on.
        if done == 1:
            self._began = now
        pace = (now - self._began) / (done - 1) if done > 1 else seconds
        run = self._run
        line = {
            "step": step, "epoch": round(step / run.loader.steps_per_epoch, 4), **values, "learning_rate": rate,
            "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
            "eta_seconds": (run.steps - step) * pace,
        }  # fmt: skip
        if self._peak:
            line["mfu"] = tokens * self._flops / seconds / self._peak
        self._file.append(line)
        if self._wandb:
            self._wandb.log(line, step=step)
        self._bar.update(1)
        if step % run.settings.log_every == 0 or step == run.steps:
            run.log(self._text(line))

    def _text(self, line: dict[str, Any]) -> str:
        eta = line["eta_seconds"]
        mfu = f" mfu {line['mfu']:.1%}" if "mfu" in line else ""
        move = f" move {line['move']:.4f}" if "move" in line else ""
        return (
            f"step {line['step']}/{self._run.steps} epoch {line['epoch']:.2f} loss {line['loss']:.4f} "
            f"lr {line['learning_rate']:.2e} grad {line['grad_norm']:.3f}{move} "
            f"{line['tokens_per_second']:,.0f} tok/s{mfu} eta {int(eta // 60)}m{int(eta % 60):02d}s"
        )
