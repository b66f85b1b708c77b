"""Measures the held-out loss of a model: nats a token and bits a byte of whole answers that it was not trained on."""

import itertools
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bmjax.branch.examples import Encoding, build_dataset, check_vocabulary
from bmjax.branch.loader import Loader, best_fit, load_batch
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.generate.text import answer_text
from bmjax.io.rows import Row, fill, read_rows
from bmjax.log import Log, silent
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.model.loss import cross_entropy_sum, next_token_targets
from bmjax.parallel import turns
from bmjax.weights.student import Student

DRAWS, FEWEST_BLOCKS = 2000, 10  # of the bootstrap; with fewer blocks there is no interval


@lru_cache(maxsize=16)
def _loss_function(config: ModelConfig, dtype: Any, ways: int) -> Any:
    """Return the program that gives loss and number of targets of a batch's blocks, each a row of every device.

    ways: devices that share the rows of a batch.
    """
    model = qwen2.Qwen2(config, dtype)

    def blocks(x: jax.Array) -> jax.Array:  # [B, ...] -> [B / ways, ways, ...], no row leaves its device
        return jnp.swapaxes(x.reshape(ways, -1, *x.shape[1:]), 0, 1)

    def of_blocks(params: Any, batch: Any) -> Any:
        h_BTD, _ = model.apply({"params": params}, batch.tokens, batch.segment_ids, None)
        labels_BT, mask_BT = next_token_targets(batch)
        w_DV = qwen2.head_weight(config, params).astype(model.dtype)
        parts = (blocks(h_BTD), blocks(labels_BT), blocks(mask_BT))
        return jax.lax.map(lambda part: cross_entropy_sum(part[0], w_DV, *part[1:]), parts), parts[2].sum((1, 2))

    return turns.jit(of_blocks)


def interval_of_ratio(nats: np.ndarray, tokens: np.ndarray, seed: int = 0) -> list[float] | None:
    """Return the 95 % percentile interval of sum(nats) / sum(tokens) by drawing blocks with replacement.

    A block is one or a few rows of whole documents. None for fewer than FEWEST_BLOCKS blocks with targets.
    """
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    if len(nats) < FEWEST_BLOCKS:
        return None
    random = np.random.default_rng(seed)
    picks = (random.integers(len(nats), size=len(nats)) for _ in range(DRAWS))
    ratios = [nats[pick].sum() / tokens[pick].sum() for pick in picks]
    return [float(end) for end in np.quantile(ratios, (0.025, 0.975))]


def held_out_loss(
    settings: EvalSettings, task: TaskSettings, student: Student, params: Any, mesh: Mesh, log: Log = silent
) -> dict[str, Any]:
    """Compute the loss of a task's traces on the mesh, which is in scope.

    log: told where rows are shorter than asked for, and how many traces are cut.

    Returns:
        loss (nats a target token), loss_ci95 (its interval, a bootstrap over packed rows), bits_per_byte (of the
        target text), loss_tokens, and cut_rows: how many traces are over seq_len, so that only their beginning counts.
    """
    assert task.traces is not None and student.template is not None
    config = student.config
    seq_len = min(settings.seq_len, config.max_length)
    rows: Iterable[Row] = itertools.islice(read_rows(task.traces, "traces"), task.limit)
    templates = {"prompt": task.prompt, "response": task.response}
    if templates != {key: TaskSettings.model_fields[key].default for key in templates}:
        rows = (
            (location, {key: fill(template, row, location, key) for key, template in templates.items()})
            for location, row in rows
        )
    dataset = build_dataset(rows, Encoding(student.tokenizer, student.template, seq_len))
    if seq_len < settings.seq_len:
        log(f"seq_len {settings.seq_len} is more than the model's context: rows have {seq_len} tokens")
    if dataset.truncated:
        count = len(dataset.examples)
        log(f"{dataset.truncated} of {count} traces are over {seq_len} tokens: only their beginning counts (cut_rows)")
    check_vocabulary(dataset, config.vocab_size, student.directory)
    # A power of two that holds all of a small dataset, so that few rows are empty.
    packed = len(best_fit([len(example.tokens) for example in dataset.examples], seq_len))
    batch = min(settings.batch, 1 << (packed - 1).bit_length())
    loader = Loader(dataset, seq_len, batch, packing=True, shuffle=False, seed=0)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    function = _loss_function(config, jnp.dtype(settings.compute_dtype), ways if batch % ways == 0 else 1)
    parts = [function(params, load_batch(mesh, loader, step)) for step in range(loader.steps_per_epoch)]
    nats_of_blocks, tokens_of_blocks = (
        np.concatenate([np.asarray(part[i], np.float64) for part in parts]) for i in range(2)
    )
    nats, tokens = float(nats_of_blocks.sum()), float(tokens_of_blocks.sum())
    ends = interval_of_ratio(nats_of_blocks, tokens_of_blocks, settings.seed or 0)
    targets = [example.tokens[example.loss_mask.astype(bool)].tolist() for example in dataset.examples]
    texts = (answer_text(student.tokenizer, target) for target in targets)
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    return {
        "loss": nats / tokens, **({"loss_ci95": ends} if ends else {}), "bits_per_byte": bits_per_byte,
        "loss_tokens": int(tokens), "cut_rows": dataset.truncated,
    }  # fmt: skip
