"""What a run says while it trains: metrics.jsonl, one line a step, a bar on a terminal, tokens/s, MFU, ETA."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.log import Log, write_line
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from bmjax.parallel.chips import peak_flops


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Training FLOPs a token: 6 per matrix parameter used, and causal attention over rows of `length` tokens.

    Attention costs 12 N H T per layer over the square, half of it under the causal mask (PaLM, appendix B).
    """
    matrices = spec.count(config) - config.vocab_size * config.hidden_size * (0 if config.tied else 1)
    return 6.0 * matrices + 6.0 * config.num_layers * config.num_heads * config.head_dim * length


def check_wandb(project: str | None) -> None:
    """UserError when runs are to be logged to Weights & Biases and its package is not there."""
    if project:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("wandb: the package is not installed; pip install 'bmjax[wandb]', or remove the key") from None
    return wandb


class MetricsLog:
    """Appends one JSON object a step and shows progress. Lines beyond `start` of an earlier run are cut off."""

    def __init__(
        self, path: Path, name: str, config: ModelConfig, length: int, start: int, steps: int, steps_per_epoch: int,
        devices: int, log: Log, log_every: int, wandb_project: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if line["step"] <= start]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._start, self._steps, self._per_epoch = start, steps, steps_per_epoch
        self._log, self._log_every = log, log_every
        self._began = self._last = time.monotonic()
        self._flops = flops_per_token(config, length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * devices if peak else None
        self._bar: Any = None
        if log is write_line and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True)
        self._wandb: Any = None
        if wandb_project:
            self._wandb = _wandb().init(project=wandb_project, name=name, config=settings)

    def step(self, step: int, rate: float, tokens: int, values: dict[str, float]) -> None:
        """Record optimizer step `step` (from 1): its learning rate, real tokens, and the step's metrics."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        done = step - self._start
        # The first step takes longer than those to come, whose pace is counted from its end on.
        if done == 1:
            self._began = now
        pace = (now - self._began) / (done - 1) if done > 1 else seconds
        line = {
            "step": step, "epoch": round(step / self._per_epoch, 4), **values, "learning_rate": rate,
            "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
        }  # fmt: skip
        line["eta_seconds"] = (self._steps - step) * pace
        if self._peak:
            line["mfu"] = tokens * self._flops / seconds / self._peak
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(line, step=step)
        if self._bar is not None:
            self._bar.update(1)
        if step % self._log_every == 0 or step == self._steps:
            self._log(self._text(line))

    def _text(self, line: dict[str, Any]) -> str:
        eta = line["eta_seconds"]
        mfu = f" mfu {line['mfu']:.1%}" if "mfu" in line else ""
        move = f" move {line['move']:.4f}" if "move" in line else ""
        return (
            f"step {line['step']}/{self._steps} epoch {line['epoch']:.2f} loss {line['loss']:.4f} "
            f"lr {line['learning_rate']:.2e} grad {line['grad_norm']:.3f}{move} "
            f"{line['tokens_per_second']:,.0f} tok/s{mfu} eta {int(eta // 60)}m{int(eta % 60):02d}s"
        )

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb:
            self._wandb.finish()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that were written whole (a kill may cut the last)."""
    lines = []
    if path.exists():
        for text in path.read_text().split("\n"):
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines
