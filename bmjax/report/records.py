"""What a run left in files, read for the report: training metrics and merge reports. A broken file is a reason, not an
error: a report of an old or damaged run is better than none."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.report.tables import number

POINTS = 400


@dataclass(frozen=True)
class Curve:
    """One training: steps and what was measured at them, by key; only finite numbers."""

    name: str
    values: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Kept:
    """One step of a merge in one layer (or in all): per model the share of entries kept and |delta| / |base|."""

    step: str
    model: str
    kept: float
    move: float


def read_curve(directory: Path, name: str, relative: Any) -> Curve | str:
    """A training's metrics.jsonl, or why there is none. Lines cut off by a kill are left out."""
    text = _read(directory, relative)
    if text is None:
        return f"{relative or 'metrics.jsonl'} is missing"
    values: dict[str, list[tuple[float, float]]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            continue
        for key, value in entry.items():
            if (finite := number(value)) is not None:
                values.setdefault(key, []).append((step, finite))
    return Curve(name, values) if values else f"{relative} holds no step"


def read_merge(directory: Path, relative: Any) -> Mapping[str, Any] | str:
    """A merge's merge_report.json, or why there is none."""
    text = _read(directory, relative)
    if text is None:
        return f"{relative or 'merge_report.json'} is missing"
    try:
        found = json.loads(text)
    except ValueError:
        return f"{relative} is not JSON"
    if not isinstance(found, dict) or not isinstance(found.get("layers"), dict):
        return f"{relative} has no layers"
    return found


def _read(directory: Path, relative: Any) -> str | None:
    if not isinstance(relative, str) or not relative:
        return None
    try:
        return (directory / relative).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def kept(summary: Any) -> list[Kept]:
    """The steps and models of one layer's summary, in the merge's order."""
    found = []
    for step, entry in summary.items() if isinstance(summary, dict) else ():
        models = entry.get("models") if isinstance(entry, dict) else None
        for model, own in models.items() if isinstance(models, dict) else ():
            share, delta = number(own.get("kept")), number(own.get("delta_norm"))
            reference = number(entry.get("reference_norm"))
            if share is not None:
                move = delta / reference if delta is not None and reference else math.nan
                found.append(Kept(step, model, share, move))
    return found


def layers(report: Mapping[str, Any]) -> dict[str, list[Kept]]:
    """Every layer's summary from the input to the output: embedding, numbered layers, final norm, head."""
    place = {"embed_tokens": -1, "norm": 1 << 30, "lm_head": 1 << 31}
    found = {str(layer): kept(summary) for layer, summary in report["layers"].items()}
    order = sorted(found, key=lambda name: (int(name) if name.isdecimal() else place.get(name, 1 << 29), name))
    return {name: found[name] for name in order if found[name]}


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: each the mean of its stretch, so that a long run stays a small page."""
    size = math.ceil(len(points) / most)
    parts = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean over the points around each one, 1/12 of the run.

    At the start the window shrinks on both sides, so that a steep beginning is not flattened; at the end on one, so
    that the last value is a mean too.
    """
    reach = max(1, len(points) // 24)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    line = []
    for i, (x, _) in enumerate(points):
        left = min(reach, i)
        right = min(left, len(points) - 1 - i)
        line.append((x, (sums[i + right + 1] - sums[i - left]) / (left + right + 1)))
    return line
