"""What a run shows: its models, their scores, the chosen merge, and report.json, which bmjax.report makes a page of."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bmjax.io import hub
from bmjax.merge.engine.files import REPORT
from bmjax.pipeline.settings import RunSettings
from bmjax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
RULE = (
    "On the validation rows, which are neither trained on nor in the test: the merge that beats the backbone in the "
    "most domains by {by}; among those the one with the best mean {by} over the domains; "
    "among those the lowest mean held-out loss; among those the first in the config."
)

Scores = dict[str, dict[str, Any]]  # by domain


@dataclass(frozen=True)
class Model:
    """A model of a run."""

    name: str  # what report.json calls it
    hf: str  # its directory, or the name of a student that exists
    stage: str | None  # that makes it; None for such a student
    metrics: str | None  # its training's metrics.jsonl under the run's directory; None without

    @property
    def made_by(self) -> tuple[str, ...]:
        """The stage that makes the model, for a Stage's `after`."""
        return () if self.stage is None else (self.stage,)

    def result(self) -> dict[str, Any]:
        """Return the result.json of a trained model, nothing of others."""
        return {} if self.metrics is None else json.loads((Path(self.hf).parent / "result.json").read_text())

    def scores(self, split: str) -> str:
        """Return the directory of the model's scores under the run's."""
        return f"scores/{split}/{self.name.replace('/', '-')}"

    def read_scores(self, directory: Path, split: str) -> Scores:
        """Return the model's scores by domain."""
        return json.loads((directory / self.scores(split) / "scores.json").read_text())


def choose(validation: dict[str, Scores], by: str) -> str:
    """Return the name of the merge that RULE chooses.

    Arguments:
        validation: scores of 'backbone' and of every merge, by domain.
        by: 'accuracy' (higher is better) or 'loss' (lower is better); a domain that has only the other counts by that.
    """
    backbone = validation["backbone"]

    def value(score: dict[str, Any]) -> float:
        by_accuracy = "accuracy" in score and (by == "accuracy" or "loss" not in score)
        return score["accuracy"] if by_accuracy else -score["loss"]

    def key(name: str) -> tuple[float, float, float]:
        scores = validation[name]
        wins = sum(value(scores[d]) > value(backbone[d]) for d in backbone)
        mean = sum(value(scores[d]) for d in backbone) / len(backbone)
        losses = [scores[d]["loss"] for d in backbone if "loss" in scores[d]]
        return wins, mean, -sum(losses) / max(1, len(losses))

    return max((name for name in validation if name != "backbone"), key=key)  # max keeps the first of equals


def build_report(
    models: list[Model], settings: RunSettings, directory: Path, winner: Model, measured: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the content of report.json.

    Arguments:
        models: backbone, branches, merges and mixture, all made and scored.
        winner: the merge that was chosen.
        measured: seconds and memory of every stage.
    """
    results = {model.name: model.result() for model in models}
    branch_tokens = sum(results[f"branch/{domain}"]["tokens"] for domain in settings.domains)
    entries: dict[str, Any] = {}
    for model in models:
        merge_report, tokens = None, results[model.name].get("tokens", 0)
        if model.name.startswith("merge/"):
            merge_report = os.path.relpath(Path(model.hf) / REPORT, directory)
            calibration = json.loads((directory / merge_report).read_text()).get("tokens", {})
            tokens = branch_tokens + sum(calibration.values())
        entries[model.name] = {
            "hf": os.path.relpath(hub.model_directory(model.hf), directory),
            "metrics": model.metrics,
            "merge_report": merge_report,
            "tokens": 0 if model.name == "backbone" else tokens,
            "move": None if model.name == "backbone" else results[model.name].get("move"),
            "scores": model.read_scores(directory, "test"),
        }
    mixture = entries.pop("mixture")
    entries["merged"] = entries[winner.name] | {"hf": "merged/hf", "merge_report": f"merged/hf/{REPORT}"}
    entries["mixture"] = mixture

    candidates = [model for model in models if model.name == "backbone" or model.name.startswith("merge/")]
    validation = {m.name.removeprefix("merge/"): m.read_scores(directory, "validation") for m in candidates}
    selection = {
        name: json.loads((directory / "teach" / name / "counts.json").read_text())
        for name, domain in settings.domains.items()
        if domain.train is None
    }
    rule = RULE.format(by=settings.choose.by)
    return {
        "models": entries,
        "chosen": {"merge": winner.name.removeprefix("merge/"), "rule": rule, "validation": validation},
        "selection": selection,
        "stages": measured,
        "versions": {"bmjax": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "config": settings.model_dump(mode="json"),
    }
