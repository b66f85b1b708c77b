"""What a run shows: its models, their scores, the chosen merge, and report.json, which bmjax.report makes a page of."""

import itertools
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from bmjax.io import hub
from bmjax.merge.engine.files import REPORT
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from bmjax.pipeline.settings import RunSettings
from bmjax.urls import Address
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


@dataclass(frozen=True)
class Round:
    """A round of a run: the model that it starts from, and the branches that it trains, by domain."""

    start: Model
    branches: dict[str, Model]


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
    models: list[Model], rounds: list[Round], settings: RunSettings, directory: Path, winner: Model,
    measured: dict[str, dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of report.json.

    Arguments:
        models: backbone, branches, merges and mixture, all made and scored.
        rounds: what every round starts from and trains; the last one's branches are among the models.
        winner: the merge that was chosen.
        measured: seconds and memory of every stage.
    """
    results = {model.name: model.result() for model in models}
    # A training that goes on from another one counts that one's tokens, too.
    branch_tokens = sum(results[f"branch/{domain}"]["tokens"] for domain in settings.domains)
    between = _between(rounds, directory)
    looked_at = between[-1]["looked_at"] if between else 0
    entries: dict[str, Any] = {}
    for model in models:
        merge_report, tokens = None, results[model.name].get("tokens", 0)
        if model.name.startswith("merge/"):
            merge_report = os.path.relpath(Path(model.hf) / REPORT, directory)
            tokens = branch_tokens + looked_at + _looked_at(Path(model.hf))
        entries[model.name] = {
            "hf": os.path.relpath(hub.model_directory(model.hf), directory),
            "metrics": model.metrics,
            "merge_report": merge_report,
            "tokens": 0 if model.name == "backbone" else tokens,
            "move": None if model.name == "backbone" else results[model.name].get("move"),
            "scores": model.read_scores(directory, "test"),
            "samples": f"{model.scores('test')}/samples",
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
    if between:
        scores = winner.read_scores(directory, "validation")
        merged = entries["merged"]
        between.append(
            {"round": len(rounds), "hf": merged["hf"], "merge_report": merged["merge_report"],
             "tokens": merged["tokens"], "looked_at": merged["tokens"] - branch_tokens,
             "validation": {d: {"loss": s["loss"]} for d, s in scores.items() if "loss" in s}}
        )  # fmt: skip
    return {
        "models": entries,
        **({"rounds": between} if between else {}),
        "chosen": {"merge": winner.name.removeprefix("merge/"), "rule": rule, "validation": validation},
        "selection": selection,
        "stages": measured,
        "run": _run_facts(directory, models),
        "versions": {"bmjax": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "config": _shown(settings),
    }


def _shown(settings: RunSettings) -> dict[str, Any]:
    """Return the settings for a report that is passed on: without passwords in the teacher's address."""
    config = settings.model_dump(mode="json")
    if config["teacher"]["base_url"]:
        config["teacher"]["base_url"] = Address.parse(config["teacher"]["base_url"]).label
    return config


def _run_facts(directory: Path, models: list[Model]) -> dict[str, Any]:
    """Return which run it was: when its last stage ended, on what, and the size of its models."""
    ended = max((marker.stat().st_mtime for marker in (directory / "stages").glob("*.json")), default=time.time())
    devices = jax.devices()
    folder = hub.model_directory(models[0].hf)
    config = ModelConfig.from_dir(folder)
    return {
        "finished": datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "parameters": spec.count(config),
        "layers": config.num_layers,
        "context": config.max_length,
    }


def _between(rounds: list[Round], directory: Path) -> list[dict[str, Any]]:
    """Return an entry for every round but the last: the start that it made, its loss, and the tokens up to there.

    tokens: those that the branches were trained on, and of them apart, looked_at: those that its merges looked at.
    """
    entries, looked_at = [], 0
    for number, (part, following) in enumerate(itertools.pairwise(rounds), 1):
        merged = directory / "rounds" / str(number) / "merged" / "hf"
        looked_at += _looked_at(merged)
        trained = sum(model.result()["tokens"] for model in part.branches.values())
        entries.append({
            "round": number, "hf": os.path.relpath(following.start.hf, directory),
            "merge_report": os.path.relpath(merged / REPORT, directory), "tokens": trained + looked_at,
            "looked_at": looked_at, "validation": following.start.read_scores(directory, "validation"),
        })  # fmt: skip
    return entries


def _looked_at(merged: Path) -> int:
    """Return how many tokens a merge put through models, to learn from or to judge by."""
    return sum(json.loads((merged / REPORT).read_text()).get("tokens", {}).values())
