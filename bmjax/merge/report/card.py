"""Writes the model card of a merge: README.md, for people and for the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bmjax.io.hub import split_revision
from bmjax.merge.report.statistics import methods_by_step

NAME = "README.md"


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the model card from `report`, the content of merge_report.json.

    Its head is as the hub reads it. Names of models are shown and not obeyed.
    """
    # The head: ids of hub models, unless directories here have such names.
    names = [split_revision(source["directory"])[0] for source in report["sources"].values()]
    hub_ids = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "bmjax"]}
    if hub_ids and not any(Path(name).exists() for name in hub_ids):
        head["base_model"] = hub_ids
    lines = ["---", _yaml(head), "---", "", "# A merge", ""]
    # The models, and what was taken of each.
    steps = methods_by_step(report)
    methods = ", then ".join(map(_code, steps.values()))
    lines += [f"Made by bmjax with {methods}. Arithmetic in float32, one rounding at the end.", "", "## Models", ""]
    lines += ["| model | from | tensors | stored as | checksum of what was read |", "|---|---|---|---|---|"]
    for name, source in report["sources"].items():
        cells = (name, source["directory"], str(source["tensors"]), ", ".join(source["dtypes"]), source["checksum"])
        lines.append("| " + " | ".join(map(_code, cells)) + " |")
    lines += ["", "## What was taken", ""]
    for name, method in steps.items():
        lines += _step(name, method, report["total"][name])
    if "held_out_loss" in report:
        lines += ["Mean loss on held-out rows of each model's domain, nats a token:", ""]
        for stage, losses in report["held_out_loss"].items():
            by_domain = ", ".join(f"{_code(name)} {loss:.4f}" for name, loss in losses.items())
            lines.append(f"- {stage}{' (kept)' if stage == report['kept'] else ''}: {by_domain}")
        lines.append("")
    # How to make it again.
    recipe = _yaml(report["recipe"])
    fence = "`" * max(3, _longest_run(recipe) + 1)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["## Recipe", "", f"{fence}yaml", recipe, fence, ""]
    lines += [f"Seed {report['seed']}. Made with {versions}. By tensor and layer: `merge_report.json`.", ""]
    (folder / NAME).write_text("\n".join(lines), encoding="utf-8")


def _step(name: str, method: str, summary: Mapping[str, Any]) -> list[str]:
    moved = summary["moved_norm"] / max(summary["reference_norm"], 1e-30)
    columns = {"entries taken": ("kept", ".1%"), "norm of its change": ("delta_norm", ".4g")}
    if any("coefficient" in values for values in summary["models"].values()):
        columns["mean coefficient"] = ("coefficient", ".2f")
    lines = [
        f"{_code(name)}: {_code(method)}, moved {moved:.2%} of its base's norm; {summary['sign_conflicts']:.1%} of the "
        "entries were raised by one model and lowered by another.",
        "",
        f"| model | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for model, values in summary["models"].items():
        cells = [_code(model), *(format(values[key], form) for key, form in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    if summary["cosines"]:
        pairs = "; ".join(f"{_code(pair)} {value:.3f}" for pair, value in summary["cosines"].items())
        lines += ["", f"Cosines between the changes: {pairs}."]
    if "mask_jaccard_of_textbook" in summary:
        jaccard = summary["mask_jaccard_of_textbook"]
        lines += [
            "",
            "The importance is computed in a form that does not cancel. The textbook's formula would have kept other "
            f"entries: its mask agrees with this one (Jaccard) to {jaccard['float32']:.3f} in float32 and "
            f"{jaccard['bfloat16']:.3f} in bfloat16 (sampled in {summary['sampled']} tensors).",
        ]
    return [*lines, ""]


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip()


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _code(text: str) -> str:
    """Return `text` as code that Markdown does not look into, also in a table."""
    plain = " ".join(text.split()).replace("|", "\\|")
    fence, space = "`" * (_longest_run(plain) + 1), " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"
