"""Chooses questions for the report at which a reader sees how the models differ, and reads what each answered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.evaluate.samples import read_samples

LONGEST_ANSWER = 2000  # characters; of longer ones the beginning and the end are shown

# What makes a question worth showing, the best first: right after the merge, right before it, answered alike.
KINDS = (
    "the merged model is right, the backbone wrong",
    "the backbone is right, the merged model wrong",
    "both are right",
    "both are wrong",
)


@dataclass(frozen=True)
class Question:
    """A question of the test with the first answer of every model.

    kind: what it shows, see KINDS. answers: by model, (verdict, text, characters left out of its middle).
    """

    kind: str
    prompt: str
    reference: str
    answers: Mapping[str, tuple[str, str, int]]


def read_answers(directory: Path, models: Mapping[str, Any]) -> tuple[dict[str, list[Question]], list[str]]:
    """Return the questions to show by domain, and a line for each file of samples that cannot be read.

    Of each kind the first question is taken, in the order of the test. Without a merged or a backbone model, or where
    nothing tells the questions apart, it is the first question that all models were asked.

    Arguments:
        directory: of the run.
        models: of report.json; `samples` is the directory of a model's samples under `directory`. A merge that was
            chosen is shown once, as the merged model.
    """
    by_domain: dict[str, dict[str, dict[str, Any]]] = {}
    lacking = []
    for model, entry in models.items():
        for domain, score in (entry.get("scores") or {}).items():
            is_merged = model.startswith("merge/") and entry.get("samples") == models.get("merged", {}).get("samples")
            if not entry.get("samples") or "accuracy" not in score or is_merged:
                continue
            path = directory / entry["samples"] / f"{domain}.jsonl"
            try:
                samples = list(read_samples(path).values())
            except (OSError, UserError) as error:
                lacking.append(f"{model}: {error}")
                continue
            if not samples:
                lacking.append(f"{model}: {entry['samples']}/{domain}.jsonl holds no sample")
            first: dict[str, Any] = {}
            for sample in samples:
                first.setdefault(str(sample.get("prompt")), sample)
            by_domain.setdefault(domain, {})[model] = first
    chosen = {domain: _questions(answers) for domain, answers in by_domain.items()}
    return {domain: questions for domain, questions in chosen.items() if questions}, lacking


def _questions(answers: Mapping[str, Mapping[str, Any]]) -> list[Question]:
    """Return the first question of each kind, in the order of KINDS. answers: samples by model and prompt."""
    prompts = [prompt for prompt in next(iter(answers.values())) if all(prompt in known for known in answers.values())]
    shown: dict[str, Question] = {}
    for prompt in prompts:
        verdicts = {model: known[prompt].get("verdict") for model, known in answers.items()}
        kind = _kind(verdicts.get("merged"), verdicts.get("backbone"))
        if kind not in shown:
            samples = {model: known[prompt] for model, known in answers.items()}
            reference = _shortened(str(next(iter(samples.values())).get("reference")))[0]
            texts = {model: _shortened(str(sample.get("answer", ""))) for model, sample in samples.items()}
            by_model = {model: (str(verdicts[model]), *texts[model]) for model in samples}
            shown[kind] = Question(kind, prompt, reference, by_model)
    return sorted(shown.values(), key=lambda question: [*KINDS, question.kind].index(question.kind))


def _kind(merged: Any, backbone: Any) -> str:
    if {merged, backbone} <= {"right", "wrong"}:
        return KINDS[{("right", "wrong"): 0, ("wrong", "right"): 1, ("right", "right"): 2}.get((merged, backbone), 3)]
    return ""


def _shortened(text: str) -> tuple[str, int]:
    """Return a text without its middle where it is too long, and how many characters that left out."""
    left_out = len(text) - LONGEST_ANSWER
    if left_out <= 0:
        return text, 0
    half = LONGEST_ANSWER // 2
    return f"{text[:half]}\n[…]\n{text[-half:]}", left_out
