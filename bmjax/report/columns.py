"""What a run's numbers say: the table models x domains as values and as text, comparisons, the headline in sentences.

A model may lack a domain, a domain its accuracy or its loss. `report` is report.json's content.
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.io.card import listed
from bmjax.report.render import EMPTY, count, latex, number, one_line, render


@dataclass(frozen=True)
class Measure:
    """A score: `sign` is 1 where higher is better, -1 where lower is. The rest says how it is named and written."""

    key: str  # in report.json
    label: str  # in a sentence
    title: str  # above table columns
    sign: int
    factor: int  # from report.json's unit to the unit shown
    digits: int
    unit: str  # behind a number in a sentence
    interval: str  # its 95% interval's key

    def text(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}"

    def change(self, difference: float) -> str:
        return f"{self.factor * difference:+.{self.digits}f}".replace("-", "−")


ACCURACY = Measure("accuracy", "accuracy", "accuracy, %", 1, 100, 1, " %", "ci95")
LOSS = Measure("loss", "held-out loss", "held-out loss, nats/token", -1, 1, 4, "", "loss_ci95")
MEASURES = (ACCURACY, LOSS)


@dataclass(frozen=True)
class Column:
    """One measure in one domain, or its mean over the domains: values and 95% intervals by model."""

    measure: Measure
    title: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    mean: bool = False

    def best(self, model: str) -> bool:
        """Return whether no other model has a better value."""
        sign = self.measure.sign
        return model in self.values and sign * self.values[model] == max(sign * v for v in self.values.values())

    def half(self, model: str) -> float:
        """Return half of the width of a model's interval."""
        return (self.intervals[model][1] - self.intervals[model][0]) / 2

    def text(self, model: str, halves: bool = True) -> str:
        """Format a model's value, with half of its interval where that is known and asked for."""
        text = self.measure.text(self.values[model]) if model in self.values else EMPTY
        return f"{text} ±{self.measure.text(self.half(model))}" if halves and model in self.intervals else text

    def ends(self, model: str) -> str:
        """Format a model's interval in words, empty where it is not known."""
        return " to ".join(map(self.measure.text, self.intervals[model])) if model in self.intervals else ""


def interval(score: Mapping[str, Any], key: str = "ci95") -> tuple[float, float] | None:
    """Return the ends of a score's 95% interval in the score's unit, None where it is not known."""
    ends = [end for value in score.get(key) or () if (end := number(value)) is not None]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def _interval_of_mean(group: Sequence[Column], model: str, mean: float) -> tuple[float, float]:
    """Return the interval of a mean of domains, whose errors are independent: their half widths add as squares."""
    below, above = (
        math.hypot(*(column.intervals[model][end] - column.values[model] for column in group)) / len(group)
        for end in range(2)
    )
    return mean - below, mean + above


def columns(models: Mapping[str, Any]) -> list[Column]:
    """Return accuracy in every domain and its mean, then held-out loss in the same way.

    `models` is what report.json has under that key. A mean needs a model's value in every domain.
    """
    table: list[Column] = []
    domains = dict.fromkeys(domain for entry in models.values() for domain in entry.get("scores") or {})
    for measure in MEASURES:
        group = []
        for domain in domains:
            scores = {name: (entry.get("scores") or {}).get(domain) or {} for name, entry in models.items()}
            values = {name: v for name, score in scores.items() if (v := number(score.get(measure.key))) is not None}
            intervals = {name: ends for name in values if (ends := interval(scores[name], measure.interval))}
            if values:
                group.append(Column(measure, domain, values, intervals))
        table += group
        if len(group) > 1:
            complete = [name for name in models if all(name in column.values for column in group)]
            means = {name: sum(column.values[name] for column in group) / len(group) for name in complete}
            known = [name for name in complete if all(name in column.intervals for column in group)]
            ends_of_means = {name: _interval_of_mean(group, name, means[name]) for name in known}
            table.append(Column(measure, "mean", means, ends_of_means, mean=True))
    return table


def compare(table: Sequence[Column], model: str, other: str) -> list[dict[str, Any]]:
    """Compare a model with another by each measure that they have in common, in the domains that both have.

    Returns for each measure: changes (by domain), text (the changes as in a sentence), before and after (the means),
    gain (above 0 where the mean became better), better (domains), unsure (domains whose gain is within its own 95%
    interval).
    """
    comparisons = []
    for measure in MEASURES:
        group = [c for c in table if c.measure is measure and not c.mean and {model, other} <= c.values.keys()]
        if not group:
            continue
        changes = {column.title: column.values[model] - column.values[other] for column in group}
        before, after = (sum(column.values[name] for column in group) / len(group) for name in (other, model))
        # The interval of a difference has half the width sqrt(a² + b²) where those of the two values have a and b.
        unsure = [
            column.title
            for column in group
            if measure is ACCURACY
            and {model, other} <= column.intervals.keys()
            and 0 < changes[column.title] < math.hypot(column.half(model), column.half(other))
        ]
        comparisons.append({
            "measure": measure, "changes": changes, "before": before, "after": after, "unsure": unsure,
            "text": listed([f"{domain} {measure.change(change)}" for domain, change in changes.items()]),
            "gain": measure.sign * (after - before),
            "better": [domain for domain, change in changes.items() if measure.sign * change > 0],
        })  # fmt: skip
    return comparisons


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return sentences made from the numbers: the merged model against the backbone, then against the mixture."""
    models = report["models"]
    table = columns(models)
    return render(
        "headline.txt.jinja",
        merged="merged" in models,
        chosen=(report.get("chosen") or {}).get("merge"),
        backbone=compare(table, "merged", "backbone"),
        mixture=compare(table, "merged", "mixture"),
        tokens=[count((models.get(name) or {}).get("tokens")) for name in ("mixture", "merged")],
    ).splitlines()


def summary_table(report: Mapping[str, Any]) -> str:
    """Return the table models x domains for a terminal of 80 columns: accuracy, held-out loss, the headline."""
    models, blocks = report["models"], []
    for _, same in itertools.groupby(columns(models), lambda column: column.measure):
        group = list(same)
        rows = [[group[0].measure.title, *(f"{one_line(column.title)} " for column in group), "tokens"]]
        for model, entry in models.items():
            # Intervals of losses and means would not fit; the report has them.
            shown = [column.text(model, column.measure is ACCURACY and not column.mean) for column in group]
            marked = [t + ("*" if column.best(model) else " ") for t, column in zip(shown, group, strict=True)]
            rows.append([one_line(model), *marked, count(entry.get("tokens"))])
        # The first column stands to the left, the others to the right.
        first, *widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = [[row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows]
        blocks.append("\n".join("  ".join(line) for line in lines))
    blocks.append("* best of its column; ± half of the 95% interval; tokens: training tokens after the backbone")
    return "\n\n".join([*blocks, "\n".join(headline(report))])


def markdown_table(report: Mapping[str, Any]) -> str:
    """Return the table models x domains for a README, the best of a column bold."""
    return render("table.md.jinja", models=report["models"], columns=columns(report["models"]))


def csv_table(report: Mapping[str, Any]) -> str:
    """Return the table as CSV: a line for each model, measure and domain, with the interval where it is known."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "measure", "domain", "value", "ci95_low", "ci95_high", "training_tokens"])
    for model, entry in report["models"].items():
        for column in columns(report["models"]):
            if model in column.values:
                ends = column.intervals.get(model, ("", ""))
                tokens = entry.get("tokens")
                writer.writerow([model, column.measure.key, column.title, column.values[model], *ends, tokens])
    return file.getvalue()


def latex_table(report: Mapping[str, Any]) -> str:
    r"""Return the table for LaTeX with the package booktabs, the best of a column bold."""
    table = columns(report["models"])
    groups = [(measure, len(list(same))) for measure, same in itertools.groupby(table, lambda c: c.measure)]
    spans = [rf"\multicolumn{{{size}}}{{c}}{{{latex(measure.title)}}}" for measure, size in groups]
    rows = [
        rf"\begin{{tabular}}{{l{'r' * len(table)}r}}", r"\toprule", " & ".join(["", *spans, ""]) + r" \\",
        " & ".join(["model", *(latex(column.title) for column in table), "tokens"]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for model, entry in report["models"].items():
        cells = [latex(column.text(model)) for column in table]
        cells = [rf"\textbf{{{c}}}" if column.best(model) else c for c, column in zip(cells, table, strict=True)]
        rows.append(" & ".join([latex(model), *cells, latex(count(entry.get("tokens")))]) + r" \\")
    return "\n".join([*rows, r"\bottomrule", r"\end{tabular}", ""])
