"""The table models x domains as values, as text and as Markdown; and what it says, in sentences.

A report is report.json's content. Models may lack a domain, a domain its accuracy or its loss: such cells are empty.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
Models = Mapping[str, Any]
EMPTY = "–"
TITLES = {"accuracy": "accuracy, %", "loss": "held-out loss, nats/token"}
HIGHER_IS_BETTER = {"accuracy": True, "loss": False}


@dataclass(frozen=True)
class Column:
    """One measure of one domain (or its mean over the domains) for every model that has it, and the best of them."""

    measure: str
    title: str
    values: Mapping[str, float]
    halves: Mapping[str, float]
    best: frozenset[str]


def number(value: Any) -> float | None:
    """A finite number as float; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def score(models: Models, model: str, domain: str, measure: str) -> float | None:
    scores = (models.get(model) or {}).get("scores") or {}
    return number((scores.get(domain) or {}).get(measure))


def interval(models: Models, model: str, domain: str) -> tuple[float, float] | None:
    """The 95% interval of an accuracy, as shares."""
    scores = (models.get(model) or {}).get("scores") or {}
    ends = [number(end) for end in (scores.get(domain) or {}).get("ci95") or ()]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def domains(models: Models, measure: str) -> list[str]:
    """The domains in which some model has this measure, in order of appearance."""
    found = {domain: None for m in models.values() for domain in m.get("scores") or {}}
    return [d for d in found if any(score(models, m, d, measure) is not None for m in models)]


def columns(models: Models) -> list[Column]:
    """Accuracy of every domain and its mean, then held-out loss. A mean needs a model's value in every domain."""
    found = []
    for measure in TITLES:
        names = domains(models, measure)
        parts: list[dict[str, float]] = []
        for domain in names:
            values, halves = {}, {}
            for model in models:
                value = score(models, model, domain, measure)
                if value is None:
                    continue
                values[model] = value
                ends = interval(models, model, domain) if measure == "accuracy" else None
                if ends:
                    halves[model] = (ends[1] - ends[0]) / 2
            parts.append(values)
            found.append(Column(measure, domain, values, halves, _best(values, measure)))
        if len(names) > 1:
            whole = [model for model in models if all(model in values for values in parts)]
            means = {model: sum(values[model] for values in parts) / len(parts) for model in whole}
            found.append(Column(measure, "mean", means, {}, _best(means, measure)))
    return found


def _best(values: Mapping[str, float], measure: str) -> frozenset[str]:
    if not values:
        return frozenset()
    target = max(values.values()) if HIGHER_IS_BETTER[measure] else min(values.values())
    return frozenset(model for model, value in values.items() if value == target)


def shown(measure: str, value: float) -> str:
    """A value as tables print it: accuracy in percent, loss in nats a token."""
    return f"{100 * value:.1f}" if measure == "accuracy" else f"{value:.4f}"


def count(value: Any) -> str:
    """A number of tokens, short: 940, 12.3k, 1.23M, 4.56B."""
    size = number(value)
    if size is None:
        return EMPTY
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(size) >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:.0f}"


def one_line(text: Any) -> str:
    """Text without line breaks and control characters (a terminal would obey them)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def join(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else "none"


# What the numbers say


@dataclass(frozen=True)
class Comparison:
    """One model against another by one measure: the gain of each domain (positive is better), and both means."""

    measure: str
    gains: Mapping[str, float]
    before: float
    after: float

    @property
    def better(self) -> list[str]:
        return [domain for domain, gain in self.gains.items() if gain > 0]


def compare(models: Models, model: str, against: str, measure: str) -> Comparison | None:
    """`model` against another in the domains in which both have the measure; None where there is none."""
    sign = 1 if HIGHER_IS_BETTER[measure] else -1
    pairs = {
        d: (score(models, against, d, measure), score(models, model, d, measure)) for d in domains(models, measure)
    }
    both = {d: (old, new) for d, (old, new) in pairs.items() if old is not None and new is not None}
    if not both:
        return None
    gains = {d: sign * (new - old) for d, (old, new) in both.items()}
    before, after = (sum(pair[i] for pair in both.values()) / len(both) for i in (0, 1))
    return Comparison(measure, gains, before, after)


def headline(report: Report) -> list[str]:
    """Sentences made from the numbers: merged against the backbone, then against the mixture."""
    models = report["models"]
    if "merged" not in models:
        return ["This run has no merged model."]
    name = one_line((report.get("chosen") or {}).get("merge") or "")
    subject = f"The merged model ({name})" if name else "The merged model"
    said = []
    for measure in TITLES:
        result = compare(models, "merged", "backbone", measure)
        if result:
            said.append(_against_backbone(subject, result))
            subject = "It"
            if measure == "accuracy" and (note := _unsure(models, result.better)):
                said.append(note)
    if not said:
        said.append("The merged model and the backbone have no measure in common.")
    return [*said, *_against_mixture(models)]


def _against_backbone(subject: str, result: Comparison) -> str:
    better, total = len(result.better), len(result.gains)
    change = join([f"{one_line(domain)} {_gain(result.measure, gain)}" for domain, gain in result.gains.items()])
    unit = " points" if result.measure == "accuracy" else ""
    where = (
        f"in the one domain, {one_line(next(iter(result.gains)))}," if total == 1 == better
        else f"in {'both' if total == 2 else f'all {total}'} domains" if better == total
        else f"in {better} of {total} domains" if better else "in no domain"
    )  # fmt: skip
    by = "by accuracy" if result.measure == "accuracy" else "by held-out loss"
    means = "" if total == 1 else f"; mean {_both(result)}"
    return f"{subject} beats the backbone {where} {by}: {change}{unit}{means}."


def _gain(measure: str, gain: float) -> str:
    """With the sign of the number itself: a better loss is a smaller one."""
    signed = gain if HIGHER_IS_BETTER[measure] else -gain
    text = f"{100 * signed:+.1f}" if measure == "accuracy" else f"{signed:+.4f}"
    return text.replace("-", "−")


def _both(result: Comparison) -> str:
    unit = " %" if result.measure == "accuracy" else ""
    return f"{shown(result.measure, result.before)} → {shown(result.measure, result.after)}{unit}"


def _unsure(models: Models, better: Sequence[str]) -> str:
    """Where a gain in accuracy lies within its own 95% interval: the two models' intervals, added in squares."""
    unsure = []
    for domain in better:
        old, new = interval(models, "backbone", domain), interval(models, "merged", domain)
        gain = (score(models, "merged", domain, "accuracy") or 0) - (score(models, "backbone", domain, "accuracy") or 0)
        if old and new and gain < math.hypot((old[1] - old[0]) / 2, (new[1] - new[0]) / 2):
            unsure.append(one_line(domain))
    if not unsure:
        return ""
    return f"In {join(unsure)} the gain is within what chance can give with so many questions (95% interval)."


def _against_mixture(models: Models) -> list[str]:
    """Whether one model trained on all domains at once is better: the question that a merge has to answer."""
    results = [r for m in TITLES if (r := compare(models, "merged", "mixture", m)) is not None]
    if not results:
        return []
    parts, wins = [], 0
    for result in results:
        old, new = shown(result.measure, result.before), shown(result.measure, result.after)
        ahead = (result.before > result.after) == HIGHER_IS_BETTER[result.measure]
        wins += ahead and result.before != result.after
        unit = " %" if result.measure == "accuracy" else ""
        label = "accuracy" if result.measure == "accuracy" else "held-out loss"
        parts.append(f"{'mean ' if len(result.gains) > 1 else ''}{label} {old}{unit} against {new}{unit}")
    verdict = (
        "The mixture, one model trained on all domains together, wins" if wins == len(results)
        else "The mixture, one model trained on all domains together, does not win" if wins == 0
        else "Neither the mixture, one model trained on all domains together, nor the merge wins on every measure"
    )  # fmt: skip
    own, other = (count(models[name].get("tokens")) for name in ("mixture", "merged"))
    spent = "" if EMPTY in (own, other) else f", with {own} training tokens against {other}"
    if own == other != EMPTY:
        spent = f", both with {own} training tokens"
    return [f"{verdict}: {join(parts)}{spent}."]


# As text


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def cell(column: Column, model: str) -> str:
    """A value with half of its 95% interval, where it has one."""
    if model not in column.values:
        return EMPTY
    text = shown(column.measure, column.values[model])
    return f"{text} ±{shown(column.measure, column.halves[model])}" if model in column.halves else text


def summary_table(report: Report) -> str:
    """The table models x domains for a terminal of 80 columns: one block for accuracy, one for held-out loss.

    `*` marks the best of a column; below stands what the numbers say.
    """
    models = report["models"]
    blocks = []
    for measure in TITLES:
        own = [column for column in columns(models) if column.measure == measure]
        if not own:
            continue
        rows = [[TITLES[measure], *(one_line(column.title) for column in own), "tokens"]]
        for model, entry in models.items():
            marked = [cell(column, model) + ("*" if model in column.best else " ") for column in own]
            rows.append([one_line(model), *marked, count(entry.get("tokens"))])
        rows[0][1:-1] = [f"{title} " for title in rows[0][1:-1]]
        blocks.append(grid(rows))
    blocks.append("* best of its column; ± half of the 95% interval; tokens: training tokens after the backbone")
    return "\n\n".join([*blocks, "\n".join(headline(report))])


def markdown_table(report: Report) -> str:
    """The table models x domains for a README: accuracy and held-out loss side by side, the best of a column bold."""
    models = report["models"]
    own = columns(models)
    units = {"accuracy": "%", "loss": "loss"}
    header = ["model", *(f"{_markdown(c.title)}, {units[c.measure]}" for c in own), "training tokens"]
    rows = [header, ["---", *("---:" for _ in own), "---:"]]
    for model, entry in models.items():
        marked = [f"**{cell(c, model)}**" if model in c.best else cell(c, model) for c in own]
        rows.append([_markdown(model), *marked, count(entry.get("tokens"))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown(text: Any) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(text))
