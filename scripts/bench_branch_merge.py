#!/usr/bin/env python
"""Branches, merges and the mixture side by side over several seeds: the table of the README.

    .venv/bin/python scripts/bench_branch_merge.py --seeds 5 [--config CONFIG] [--output runs/bench]

Every seed is a whole `bmjax demo`, or `bmjax run CONFIG`: other problems, initial weights and order of rows. A killed
bench continues.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bmjax.config import UserError
from bmjax.demo.run import run_demo
from bmjax.io.atomic import write_atomic
from bmjax.parallel.start import use_cpu_cores
from bmjax.pipeline.phases import run
from bmjax.pipeline.settings import RunSettings

# Student's t, 97.5% quantile, by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

DIGITS = {"accuracy": 3, "loss": 4}


def interval(values: list[float], digits: int) -> str:
    """Mean and half width of the 95% interval of the mean over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = T975.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def better_everywhere(report: dict[str, Any], model: str, key: str) -> bool:
    """Whether `model` beats the backbone in every domain by accuracy (higher) or loss (lower)."""
    sign = 1 if key == "accuracy" else -1
    scores, backbone = report["models"][model]["scores"], report["models"]["backbone"]["scores"]
    return all(sign * (scores[d][key] - backbone[d][key]) > 0 for d in backbone)


def measured(reports: list[dict[str, Any]]) -> list[str]:
    """What there is a score of: accuracy only where a domain has questions."""
    return [name for name in DIGITS if name in next(iter(reports[0]["models"]["backbone"]["scores"].values()))]


def table(reports: list[dict[str, Any]]) -> str:
    """The Markdown table over all seeds."""
    domains = list(reports[0]["models"]["backbone"]["scores"])
    names = measured(reports)
    head = ["model", *(f"{d} {name}" for name in names for d in [*domains, "mean", "mean minus backbone's,"]),
            "training tokens", f"seeds better everywhere ({', '.join(names)})"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model in reports[0]["models"]:
        cells = [model]
        for key in names:
            digits = DIGITS[key]
            by_domain = [[r["models"][model]["scores"][d][key] for r in reports] for d in domains]
            cells += [interval(values, digits) for values in by_domain]
            means = [mean(column) for column in zip(*by_domain, strict=True)]
            starts = [mean_score(r, "backbone", key) for r in reports]
            gains = [score - start for score, start in zip(means, starts, strict=True)]  # paired: seeds differ more
            cells += [interval(means, digits), "-" if model == "backbone" else interval(gains, digits)]
        cells.append(f"{mean(r['models'][model]['tokens'] for r in reports):,.0f}")
        wins = [str(sum(better_everywhere(r, model, name) for r in reports)) for name in names]
        cells.append("-" if model == "backbone" else f"{', '.join(wins)} of {len(reports)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_score(report: dict[str, Any], model: str, key: str) -> float:
    """A model's mean over domains."""
    scores = report["models"][model]["scores"]
    return mean(scores[domain][key] for domain in scores)


def way(report: dict[str, Any], model: str, key: str) -> float:
    """Share of the way from the backbone to the mixture that a model went, by the mean over domains."""
    start, end = (mean_score(report, name, key) for name in ("backbone", "mixture"))
    return (mean_score(report, model, key) - start) / (end - start)


def beside(models: dict[str, Any], merge: str) -> int:
    """The tokens that a merge took beside the branches' training."""
    return models[merge]["tokens"] - sum(
        model["tokens"] for name, model in models.items() if name.startswith("branch/")
    )


def closed(reports: list[dict[str, Any]]) -> list[str]:
    """The share of the way to the mixture that each merge closes, with the tokens it took beside the branches'."""
    names = [model for model in reports[0]["models"] if model.startswith("merge/")]
    lines = []
    for model in names:
        extra = [beside(r["models"], model) / r["models"]["mixture"]["tokens"] for r in reports]
        shares = "; ".join(f"{key} {interval([way(r, model, key) for r in reports], 3)}" for key in measured(reports))
        lines.append(f"{model}: {shares}; extra tokens {mean(extra):.1%} of the mixture's")
    for key in measured(reports):
        best = max(names, key=lambda model: mean(way(r, model, key) for r in reports))
        lines.append(f"closest by {key}: {best}, {interval([way(r, best, key) for r in reports], 3)} of the way")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (0, 1, ...)")
    parser.add_argument("--config", help="of `bmjax run`; default: the demo")
    parser.add_argument("--output", default="runs/bench", help="one run directory per seed lies in it")
    parser.add_argument("overrides", nargs="*", help="key=value, as for bmjax run")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    use_cpu_cores()
    reports = []
    try:
        for seed in range(arguments.seeds):
            output, overrides = Path(arguments.output) / f"seed{seed}", [*arguments.overrides, f"seed={seed}"]
            if arguments.config is None:
                reports.append(run_demo(output, overrides))
            else:
                reports.append(run(RunSettings.read(arguments.config, overrides), output))
    except UserError as error:
        print(f"bench_branch_merge: error: {error}", file=sys.stderr)
        return 2
    rows = [s["n"] for r in reports for s in r["models"]["merged"]["scores"].values() if "n" in s]
    each = f", {min(rows)} test rows a domain" if rows else ""
    print(f"{len(reports)} seeds{each}; mean over seeds, ± half a 95% interval of that mean\n")
    print(table(reports))
    chosen = [r["chosen"]["merge"] for r in reports]
    print(f"\nmerged (chosen on validation): {', '.join(chosen)}")
    for name in measured(reports):
        wins = sum(better_everywhere(r, "merged", name) for r in reports)
        print(f"merged beats the backbone in every domain by {name} in {wins} of {len(reports)} seeds")
    print("\nshare of the way from the backbone to the mixture, of the means over domains:")
    print("\n".join(closed(reports)))
    write_atomic(Path(arguments.output) / "bench.json", json.dumps(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
