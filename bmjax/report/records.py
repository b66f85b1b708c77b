"""Reads what a run left in files for its report: training metrics and merge reports. Called by page.py.

A missing or broken file is a reason in words and no error: a report of a damaged run is better than none.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.report.render import number

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Kept:
    """One model in one step of a merge, in a layer or in all: the share of entries kept and |delta| / |base|."""

    step: str
    model: str
    kept: float
    move: float
    coefficient: float = math.nan  # where it was learned


def read_all(models: Mapping[str, Any], kind: str, read: Callable[[Any], Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what `read` makes of every model's file of this kind, and a line for each that it cannot read."""
    contents, lacking = {}, []
    for model, entry in models.items():
        if entry.get(kind):
            try:
                contents[model] = read(entry[kind])
            except UserError as reason:
                lacking.append(f"{model}: {reason}")
    return contents, lacking


def read_curves(directory: Path, path: Any, key: str) -> dict[str, Points]:
    """Return by key the steps and finite numbers of metrics.jsonl, which has to have `key`."""
    values: dict[str, list[tuple[float, float]]] = {}
    for line in _read(directory, path).splitlines():
        with contextlib.suppress(ValueError):  # a line cut off by a kill
            entry = json.loads(line)
            if isinstance(entry, dict) and (step := number(entry.get("step"))) is not None:
                for name, value in entry.items():
                    if (finite := number(value)) is not None:
                        values.setdefault(name, []).append((step, finite))
    if key not in values:
        raise UserError(f"{path} has no {key}" if values else f"{path} holds no step")
    return dict(values)


def read_merge(directory: Path, path: Any) -> Mapping[str, Any]:
    """Return the content of merge_report.json."""
    try:
        report = json.loads(_read(directory, path))
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(report, dict) or not isinstance(report.get("layers"), dict):
        raise UserError(f"{path} has no layers")
    return report


def _read(directory: Path, path: Any) -> str:
    try:
        return (directory / path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is missing") from None


def kept(summary: Any) -> list[Kept]:
    """Return the steps and models of one layer's summary, in the merge's order."""
    cells = []
    for step, entry in summary.items() if isinstance(summary, dict) else ():
        models = entry.get("models") if isinstance(entry, dict) else None
        for model, statistics in models.items() if isinstance(models, dict) else ():
            share, delta = number(statistics.get("kept")), number(statistics.get("delta_norm"))
            reference = number(entry.get("reference_norm"))
            move = delta / reference if delta is not None and reference else math.nan
            if share is not None:
                coefficient = number(statistics.get("coefficient"))
                cells.append(Kept(step, model, share, move, math.nan if coefficient is None else coefficient))
    return cells


def layers(report: Mapping[str, Any]) -> dict[str, list[Kept]]:
    """Return every layer's cells from the input to the output: embedding, numbered layers, final norm, head."""
    depth = {"embed_tokens": -1, "norm": 1 << 30, "lm_head": 1 << 31}
    cells = {str(layer): kept(summary) for layer, summary in report["layers"].items()}
    order = sorted(cells, key=lambda name: (int(name) if name.isdecimal() else depth.get(name, 1 << 29), name))
    return {name: cells[name] for name in order if cells[name]}


def thinned(points: Points, most: int = 400) -> Points:
    """Return at most `most` points, each the mean of its stretch, so that a long run stays a small page."""
    size = max(1, math.ceil(len(points) / most))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


def smoothed(points: Points) -> Points:
    """Return the running mean over 1/12 of the run around each point.

    At the start the window shrinks on both sides, so that a steep beginning is not flattened. At the end it shrinks on
    the right side only, so that the last value is a mean too.
    """
    reach = max(1, len(points) // 24)
    index = np.arange(len(points))
    left = np.minimum(reach, index)
    right = np.minimum(left, len(points) - 1 - index)
    sums = np.cumsum([0.0, *(y for _, y in points)])
    means = (sums[index + right + 1] - sums[index - left]) / (left + right + 1)
    return list(zip([x for x, _ in points], means.tolist(), strict=True))
