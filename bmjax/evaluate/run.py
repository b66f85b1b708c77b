"""Scores a model: accuracy by asking and judging, held-out loss by reading traces it was not trained on.

`bmjax eval`, `bmjax run` and `bmjax.evaluate` come here. A model in this process and one behind an endpoint share all
but the asking. What cannot be judged is counted apart, never as wrong.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.config import UserError
from bmjax.evaluate import livecodebench_file, paper
from bmjax.evaluate.answering import Answerer, Generated, sampling_of
from bmjax.evaluate.judging import OVER_CONTEXT, judge_answer, judged_by, votes
from bmjax.evaluate.questions import Asked, read_questions, samples_of
from bmjax.evaluate.samples import Sample, Samples, samples_file, shown_reference, stored_samples
from bmjax.evaluate.score import accuracy, metric, require_samples, token_lengths
from bmjax.evaluate.settings import EvalSettings
from bmjax.io import bucket
from bmjax.io.atomic import held, write_atomic
from bmjax.io.rows import read_rows
from bmjax.log import Log, progress_bar, silent
from bmjax.teach.endpoint import api_key, redact
from bmjax.teach.record import ending
from bmjax.urls import Address, url_of

if TYPE_CHECKING:
    from bmjax.evaluate.local import LocalAnswerer

SCORES = "scores.json"

Scores = dict[str, dict[str, Any]]


def evaluate(settings: EvalSettings, log: Log = silent) -> Scores:
    """Score a model on every task, or go on with a run that was stopped.

    Writes OUTPUT/scores.json, every sample to OUTPUT/samples/TASK.jsonl as it arrives and, where it is asked for,
    OUTPUT/lcb/TASK_eval_all.json, OUTPUT/table.md and OUTPUT/table.json.

    Returns:
        Scores by task. One with questions gets accuracy, ci95 and ci95_by over the n problems that could be judged, k
        (samples a problem), unjudged (samples), truncated (the share that did not come to its end), over_context
        (samples whose prompt is too long), tokens (lengths of answers), metrics, and samples: the file that all this
        comes from, and its count. One with traces gets loss, bits_per_byte, loss_tokens and cut_rows.

    Raises:
        UserError: for a model or a row that does not fit, for a task of which no answer can be judged, and where
            requests failed so that samples are missing.
        KeyboardInterrupt: what had arrived is kept; the same call continues.
    """
    output = Path(settings.output)
    with held(output / ".lock", "another evaluation is writing here"):
        answerer, local = _open(settings, log)

        # All questions are read and checked before anything is asked.
        asked: dict[str, list[Asked]] = {}
        for name in settings.tasks:
            questions = read_questions(settings, name, log)
            asked[name] = samples_of(settings, name, questions, answerer.identity, sampling_of(settings, name))
            answerer.check(name, asked[name])

        # The scores of before say nothing of the samples that now change.
        bucket.mirror(output / SCORES).unlink(missing_ok=True)
        if url := url_of(output):
            bucket.remove(f"{url}/{SCORES}")
        scores: Scores = {}
        failures: list[str] = []
        for name, task in settings.tasks.items():
            score: dict[str, Any] = {}
            if asked[name]:
                samples, failed = _collect(settings, name, asked[name], answerer, log)
                try:
                    score |= score_samples(settings, name, asked[name], samples)
                except UserError as error:
                    if not failed:
                        raise
                    failures.append(f"{error} ({len(failed)} requests failed, the first: {failed[0]})")
                    continue
            if task.traces is not None:
                from bmjax.evaluate.loss import held_out_loss

                assert local is not None  # the settings refuse traces with an endpoint
                with local.on_mesh():
                    score |= held_out_loss(settings, task, local.student, local.params, local.mesh, log)
            scores[name] = score
            log(f"{settings.model} {name}: {summary(score)}")
        if failures:
            raise UserError("; ".join(failures))
        write_atomic(output / SCORES, json.dumps(scores, indent=1))
        if settings.table == "paper":
            paper.write_table(output, settings.model, scores)
        return scores


def describe(settings: EvalSettings, log: Log = silent) -> list[str]:
    """Return what `evaluate` would do, in lines: the answers to ask for, their longest tokens, the memory.

    It reads questions, samples that are there, and of a model its config and tokenizer. Raises UserError as `evaluate`.
    """
    answerer, local = _open(settings, silent)
    lines, total = [], 0
    for name, task in settings.tasks.items():
        if questions := read_questions(settings, name, log):
            asked = samples_of(settings, name, questions, answerer.identity, sampling_of(settings, name))
            answerer.check(name, asked)
            stored = stored_samples(settings.output, name)
            present = [stored[sample.id] for sample in asked if sample.id in stored]
            missing = len(asked) - len(present)
            longest = settings.of_task(name, "max_new_tokens")
            total += missing
            lines.append(
                f"{name}: {len(questions):,} questions, {len(asked) // len(questions)} samples each; "
                f"{len(present):,} answers are there, {missing:,} to ask for, at most {missing * longest:,} "
                f"tokens ({longest:,} each)"
            )
            if warning := _of_another_endpoint(present, settings):
                lines.append(f"{name}: {warning}")
        if task.traces is not None:
            count = sum(1 for _ in itertools.islice(read_rows(task.traces, "traces"), task.limit))
            lines.append(f"{name}: held-out loss of {count:,} traces")
    if local is None:
        where = f"{total:,} requests of {settings.model} at {_endpoint(settings)}, {settings.concurrency} at a time"
        return [*lines, f"{where}; nothing was asked or written"]
    return [*lines, f"{local.memory_line()}; nothing was written"]


def _open(settings: EvalSettings, log: Log) -> "tuple[Answerer, LocalAnswerer | None]":
    """Return who answers, and the same where it is a model in this process. JAX is imported for that alone."""
    if settings.base_url is not None:
        from bmjax.evaluate.endpoint import EndpointAnswerer

        return EndpointAnswerer(settings, log), None
    from bmjax.evaluate.local import LocalAnswerer

    local = LocalAnswerer(settings, log)
    return local, local


def _collect(
    settings: EvalSettings, name: str, asked: Sequence[Asked], answerer: Answerer, log: Log
) -> tuple[list[Sample], list[str]]:
    """Ask for the samples of a task that are missing, and judge all that have no verdict of today's judge.

    Returns:
        the samples in the order of `asked` with an empty list, or fewer of them with why the others failed.
    """
    lcb_compat = settings.tasks[name].lcb_compat
    sampling = sampling_of(settings, name)
    judging: list[Future[None]] = []
    with Samples(settings.output, name, asked) as store, ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:

        def judge(sample: Asked) -> None:
            fields = store.by_id[sample.id]
            verdict = judge_answer(sample, fields["answer"], fields["finish_reason"], settings, lcb_compat)
            store.append(sample.id, verdict)

        def receive(sample: Asked, generated: Generated) -> None:
            store.append(sample.id, _fields(settings, name, sample, generated, sampling))
            judging.append(pool.submit(judge, sample))
            bar.update(1)

        missing = [sample for sample in asked if sample.id not in store.by_id]
        present = [sample for sample in asked if sample.id in store.by_id]
        stale = [sample for sample in present if not _is_judged(sample, store.by_id[sample.id], settings, lcb_compat)]
        if present:
            again = f", {len(stale)} to be judged anew" if stale else ""
            log(f"eval {name}: {len(asked)} samples wanted, {len(present)} already there{again}")
            if warning := _of_another_endpoint([store.by_id[sample.id] for sample in present], settings):
                log(f"eval {name}: {warning}")
        judging += [pool.submit(judge, sample) for sample in stale]
        failed: list[str] = []
        try:
            if missing:
                shown = {"shown": log is not silent, "compiles": settings.base_url is None}
                with progress_bar(f"eval {name}", "answers", len(missing), **shown) as bar:
                    failed = answerer.answer(name, missing, receive)
            for verdict in judging:
                verdict.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the next run judges what is left
            raise
    store.settle()
    return [store.by_id[sample.id] for sample in asked if sample.id in store.by_id], failed


def _endpoint(settings: EvalSettings) -> str | None:
    """Return the address of the model's endpoint as samples hold it, without secrets; None for a model here."""
    if settings.base_url is None:
        return None
    return redact(Address.parse(settings.base_url).label, api_key(settings.api_key_env))


def _of_another_endpoint(present: Sequence[Sample], settings: EvalSettings) -> str | None:
    """Return a warning where samples that are there came from another address than today's; None elsewhere.

    An endpoint's model is known by its name alone, and a server that was started again may have another port.
    """
    here = _endpoint(settings)
    counts = Counter(sample["endpoint"] for sample in present if here is not None and sample.get("endpoint"))
    others = {address: count for address, count in counts.items() if _machine(address) != _machine(str(here))}
    if not others:
        return None
    listed = " and ".join(f"{count} at {address}" for address, count in others.items())
    return (
        f"warning: of these samples '{settings.model}' answered {listed}, not at {here}; they are kept, for the name "
        "is the same: give another `output` if this is another model"
    )


def _machine(address: str) -> str:
    """Return an address with one name for this machine's loopback."""
    parsed = Address.parse(address)
    shown = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    return address.replace(shown, "localhost", 1) if parsed.is_local else address


def _is_judged(asked: Asked, sample: Sample, settings: EvalSettings, lcb_compat: bool) -> bool:
    """Return whether a sample has a verdict by the judge, the reference and the limits of today; unjudged is none."""
    return sample.get("verdict") in ("right", "wrong") and sample.get("judged") == judged_by(
        asked, settings, lcb_compat
    )


def _fields(
    settings: EvalSettings, name: str, asked: Asked, generated: Generated, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of a sample that asking gives; its judge adds others."""
    fields = {
        "task": name, "problem": asked.question.problem, "sample": asked.sample, "model": settings.model,
        "sampling": sampling, "seed": generated.seed, "prompt": asked.prompt,
        "reference": shown_reference(asked.reference), "answer": generated.text,
        "finish_reason": generated.finish_reason, "tokens": generated.tokens, "prompt_tokens": generated.prompt_tokens,
    }  # fmt: skip
    fields |= {} if (address := _endpoint(settings)) is None else {"endpoint": address}
    return fields | ({"options": list(asked.order)} if asked.order else {})


def score_samples(
    settings: EvalSettings, name: str, asked: Sequence[Asked], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Return the statistics of a task's samples, which are in the order of `asked`; see `evaluate`.

    Raises:
        UserError: where samples are missing, and where none could be judged.
    """
    k, seed = settings.of_task(name, "samples"), settings.seed or 0
    by_id = {sample["id"]: sample for sample in samples}
    problems: dict[int, list[Asked]] = {}
    for sample in asked:
        problems.setdefault(sample.question.number, []).append(sample)
    require_samples(name, [sum(sample.id in by_id for sample in group) for group in problems.values()], k)
    outcomes = [[_outcome(by_id[sample.id]) for sample in group] for group in problems.values()]
    if all(outcome is None for group in outcomes for outcome in group):
        reason = Counter(sample["reason"] for sample in samples).most_common(1)[0][0]
        raise UserError(
            f"tasks.{name}: none of {len(samples)} answers can be judged: {reason}; "
            "check keys 'reference' and 'judge' of the task, and 'run_programs'"
        )
    score = accuracy(outcomes, seed)
    over_context = sum(sample["finish_reason"] == OVER_CONTEXT for sample in samples)
    cut = sum(ending(sample["finish_reason"]) == "truncated" for sample in samples) - over_context
    score |= {"truncated": cut / len(samples), "over_context": over_context}
    if lengths := token_lengths([s["tokens"] for s in samples if s["finish_reason"] != OVER_CONTEXT]):
        score["tokens"] = lengths

    # The other measures. Which answers are the same is only asked where a majority is counted.
    task = settings.tasks[name]
    agreed = None
    if any(measure.startswith("maj") for measure in task.metrics):
        answers = [
            [(by_id[s.id]["answer"], by_id[s.id]["finish_reason"]) for s in group] for group in problems.values()
        ]
        agreed = [votes(group, texts) for group, texts in zip(problems.values(), answers, strict=True)]
    if task.metrics:
        score["metrics"] = {measure: metric(measure, outcomes, agreed, seed) for measure in task.metrics}
    if task.lcb_compat and settings.run_programs:
        score["lcb_compat"] = livecodebench_file.write_file(settings.output, name, list(problems.values()), by_id, seed)
    score["samples"] = {"file": str(samples_file("", name)), "count": len(samples)}
    return score


def _outcome(sample: Sample) -> bool | None:
    return None if sample["verdict"] == "unjudged" else sample["verdict"] == "right"


def summary(score: dict[str, Any]) -> str:
    """Describe a task's score in words."""
    parts = []
    if "accuracy" in score:
        low, high = score["ci95"]
        k = f", mean of {score['k']} samples" if score["k"] > 1 else ""
        parts.append(f"accuracy {score['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {score['n']}{k}")
        for name, measure in (score.get("metrics") or {}).items():
            parts.append(f"{name} {measure['value']:.3f}" if measure else f"{name} unknown: too few judged samples")
        if (score.get("lcb_compat") or {}).get("n"):
            parts.append(f"by LiveCodeBench's own rules {score['lcb_compat']['accuracy']:.3f}")
        parts.append(f"{score['truncated']:.1%} truncated")
        if score.get("over_context"):
            parts.append(f"{score['over_context']} samples' prompts are over the context and count as wrong")
        if score.get("unjudged"):
            parts.append(f"{score['unjudged']} samples could not be judged")
        if "tokens" in score:
            parts.append(f"{score['tokens']['mean']:.0f} tokens an answer")
    if "loss" in score:
        parts.append(f"loss {score['loss']:.4f} nats/token, {score['bits_per_byte']:.4f} bits/byte")
        if score.get("cut_rows"):
            parts.append(f"{score['cut_rows']} traces cut to seq_len")
    return ", ".join(parts)
