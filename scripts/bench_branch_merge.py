#!/usr/bin/env python
"""Branches, merges and the mixture side by side over several seeds: the tables of docs/results.md.

    .venv/bin/python scripts/bench_branch_merge.py --seeds 5 [--config CONFIG] [--output runs/bench]

Every seed is a whole `bmjax demo`, or `bmjax run CONFIG`: other problems, initial weights and order of rows. To the
demo's merges come those of MERGES. The demo's VARIANTS (branches in rounds) are runs of their own from the backbone and
rows of the seed, with its mixture to compare with (--mixtures: also one trained as they are). A killed bench continues.

For exploring: --loss asks no questions, --only makes some of the merges, or those of LONGER, --variants some of the
variants ("" for none), --first begins at another seed, and key=value overrides what `bmjax run` reads.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bmjax.config import UserError, nearest, read_yaml
from bmjax.demo.run import CONFIG, run_demo
from bmjax.io.atomic import write_atomic
from bmjax.parallel.start import use_cpu_cores
from bmjax.pipeline.phases import run
from bmjax.pipeline.settings import RunSettings

# Student's t, 97.5% quantile, by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# How a measure is printed: by what it is multiplied, digits, the unit in a table's head, what the table is called.
SCALES = {"accuracy": (100, 1, ", %", "Accuracy"), "loss": (1, 4, "", "Held-out loss, nats a token")}
# What a token costs beside one that is trained on: forward alone is a third of forward and backward.
FORWARD_ONLY = {"grams": 1 / 3, "held_out": 1 / 3, "distilling_teachers": 1 / 3}

CALIBRATION = {
    "start": 1.4, "off_diagonal": 1.0, "rows": 16, "batch": 2, "documents": 500, "held_out": 16, "judged": 128,
    "seq_len": 128, "remat": "none",
}  # fmt: skip
MODELS = {"base_model": "backbone", "models": ["math", "code", "science"]}
MERGES = {
    "distilled": {
        "merge_method": "regmean",
        **MODELS,
        "parameters": CALIBRATION | {"distill": 12, "batch": 5, "distill_rate": 2e-4},
    },
    "layerwise": {
        "merge_method": "layerwise",
        **MODELS,
        "parameters": {
            "rows": 16, "batch": 2, "steps": 60, "documents": 500, "held_out": 16, "judged": 128, "seq_len": 128,
        },
    },
    "ties": {"merge_method": "ties", **MODELS, "parameters": {"weight": 1.0, "density": 0.5}},
}  # fmt: skip
# Long distillations, on more documents: made where --only names them.
_LONG = CALIBRATION | {"batch": 5, "documents": 3000, "distill_rate": 3e-4, "distill_temperature": 2.0}
LONGER = {
    "distilled_40": {"merge_method": "regmean", **MODELS, "parameters": _LONG | {"distill": 40}},
    "distilled_80": {"merge_method": "learned", **MODELS, "parameters": _LONG | {"steps": 16, "distill": 80}},
    "distilled_120": {"merge_method": "learned", **MODELS, "parameters": _LONG | {"steps": 16, "distill": 120}},
    "distilled_200": {"merge_method": "learned", **MODELS, "parameters": _LONG | {"steps": 16, "distill": 200}},
}
SPLITS = ("train", "validation", "test")


def in_rounds(rounds: int, learning_rate: float) -> dict[str, Any]:
    """Keys of `bmjax run` for branches in rounds, with half of the sum of the task vectors after each."""
    merge = {"merge_method": "task_arithmetic", **MODELS, "parameters": {"weight": 0.5}}
    return {
        "rounds": rounds, "round_merge": "task_arithmetic", "merges": {"task_arithmetic": merge},
        "branch.learning_rate": learning_rate,
    }  # fmt: skip


# NAME: keys of `bmjax run` that differ from those of the seed's own run. Three and four times its learning rate.
VARIANTS: dict[str, dict[str, Any]] = {"rounds": in_rounds(15, 2.1e-3), "more_rounds": in_rounds(30, 2.8e-3)}


def interval(values: list[float], digits: int, unit: str = "") -> str:
    """Mean and half width of the 95% interval of the mean over seeds, as a cell of docs/results.md."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        half = T975.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
        text += f" ±{half:.{digits}f}"
    return (text + unit).replace("-", "−")


def better_everywhere(report: dict[str, Any], model: str, key: str) -> bool:
    """Whether `model` beats the backbone in every domain by accuracy (higher) or loss (lower)."""
    sign = 1 if key == "accuracy" else -1
    scores, backbone = report["models"][model]["scores"], report["models"]["backbone"]["scores"]
    return all(sign * (scores[d][key] - backbone[d][key]) > 0 for d in backbone)


def measured(reports: list[dict[str, Any]]) -> list[str]:
    """What there is a score of: accuracy only where a domain has questions."""
    return [name for name in SCALES if name in next(iter(reports[0]["models"]["backbone"]["scores"].values()))]


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table of a head and rows; numbers stand right."""
    lines = ["| " + " | ".join(cell.replace("_", r"\_") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])


def table(reports: list[dict[str, Any]], key: str) -> str:
    """The table of one measure over all seeds. The gain is a mean of differences within a seed: seeds differ more."""
    scale, digits, unit, _ = SCALES[key]
    domains = list(reports[0]["models"]["backbone"]["scores"])
    head = [f"{name}{unit}" for name in [*domains, "mean"]]
    rows = [["model", *head, "mean − backbone", "seeds better in every domain"]]
    if key == "accuracy":
        rows[0].append("training tokens")
    for model in reports[0]["models"]:
        scores = [[scale * r["models"][model]["scores"][d][key] for r in reports] for d in domains]
        means = [scale * mean_score(r, model, key) for r in reports]
        gains = [score - scale * mean_score(r, "backbone", key) for score, r in zip(means, reports, strict=True)]
        wins = sum(better_everywhere(r, model, key) for r in reports)
        cells = [interval(values, digits) for values in (*scores, means, gains)] + [str(wins)]
        if model == "backbone":
            cells[-2:] = ["–", "–"]
        if key == "accuracy":
            tokens = mean(r["models"][model]["tokens"] for r in reports)
            cells.append(f"{tokens / 1000:.0f}k" if tokens else "0")
        if model == "merged":
            cells = [f"**{cell}**" for cell in cells[: len(domains) + 2]] + cells[len(domains) + 2 :]
        rows.append([f"**{model}**" if model == "merged" else model, *cells])
    return markdown(rows)


def mean_score(report: dict[str, Any], model: str, key: str) -> float:
    """A model's mean over domains."""
    scores = report["models"][model]["scores"]
    return mean(scores[domain][key] for domain in scores)


def way(report: dict[str, Any], model: str, key: str, mixture: str = "mixture") -> float:
    """Share of the way from the backbone to a mixture that a model went, by the mean over domains."""
    start, end = (mean_score(report, name, key) for name in ("backbone", mixture))
    return (mean_score(report, model, key) - start) / (end - start)


def cost(directory: Path, report: dict[str, Any], name: str) -> dict[str, float]:
    """Tokens that a merge and those between its rounds took beside the branches' training, and what they compute.

    compute: in tokens trained on.
    """
    merge_reports = [
        report["models"][name]["merge_report"],
        *(r["merge_report"] for r in report.get("rounds", [])[:-1]),
    ]
    costs = {"tokens": 0.0, "compute": 0.0}
    for path in merge_reports:
        for purpose, tokens in json.loads((directory / path).read_text()).get("tokens", {}).items():
            costs["tokens"] += tokens
            costs["compute"] += tokens * FORWARD_ONLY.get(purpose, 1.0)
    return costs


def way_table(reports: list[dict[str, Any]]) -> str:
    """The share of the way to the mixture that each merge closes, and what it took beside the branches' training."""
    keys = measured(reports)[::-1]
    rows = [["merge", *(f"by {key}" for key in keys), "tokens, of the mixture's", "compute, of the mixture's"]]
    models = reports[0]["models"]
    for model in (name for name in models if "merge/" in name):
        costs = [
            mean(r["models"][model]["cost"][kind] / r["models"]["mixture"]["tokens"] for r in reports)
            for kind in ("tokens", "compute")
        ]
        cost_cells = [f"{100 * cost:.1f} %" if cost else "0" for cost in costs]
        # The seed's mixture, and that of a variant where it has one.
        for mixture in dict.fromkeys(["mixture", model.partition("merge/")[0] + "mixture"]):
            if mixture not in models:
                continue
            shares = [interval([100 * way(r, model, key, mixture) for r in reports], 1, " %") for key in keys]
            note = "" if mixture == "mixture" else ", to a mixture trained as they are"
            rows.append([model.replace("merge/", "") + note, *shares, *cost_cells])
    return markdown(rows)


def variant(report: dict[str, Any], base: Path, name: str, mixture: bool) -> dict[str, Any]:
    """Run a variant from the backbone and rows of a seed's run in `base`; its report, with costs.

    mixture: train one with the variant's keys, too. Else it has one step, for the seed's own is compared with.
    """
    config = report["config"]
    values = {key: config[key] for key in ("seed", "template", "branch", "choose", "evaluate", "run_programs")} | {
        "student": str((base / report["models"]["backbone"]["hf"]).resolve()),
        "domains": {
            domain: {
                split: {"data": str((base / "data" / domain / f"{split}.jsonl").resolve())} for split in SPLITS
            } | {key: settings[key] for key in ("judge", "branch")}
            for domain, settings in config["domains"].items()
        },
        "mixture": {} if mixture else {"steps": 1},
    }  # fmt: skip
    directory = base.with_name(f"{base.name}-{name}")
    keys = [f"{key}={json.dumps(value)}" for key, value in VARIANTS[name].items()]
    return with_costs(directory, run(RunSettings.read(values, keys), directory))


def with_costs(directory: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Add to every merge of a report what it cost beside the branches' training."""
    for name, model in report["models"].items():
        if name.startswith("merge/"):
            model["cost"] = cost(directory, report, name)
    return report


def seed_report(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run a seed and its variants; one report with the models of all."""
    base = Path(arguments.output) / f"seed{seed}"
    overrides = [*overrides, f"seed={seed}"]
    if arguments.config is None:
        report = run_demo(base, overrides)
    else:
        report = run(RunSettings.read(arguments.config, overrides), base)
    report = with_costs(base, report)
    report["models"] |= {"merged": report["models"].pop("merged")}
    for name in arguments.variants:
        models = variant(report, base, name, arguments.mixtures)["models"]
        wanted = [key for key in models if key.startswith("merge/") or (key == "mixture" and arguments.mixtures)]
        report["models"] |= {f"{name}/{key}": models[key] for key in wanted}
    report["models"] |= {"mixture": report["models"].pop("mixture")}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--config", help="of `bmjax run`; default: the demo")
    parser.add_argument("--output", default="runs/bench", help="one run directory per seed and variant lies in it")
    parser.add_argument("--only", help="merges of the config to make, by name, separated by commas; default: all")
    parser.add_argument("--variants", help="variants to run, by name, separated by commas; default: all")
    parser.add_argument("--mixtures", action="store_true", help="train a mixture with every variant's keys, too")
    parser.add_argument("--loss", action="store_true", help="held-out loss alone: nothing is generated")
    parser.add_argument("overrides", nargs="*", help="key=value, as for bmjax run")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    named = VARIANTS if arguments.variants is None else filter(None, arguments.variants.split(","))
    arguments.variants = list(named)
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"--variants: no '{name}'{nearest(name, list(VARIANTS))}")
    if arguments.config is not None:
        arguments.variants = []  # they are the demo's
    use_cpu_cores()
    overrides = [*arguments.overrides, *(["evaluate.accuracy=false"] if arguments.loss else [])]
    reports = []
    try:
        merges = read_yaml(arguments.config or CONFIG)["merges"] | (MERGES if arguments.config is None else {})
        wanted = arguments.only.split(",") if arguments.only else list(merges)
        merges |= LONGER if arguments.config is None else {}
        for name in wanted:
            if name not in merges:
                parser.error(f"--only: no merge is named '{name}'{nearest(name, list(merges))}")
        overrides.append(f"merges={json.dumps({name: merges[name] for name in wanted})}")
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            reports.append(seed_report(arguments, seed, overrides))
    except UserError as error:
        print(f"bench_branch_merge: error: {error}", file=sys.stderr)
        return 2
    counts = [s["n"] for r in reports for s in r["models"]["merged"]["scores"].values() if "n" in s]
    each = f", {min(counts)} test rows a domain" if counts else ""
    print(f"{len(reports)} seeds{each}; mean over seeds, ± half a 95% interval of that mean")
    for key in measured(reports):
        print(f"\n{SCALES[key][3]}:\n\n{table(reports, key)}")
    print(f"\nThe share of the way from the backbone to the mixture, means over domains:\n\n{way_table(reports)}\n")
    print(f"merged (chosen on validation): {', '.join(r['chosen']['merge'] for r in reports)}")
    for key in measured(reports):
        wins = sum(better_everywhere(r, "merged", key) for r in reports)
        print(f"merged beats the backbone in every domain by {key} in {wins} of {len(reports)} seeds")
    write_atomic(Path(arguments.output) / "bench.json", json.dumps(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
