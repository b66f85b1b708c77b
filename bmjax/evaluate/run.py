"""Score a model: accuracy by generating and judging, held-out loss by reading traces it was not trained on."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.branch.examples import Dataset, build_dataset, check_vocabulary
from bmjax.branch.loader import Loader, load_batch
from bmjax.chat.template import render_prompt
from bmjax.config import UserError
from bmjax.evaluate.score import accuracy
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.generate import sampler
from bmjax.io.atomic import write_atomic
from bmjax.io.rows import Row, read_rows
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh
from bmjax.teach.judges.verify import verify
from bmjax.weights import hf
from bmjax.weights import student as students


def evaluate(settings: EvalSettings, log: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, Any]]:
    """Scores by task, also written to DIR/scores.json, with every sample in DIR/samples/TASK.jsonl.

    A task with questions gets accuracy, ci95, n, k, truncated (answers cut at max_new_tokens); one with traces
    gets loss (nats a target token), bits_per_byte (of the target text) and loss_tokens.
    """
    student = students.open(settings.model, template=settings.template, purpose="evaluation")
    config, tokenizer, template = student.config, student.tokenizer, student.template
    assert template is not None  # the student was opened for evaluation
    _check_tasks(settings)
    mesh = make_mesh(settings.mesh)
    dtype = jnp.dtype(settings.compute_dtype)
    scores: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        params = hf.load_params(student.directory, config, mesh, dtype=np.dtype(dtype))
        for name, task in settings.tasks.items():
            scores[name] = {}
            if task.questions is not None:
                score, samples = _accuracy(
                    settings, name, task, config, params, tokenizer, template, student.end_tokens
                )
                scores[name] |= score
                lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                write_atomic(Path(settings.output) / "samples" / f"{name}.jsonl", lines)
            if task.traces is not None:
                rows = _limited(read_rows(task.traces), task)
                scores[name] |= held_out_loss(settings, config, params, tokenizer, template, rows, mesh)
            log(f"{settings.model} {name}: {summary(scores[name])}")
    write_atomic(Path(settings.output) / "scores.json", json.dumps(scores, indent=1))
    return scores


def _check_tasks(settings: EvalSettings) -> None:
    if not settings.tasks:
        raise UserError("tasks: empty; expected at least one, name: {questions, traces}")
    for name, task in settings.tasks.items():
        if name != Path(name).name:
            raise UserError(f"tasks: '{name}' is used as a file name; it must not hold '/' or be empty")
        if task.questions is None and task.traces is None:
            raise UserError(f"tasks.{name}: give questions (for accuracy), traces (for the held-out loss) or both")


def summary(score: dict[str, Any]) -> str:
    """One task's score in words."""
    parts = []
    if "accuracy" in score:
        low, high = score["ci95"]
        share = f"accuracy {score['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {score['n']}"
        parts.append(f"{share}, {score['truncated']:.1%} truncated")
    if "loss" in score:
        parts.append(f"loss {score['loss']:.4f} nats/token, {score['bits_per_byte']:.4f} bits/byte")
    return ", ".join(parts)


def _limited(rows: Iterable[Row], task: TaskSettings) -> list[Row]:
    return list(itertools.islice(rows, task.limit))


def _accuracy(
    settings: EvalSettings, name: str, task: TaskSettings, config: ModelConfig, params: Any, tokenizer: Any,
    template: str, eos: Sequence[int],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    assert task.questions is not None
    rows = _limited(read_rows(task.questions), task)
    texts = []
    for where, row in rows:
        if not isinstance(row.get("prompt"), str) or row.get("reference") is None:
            raise UserError(f"{where}: expected 'prompt' and 'reference'; found {', '.join(sorted(row)[:8])}")
        turns = [{"role": "system", "content": settings.system}] if settings.system else []
        texts.append(render_prompt(tokenizer, [*turns, {"role": "user", "content": row["prompt"]}], template, where))
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for (where, _), ids in zip(rows, prompts, strict=True):
        sampler.check_prompt(config, ids, where)
    repeated = [ids for ids in prompts for _ in range(settings.samples)]
    sampling = sampler.Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed)
    outs = sampler.generate(config, params, repeated, sampling, eos, settings.batch, jnp.dtype(settings.compute_dtype))
    answers = tokenizer.batch_decode([out.tokens for out in outs], skip_special_tokens=True)

    right: list[list[bool]] = []
    samples = []
    for number, (where, row) in enumerate(rows):
        mine = range(number * settings.samples, (number + 1) * settings.samples)
        try:
            verdicts = [verify(task.kind or name, row["reference"], answers[i]) for i in mine]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        right.append([verdict.verdict == "right" for verdict in verdicts])
        for i, verdict in zip(mine, verdicts, strict=True):
            samples.append(
                {"prompt": row["prompt"], "reference": row["reference"], "answer": answers[i],
                 "finish_reason": outs[i].finish_reason, "verdict": verdict.verdict, "verdict_by": verdict.by}
            )  # fmt: skip
    result = accuracy(right)
    truncated = sum(out.finish_reason == "length" for out in outs) / len(outs)
    score = {"accuracy": result.accuracy, "ci95": list(result.ci95), "n": result.n, "k": result.k}
    return score | {"truncated": truncated}, samples


@lru_cache(maxsize=16)
def _loss_function(config: ModelConfig, dtype: Any) -> Any:
    return jax.jit(lambda params, batch: qwen2.loss_sum(config, params, batch, dtype=dtype))


def held_out_loss(
    settings: EvalSettings, config: ModelConfig, params: Any, tokenizer: Any, template: str, rows: Sequence[Row],
    mesh: Any,
) -> dict[str, Any]:  # fmt: skip
    """loss (nats a target token), bits_per_byte (nats / ln 2 over the bytes of the target text), loss_tokens, cut_rows.

    cut_rows: how many rows are over seq_len tokens, so that only their beginning is scored.
    """
    seq_len = min(settings.seq_len, config.max_length)
    dataset = build_dataset(rows, tokenizer, template, seq_len, "truncate")
    check_vocabulary(dataset, config.vocab_size, Path(settings.model))
    loader = Loader(dataset, seq_len, _batch(dataset, seq_len, settings.batch), packing=True, shuffle=False, seed=0)
    function = _loss_function(config, jnp.dtype(settings.compute_dtype))
    nats, tokens = 0.0, 0.0
    for step in range(loader.steps_per_epoch):
        total, count = function(params, load_batch(mesh, loader, step))
        nats, tokens = nats + float(total), tokens + float(count)
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / _target_bytes(dataset, tokenizer),
        "loss_tokens": int(tokens),
        "cut_rows": dataset.truncated,
    }


def _batch(dataset: Dataset, seq_len: int, most: int) -> int:
    """Rows a step: a power of two that holds all of a small dataset, so that few empty rows are computed."""
    rows = len(Loader(dataset, seq_len, 1, packing=True, shuffle=False, seed=0).rows)
    return min(most, 1 << (rows - 1).bit_length())


def _target_bytes(dataset: Dataset, tokenizer: Any) -> int:
    targets = [example.tokens[example.loss_mask.astype(bool)].tolist() for example in dataset.examples]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(targets, skip_special_tokens=True))
