"""Scores a model: accuracy by generating and judging, held-out loss by reading traces it was not trained on.

`bmjax eval`, `bmjax run` and `bmjax.evaluate` come here. What cannot be judged is counted apart, never as wrong.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bmjax.branch.examples import Encoding, build_dataset, check_vocabulary
from bmjax.branch.loader import Loader, best_fit, load_batch
from bmjax.chat.template import render_prompt
from bmjax.config import UserError
from bmjax.evaluate.score import accuracy
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.generate import sampler
from bmjax.io.atomic import write_atomic
from bmjax.io.jsonl import write_jsonl
from bmjax.io.rows import Row, fill, read_rows
from bmjax.log import Log, silent
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh
from bmjax.teach.judges.judge import judge
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.problems import Problem, read_problems
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.student import Student

Question = tuple[Problem, Sequence[int]]  # with its prompt as tokens of the chat template


def evaluate(settings: EvalSettings, log: Log = silent) -> dict[str, dict[str, Any]]:
    """Score a model on every task, writing DIR/scores.json and every sample to DIR/samples/TASK.jsonl.

    Returns:
        Scores by task. One with questions gets accuracy and ci95 over the questions that could be judged, n (those),
        k (samples a question), unjudged (samples) and truncated (the share cut at max_new_tokens). One with traces gets
        loss (nats a target token), bits_per_byte (of the target text), loss_tokens and cut_rows.

    Raises:
        UserError: for a model or a row that does not fit, and for a task of which no answer can be judged.
    """
    student = students.open(settings.model, template=settings.template, purpose="evaluation")
    if not settings.tasks:
        raise UserError("tasks: empty; expected at least one, name: {questions, traces}")
    for name, task in settings.tasks.items():
        if name != Path(name).name:
            raise UserError(f"tasks: '{name}' is used as a file name; it must not hold '/' or be empty")
        if task.questions is None and task.traces is None:
            raise UserError(f"tasks.{name}: give questions (for accuracy), traces (for the held-out loss) or both")
    questions = {name: _questions(settings, name, student) for name in settings.tasks}
    mesh = make_mesh(settings.mesh)
    dtype = np.dtype(jnp.dtype(settings.compute_dtype))
    scores: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        params = hf.load_params(student.directory, student.config, mesh, dtype=dtype)
        for name, task in settings.tasks.items():
            scores[name] = {}
            if questions[name]:
                score, samples = _accuracy(settings, name, questions[name], student, params)
                scores[name] |= score
                write_jsonl(Path(settings.output) / "samples" / f"{name}.jsonl", samples)
            if task.traces is not None:
                scores[name] |= _held_out_loss(settings, task, student, params, mesh)
            log(f"{settings.model} {name}: {summary(scores[name])}")
    write_atomic(Path(settings.output) / "scores.json", json.dumps(scores, indent=1))
    return scores


def summary(score: dict[str, Any]) -> str:
    """Describe a task's score in words."""
    parts = []
    if "accuracy" in score:
        low, high = score["ci95"]
        parts.append(f"accuracy {score['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {score['n']}")
        parts.append(f"{score['truncated']:.1%} truncated")
        if score.get("unjudged"):
            parts.append(f"{score['unjudged']} samples could not be judged")
    if "loss" in score:
        parts.append(f"loss {score['loss']:.4f} nats/token, {score['bits_per_byte']:.4f} bits/byte")
    return ", ".join(parts)


def _questions(settings: EvalSettings, name: str, student: Student) -> list[Question]:
    """Read, render and tokenize a task's questions, before the weights are read."""
    task, tokenizer, template = settings.tasks[name], student.tokenizer, student.template
    assert template is not None  # the student was opened for evaluation
    if task.questions is None:
        return []
    questions = []
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    for problem in read_problems(task.questions, f"tasks.{name}.questions", task, name):
        turns = [*system, {"role": "user", "content": problem.prompt}]
        text = render_prompt(tokenizer, turns, template, problem.location)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        sampler.check_prompt(student.config, tokens, problem.location)
        questions.append((problem, tokens))
    # An empty answer shows which questions cannot be judged, whatever the model says.
    _judge(settings, name, [(problem, "", None) for problem, _ in questions])
    return questions


def _judge(settings: EvalSettings, name: str, answers: Iterable[tuple[Problem, str, str | None]]) -> list[Verdict]:
    """Judge (problem, answer, why it ended) of a task; UserError when not a single one can be judged."""
    verdicts = [
        judge(problem.reference, answer, problem.judge, settings.run_programs, finish_reason)
        for problem, answer, finish_reason in answers
    ]
    if all(verdict.verdict == "unjudged" for verdict in verdicts):
        raise UserError(
            f"tasks.{name}: none of {len(verdicts)} answers can be judged: {verdicts[0].reason}; "
            f"check keys 'reference' and 'judge' of the task, and 'run_programs'"
        )
    return verdicts


def _accuracy(
    settings: EvalSettings, name: str, questions: Sequence[Question], student: Student, params: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate and judge `settings.samples` answers to each question; returns (score, samples)."""
    k = settings.samples
    asked = [question for question in questions for _ in range(k)]
    sampling = sampler.Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed)
    prompts, dtype = [tokens for _, tokens in asked], jnp.dtype(settings.compute_dtype)
    outs = sampler.generate(student.config, params, prompts, sampling, student.end_tokens, settings.batch, dtype)
    answers = student.tokenizer.batch_decode([out.tokens for out in outs], skip_special_tokens=True)

    answered = list(zip((p for p, _ in asked), answers, (out.finish_reason for out in outs), strict=True))
    verdicts = _judge(settings, name, answered)
    outcomes = [None if verdict.verdict == "unjudged" else verdict.verdict == "right" for verdict in verdicts]
    score = accuracy([outcomes[start : start + k] for start in range(0, len(outcomes), k)])
    score["truncated"] = sum(out.finish_reason == "length" for out in outs) / len(outs)
    samples = [
        {"prompt": problem.prompt, "reference": problem.reference, "answer": answer, "finish_reason": finish_reason,
         "verdict": verdict.verdict, "verdict_by": verdict.judge, "reason": verdict.reason}
        for (problem, answer, finish_reason), verdict in zip(answered, verdicts, strict=True)
    ]  # fmt: skip
    return score, samples


@lru_cache(maxsize=16)
def _loss_function(config: ModelConfig, dtype: Any) -> Any:
    return jax.jit(lambda params, batch: qwen2.loss_sum(qwen2.Qwen2(config, dtype), params, batch))


def _held_out_loss(
    settings: EvalSettings, task: TaskSettings, student: Student, params: Any, mesh: Mesh
) -> dict[str, Any]:
    """Compute the loss of a task's traces; cut_rows of them are over seq_len, so that only their beginning counts."""
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
    check_vocabulary(dataset, config.vocab_size, student.directory)
    # A power of two that holds all of a small dataset, so that few rows are empty.
    packed = len(best_fit([len(example.tokens) for example in dataset.examples], seq_len))
    batch = min(settings.batch, 1 << (packed - 1).bit_length())
    loader = Loader(dataset, seq_len, batch, packing=True, shuffle=False, seed=0)
    function = _loss_function(config, jnp.dtype(settings.compute_dtype))
    nats, tokens = 0.0, 0.0
    for step in range(loader.steps_per_epoch):
        total, count = function(params, load_batch(mesh, loader, step))
        nats, tokens = nats + float(total), tokens + float(count)
    targets = [example.tokens[example.loss_mask.astype(bool)].tolist() for example in dataset.examples]
    texts = student.tokenizer.batch_decode(targets, skip_special_tokens=True)
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    return {
        "loss": nats / tokens, "bits_per_byte": bits_per_byte, "loss_tokens": int(tokens),
        "cut_rows": dataset.truncated,
    }  # fmt: skip
