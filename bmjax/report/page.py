"""Writes a run's report: report.html, figures/*.svg and .pdf, table.md, .csv and .tex. Called by `bmjax run`.

The page is one file with its style and figures inside, without scripts; it loads nothing. What it says stands in
templates/. This module reads the run, draws the figures and hands both to the templates.
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from markupsafe import escape

from bmjax.evaluate import paper
from bmjax.io.atomic import write_atomic
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.report import figures
from bmjax.report.answers import read_answers
from bmjax.report.columns import MEASURES, columns, csv_table, headline, interval, latex_table, markdown_table
from bmjax.report.figures import Panel
from bmjax.report.records import kept, layers, read_all, read_curves, read_merge
from bmjax.report.render import first_sentence, number, render
from bmjax.teach.benchmarks import benchmark_name

_PARTS = ("models", "chosen", "selection", "stages", "versions", "config", "run")  # of report.json, all may be absent


def write_report(directory: Path, report: Mapping[str, Any]) -> Path:
    """Write DIRECTORY/report.html, its figures in figures/ as SVG and PDF, its first table as table.md, .csv and .tex.

    The same input gives the same bytes. A missing or broken file of the run is named where its figure would stand.

    Arguments:
        directory: the run's directory, with the metrics and merge reports that `report` names.
        report: content of report.json.

    Returns: the path of report.html.
    Raises: UserError where a file cannot be written.
    """
    models, chosen = report["models"], report.get("chosen") or {}
    winner = f"merge/{chosen.get('merge')}"
    # Read the run. "merged" is a copy of the winner.
    branches = {name: entry for name, entry in models.items() if name != "backbone"}
    curves, no_loss = read_all(models, "metrics", partial(read_curves, directory, key="loss"))
    moves, no_move = read_all(branches, "metrics", partial(read_curves, directory, key="move"))
    merges, no_merge = read_all(models, "merge_report", partial(read_merge, directory))
    if winner in merges:
        merges.pop("merged", None)
    # Draw the figures. Trainings that start from the backbone share one scale.
    table = columns(models)
    panels: dict[str, list[Panel]] = {}
    for measure in MEASURES:
        drawn = enumerate(column for column in table if column.measure is measure and not column.mean)
        panels[measure.key] = [figures.bars(column, f"{measure.key}{i}") for i, column in drawn]
    shared = figures.loss_limits([curve["loss"] for name, curve in curves.items() if name != "backbone"])
    panels["training"] = [
        figures.loss_curve(name, curve["loss"], None if name == "backbone" else shared, f"curve{i}")
        for i, (name, curve) in enumerate(curves.items())
    ]
    panels["moves"] = [figures.move_curves(moves, "move")] if moves else []
    merge_panels, dense, moved = _draw_merges(merges, winner)
    panels |= merge_panels
    # Validation scores stand under the names of the test table.
    validation = {}
    for name, scores in (chosen.get("validation") or {}).items():
        mark = " (chosen)" if name == chosen.get("merge") else ""
        validation[name if name == "backbone" else f"merge/{name}{mark}"] = {"scores": scores}
    rounds = {
        f"round {entry.get('round')}": {"scores": entry.get("validation") or {}, "tokens": entry.get("tokens")}
        for entry in report.get("rounds") or ()
    }
    answers, no_answers = read_answers(directory, models)
    paper_rows = _paper_rows(report)
    # A stage's phase is the first part of its name; "all" is the whole run. The last number is the peak in MiB.
    stages, phases = report.get("stages") or {}, []
    for phase in [*dict.fromkeys(stage.split("/")[0] for stage in stages), "all"]:
        group = [stage for name, stage in stages.items() if phase in ("all", name.split("/")[0])]
        seconds = sum(number(stage.get("seconds")) or 0.0 for stage in group)
        peaks = [peak for stage in group if (peak := number(stage.get("peak_rss_mib"))) is not None]
        phases.append((phase, len(group), seconds, max(peaks, default=None)))
    page = render(
        "page.html.jinja",
        **{key: report.get(key) or {} for key in _PARTS},
        colours=figures.COLOURS,
        role=figures.role,
        interval=interval,
        measures=MEASURES,
        headline=headline(report),
        columns=table,
        panels=panels,
        curves=curves,
        merges={name: kept(merge.get("total")) for name, merge in merges.items()},
        answers=answers,
        paper=paper_rows,
        paper_tasks=paper.TASKS,
        paper_measured=any(row["source"] == "measured" for row in paper_rows),
        lacking={"loss": no_loss, "move": no_move, "merges": no_merge, "answers": no_answers},
        winner=winner,
        dense=dense,
        methods=_methods(report),
        chosen_from=winner if "merged" in models else None,
        moved=moved,
        validation=validation,
        validation_columns=columns(validation),
        rounds=rounds,
        rounds_columns=columns(rounds),
        phases=phases,
        config_text=escape(yaml.safe_dump(report.get("config") or {}, sort_keys=False, allow_unicode=True, width=100)),
    )
    for panel in (panel for group in panels.values() for panel in group):
        write_atomic(directory / "figures" / f"{panel.name}.svg", panel.svg)
        write_atomic(directory / "figures" / f"{panel.name}.pdf", panel.pdf)
    write_atomic(directory / "table.md", markdown_table(report))
    write_atomic(directory / "table.csv", csv_table(report))
    write_atomic(directory / "table.tex", latex_table(report))
    write_atomic(directory / "report.html", page)
    return directory / "report.html"


def _methods(report: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the methods of each merge, with their numbers of steps, and a line on each."""
    known = {name: method.summary for name, method in [*METHODS.items(), *CALIBRATED.items()]}
    merges, lines = (report.get("config") or {}).get("merges") or {}, {}
    for name, recipe in merges.items():
        steps = recipe.get("steps") or [recipe] if isinstance(recipe, Mapping) else []
        used = Counter(str(step.get("merge_method")) for step in steps if isinstance(step, Mapping))
        lines[f"merge/{name}"] = [
            (f"{method}, {count} steps" if count > 1 else method, first_sentence(known[method]))
            for method, count in used.items() if method in known
        ]  # fmt: skip
    return {name: methods for name, methods in lines.items() if methods}


def _paper_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the paper's table, with a row for each model of a run that was tested on its benchmarks."""
    tests = {
        name: (domain or {}).get("test") for name, domain in ((report.get("config") or {}).get("domains") or {}).items()
    }
    benchmarks = {
        name: benchmark_name(test["benchmark"]) for name, test in tests.items() if test and test.get("benchmark")
    }
    rows = paper.paper_rows()
    for model, entry in report["models"].items():
        scores = {
            benchmarks[domain]: score for domain, score in (entry.get("scores") or {}).items() if domain in benchmarks
        }
        folder = str(PurePosixPath(entry["samples"]).parent) if entry.get("samples") else ""
        row = paper.measured_row(model, scores, folder)
        rows += [row] if row["tasks"] else []
    return rows


def _draw_merges(
    merges: Mapping[str, Mapping[str, Any]], winner: str
) -> tuple[dict[str, list[Panel]], list[str], list[str]]:
    """Draw what the merges took from each layer, the winner first.

    Returns the panels ("kept" of each merge that leaves entries out, "change" of every branch by layer), the merges
    that leave nothing out, and the merge whose changes are drawn, if there is one that can show them.
    """
    names = sorted(merges, key=lambda name: name != winner)
    rows = {name: layers(merges[name]) for name in names}
    cells = {name: [cell for row in rows[name].values() for cell in row] for name in names}
    # A method that takes all entries takes as many from each model: those that a training changed.
    dense = [
        name
        for name in names
        if cells[name] and all(len({round(c.kept, 6) for c in row}) == 1 < len(row) for row in rows[name].values())
    ]
    # Layers make a table where all went through the same steps with the same models.
    even = [name for name in names if len({tuple((c.step, c.model) for c in row) for row in rows[name].values()}) == 1]
    kept_panels = []
    for i, name in enumerate(name for name in even if name not in dense):
        title = name.removeprefix("merge/") + (" (chosen)" if name in (winner, "merged") else "")
        what = f"{name}: share kept"
        kept_panels.append(figures.heat(title, what, rows[name], lambda c: c.kept, f"kept{i}", largest=100))
    learned = [name for name in even if all(math.isfinite(cell.coefficient) for cell in cells[name])]
    highest = max((cell.coefficient for name in learned for cell in cells[name]), default=1.0)
    coefficients = [
        figures.heat(
            name.removeprefix("merge/") + (" (chosen)" if name in (winner, "merged") else ""),
            f"{name}: mean coefficient", rows[name], lambda c: c.coefficient, f"coefficient{i}",
            factor=1, unit="", largest=highest,
        )
        for i, name in enumerate(learned)
    ]  # fmt: skip
    # Changes are the branches' own in a merge of one step in which no branch is itself the reference.
    single = [name for name in even if len({c.step for c in cells[name]}) == 1]
    moved = [n for n in single if {c.model for c in cells[n]} == {c.model for c in cells[n] if c.move > 0}][:1]
    title, what = "change by layer, % of its norm", "Change of each branch by layer"
    changes = [figures.heat(title, what, rows[name], lambda c: c.move, "change") for name in moved]
    return {"kept": kept_panels, "coefficients": coefficients, "change": changes}, dense, moved
