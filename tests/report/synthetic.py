"""A synthetic run directory as the pipeline leaves it, and its report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.merge.recipe.recipe import read_recipe
from bmjax.merge.report.statistics import Stats
from bmjax.merge.report.statistics import report as merge_report

DOMAINS = ("math", "code", "science")
MERGES = ("linear", "task_arithmetic_0.5", "fusion_paper", "fusion_sequential", "fusion_symmetric")
SKILL = {
    "backbone": 0.0, "branch/math": 0.02, "branch/code": 0.015, "branch/science": 0.02, "merge/linear": 0.04,
    "merge/task_arithmetic_0.5": 0.05, "merge/fusion_paper": 0.018, "merge/fusion_sequential": 0.015,
    "merge/fusion_symmetric": 0.03, "mixture": 0.155,
}  # fmt: skip
RECIPES = {
    "fusion_paper": {
        "steps": [
            {"name": "mid", "merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]},
            {"name": "tinyr1", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]},
        ]
    },
    "fusion_sequential": {
        "steps": [
            {"name": "first", "merge_method": "arcee_fusion", "base_model": "backbone", "models": ["math"]},
            {"name": "second", "merge_method": "arcee_fusion", "base_model": "first", "models": ["code"]},
            {"name": "third", "merge_method": "arcee_fusion", "base_model": "second", "models": ["science"]},
        ]
    },
    "fusion_symmetric": {"merge_method": "arcee_fusion", "base_model": "backbone", "models": list(DOMAINS)},
    "task_arithmetic_0.5": {"merge_method": "task_arithmetic", "base_model": "backbone", "models": list(DOMAINS)},
    "linear": {"merge_method": "linear", "models": list(DOMAINS), "parameters": {"weight": 1.0}},
}


def synthetic_run(directory: Path, layers: int = 3, merges: tuple[str, ...] = MERGES) -> dict[str, Any]:
    """A run directory as the pipeline leaves it, with numbers of the prototype's size, and its report."""
    rng = np.random.default_rng(7)
    models: dict[str, Any] = {}
    for name in ["backbone", *(f"branch/{d}" for d in DOMAINS), *(f"merge/{m}" for m in merges), "mixture"]:
        folder = name.replace("merge/", "merges/")
        if name == "mixture":
            merged = {"hf": "merged/hf", "merge_report": "merged/hf/merge_report.json"}
            models["merged"] = models["merge/linear"] | merged
        trained, move = not name.startswith("merge/"), None
        if trained:
            move = write_metrics(directory / folder / "metrics.jsonl", name, rng)
        else:
            write_merge_report(
                directory / folder / "hf" / "merge_report.json", name.removeprefix("merge/"), layers, rng
            )
        models[name] = {
            "hf": f"{folder}/hf",
            "metrics": f"{folder}/metrics.jsonl" if trained else None,
            "merge_report": None if trained else f"{folder}/hf/merge_report.json",
            "tokens": {"backbone": 0, "mixture": 1_158_340}.get(name, 386_113 if trained else 1_158_340),
            "move": move,
            "scores": {d: synthetic_score(name, d, 600, rng) for d in DOMAINS},
            "samples": f"scores/test/{name.replace('/', '-')}/samples",
        }
        write_samples(directory / models[name]["samples"], name)
    (directory / "merged" / "hf").mkdir(parents=True)
    source = directory / "merges" / "linear" / "hf" / "merge_report.json"
    (directory / "merged" / "hf" / "merge_report.json").write_bytes(source.read_bytes())
    validation = {m: {d: synthetic_score(f"merge/{m}", d, 300, rng) for d in DOMAINS} for m in merges}
    report = {
        "models": models,
        "chosen": {
            "merge": "linear",
            "rule": "On the validation rows: the merge ahead of the backbone in most domains; then the best mean.",
            "validation": {"backbone": {d: synthetic_score("backbone", d, 300, rng) for d in DOMAINS}, **validation},
        },
        "selection": {
            "math": synthetic_selection(3109, duplicate=12, repetition=9, truncated=204, wrong=611, malformed=64),
            "code": synthetic_selection(2877, truncated=310, wrong=702, malformed=111),
            "science": synthetic_selection(3321, truncated=95, wrong=501, malformed=52, enough=31),
        },
        "stages": synthetic_stages(models, rng),
        "versions": {"bmjax": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "numpy": "2.3.1"},
        "config": {
            "seed": 0, "domains": {d: {"builtin": {"domain": d}} for d in DOMAINS},
            "branch": {"steps": 200, "learning_rate": 0.0005, "freeze": ["embed/*"]},
            "evaluate": {"max_new_tokens": 72},
        },
    }  # fmt: skip
    (directory / "report.json").write_text(json.dumps(report))
    return report


def write_samples(folder: Path, name: str) -> None:
    """The first question is right everywhere, of the next two the merges answer one, the backbone the other."""
    folder.mkdir(parents=True)
    right = {"backbone": (0, 2), "merge/linear": (0, 1)}.get(name, (0,))
    for domain in DOMAINS:
        samples = [
            {"id": f"{domain}{i}", "prompt": f"{domain} question {i}", "reference": str(i), "verdict":
             "right" if i in right else "wrong", "answer": f"<think>\nlet me see\n</think>\n{name} says {i}"}
            for i in range(4)
        ]  # fmt: skip
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def synthetic_selection(kept: int, **dropped: int) -> dict[str, Any]:
    collected = kept + sum(dropped.values())
    verdicts = {"right": kept + 1, "wrong": collected - kept - 4, "unjudged": 3}
    return {"asked": collected + 2, "failed": 2, "verdicts": verdicts, "collected": collected, "kept": kept,
            "dropped": dropped}  # fmt: skip


def synthetic_score(name: str, domain: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    base = {"math": 0.31, "code": 0.22, "science": 0.29}[domain]
    bonus = 0.11 if name.endswith(domain) else 0.0
    right = int(rng.binomial(n, base + SKILL[name] + bonus))
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    loss = 0.19 - 0.25 * SKILL[name] - 0.2 * bonus + 0.004 * rng.standard_normal()
    return {
        "accuracy": p, "ci95": [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)],
        "n": n, "k": 1, "truncated": round(0.05 * rng.random(), 4), "loss": loss,
        "bits_per_byte": loss * 0.61, "loss_tokens": int(25_000 + rng.integers(3000)),
    }  # fmt: skip


def write_metrics(path: Path, name: str, rng: np.random.Generator) -> float | None:
    """A training's metrics.jsonl, its last line cut off; returns the final move."""
    path.parent.mkdir(parents=True)
    steps = {"backbone": 900, "mixture": 600}.get(name, 200)
    lines = []
    for step in range(1, steps + 1):
        start, end = (6.2, 0.19) if name == "backbone" else (0.21, 0.15 if name == "mixture" else 0.165)
        loss = end + (start - end) * math.exp(-8 * step / steps) + 0.012 * rng.standard_normal()
        line = {
            "step": step, "epoch": step / 100, "loss": abs(loss), "grad_norm": 0.4 + 0.2 * rng.random(),
            "learning_rate": 5e-4 * min(1.0, step / 20), "tokens_per_second": 16_000 + 800 * rng.standard_normal(),
        }  # fmt: skip
        if name != "backbone":
            line["move"] = (0.03 if name == "mixture" else 0.022 + 0.0008 * len(name)) * (
                1 - math.exp(-4 * step / steps)
            )
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + '\n{"step": 9, "loss": 0.2, "le')
    return line.get("move")


def write_merge_report(path: Path, name: str, layers: int, rng: np.random.Generator) -> None:
    """Through bmjax.merge.report.statistics.report, so that the page is tested on what merges write."""
    recipe = read_recipe(RECIPES[name] | {"sources": {n: n for n in ("backbone", *DOMAINS)}})
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    tensors: dict[str, dict[str, Stats]] = {}
    for tensor in sorted(names):
        tensors[tensor] = {}
        for step in recipe.steps:
            size, selects = len(step.branches), step.method.name == "arcee_fusion"
            frozen = "embed" in tensor
            kept = rng.uniform(0.03, 0.16, size) if selects else np.ones(size)
            delta = 8 * rng.uniform(0.02, 0.04, size)
            if name == "linear":
                delta[0] = 0.0
            tensors[tensor][step.name] = Stats(
                4096, step.branches, np.diag((delta * (0 if frozen else 1)) ** 2), 64.0, 0.01, 0.0,
                4096 * kept * (0 if frozen and selects else 1),
            )  # fmt: skip
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"recipe": dict(recipe.text), **merge_report(recipe.steps, tensors)}))


def synthetic_stages(models: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    names = [
        *(f"data/{d}" for d in DOMAINS),
        "backbone",
        *(f"teach/{d}" for d in DOMAINS),
        *(f"branch/{d}" for d in DOMAINS),
    ]
    names += [
        "mixture",
        *(m for m in models if m.startswith("merge/")),
        "merged",
        *(f"evaluate/test/{m}" for m in models),
    ]
    return {
        name: {"seconds": round(float(rng.uniform(0.4, 40)), 2), "peak_rss_mib": 400 + 10.0 * i}
        for i, name in enumerate(names)
    }
