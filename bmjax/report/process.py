"""The sections on how the models came about: selection, training, moves, merges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.report import figures
from bmjax.report.markup import bar, decimal, figure, missing, note, table, words
from bmjax.report.records import Curve, Kept, kept, layers, read_curve, read_merge
from bmjax.report.tables import EMPTY, number


def selected(selection: Mapping[str, Any]) -> str:
    if not selection:
        return missing("No traces were selected in this run: its domains brought their own rows.")
    reasons = list(dict.fromkeys(reason for own in selection.values() for reason in own.get("dropped") or {}))
    rows = []
    for domain, own in selection.items():
        collected, left, dropped = own.get("collected"), own.get("kept"), own.get("dropped") or {}
        total, part = number(collected), number(left)
        share = f"{100 * part / total:.0f} %{bar(part / total)}" if total and part is not None else EMPTY
        counts = [words(dropped.get(reason, 0)) for reason in reasons]
        rows.append([words(domain), words(collected), words(left), share, *counts])
    text = "Teacher traces by domain: collected, kept for training, and dropped, by reason."
    return table(["domain", "collected", "kept", "share", *map(words, reasons)], rows) + note(text)


def _curves(directory: Path, models: Mapping[str, Any], key: str) -> tuple[list[Curve], list[str]]:
    """The curves of all trainings that have `key`, and one line for each that has not."""
    curves, lacking = [], []
    for model, entry in models.items():
        if not entry.get("metrics"):
            continue
        curve = read_curve(directory, model, entry["metrics"])
        if isinstance(curve, str):
            lacking.append(f"{model}: {curve}")
        elif key not in curve.values:
            lacking.append(f"{model}: {entry['metrics']} has no {key}")
        else:
            curves.append(curve)
    return curves, lacking


def training(directory: Path, models: Mapping[str, Any]) -> str:
    curves, lacking = _curves(directory, models, "loss")
    parts = [missing(line) for line in lacking]
    if curves:
        limits = figures.loss_limits([curve for curve in curves if curve.name != "backbone"])
        panels = [
            figures.loss_curve(c, None if c.name == "backbone" else limits, f"curve{i}") for i, c in enumerate(curves)
        ]
        caption = (
            "Training loss, nats a target token: each step faint, the running mean strong, its last value at its end. "
            "All trainings from the backbone share one scale; the backbone has its own."
        )
        parts += [figure(panels, caption), _speed(curves)]
    return "\n".join(parts) or missing("No training of this run left metrics.")


def _speed(curves: Sequence[Curve]) -> str:
    rows = []
    for curve in curves:
        speeds = sorted(y for _, y in curve.values.get("tokens_per_second", ()))
        norms = sorted(y for _, y in curve.values.get("grad_norm", ()))
        rates = [y for _, y in curve.values.get("learning_rate", ())]
        rows.append([
            words(curve.name), f"{curve.values['loss'][-1][0]:.0f}", f"{max(rates):.2e}" if rates else EMPTY,
            f"{norms[len(norms) // 2]:.3f}" if norms else EMPTY,
            f"{speeds[len(speeds) // 2]:,.0f}" if speeds else EMPTY,
        ])  # fmt: skip
    return table(["training", "steps", "highest rate", "gradient norm, median", "tokens/s, median"], rows)


def moves(directory: Path, models: Mapping[str, Any]) -> str:
    started = {name: entry for name, entry in models.items() if name != "backbone"}
    curves, lacking = _curves(directory, started, "move")
    parts = [missing(line) for line in lacking]
    if curves:
        caption = (
            "The size of each training's change, |delta| / |backbone|. Branches that stay near the backbone merge "
            "well; one that moved much farther than the others dominates a plain average."
        )
        parts.append(figure([figures.move_curves(curves, "move")], caption, broad=True))
    final = [
        [words(m), decimal(entry["move"], 100, 3)]
        for m, entry in models.items()
        if number(entry.get("move")) is not None
    ]
    if final:
        parts.append(table(["model", "final move, %"], final))
    return "\n".join(parts) or missing("No training of this run recorded its move.")


def merges(directory: Path, report: Mapping[str, Any]) -> str:
    chosen = f"merge/{(report.get('chosen') or {}).get('merge')}"
    read: dict[str, Mapping[str, Any]] = {}
    parts = []
    for model, entry in report["models"].items():
        if not entry.get("merge_report") or (model == "merged" and chosen in read):
            continue
        found = read_merge(directory, entry["merge_report"])
        if isinstance(found, str):
            parts.append(missing(f"{model}: {found}"))
        else:
            read[model] = found
    if not read:
        return "\n".join(parts) or missing("This run has no merge report.")
    names = sorted(read, key=lambda name: name != chosen)
    rows = {name: layers(read[name]) for name in names}
    whole = {name: all(k.kept == 1 for cells in rows[name].values() for k in cells) for name in names}
    selective = [name for name in names if not whole[name] and _even(rows[name])]
    if selective:
        panels = [
            figures.heat(_title(name, chosen), rows[name], lambda k: k.kept, f"kept{i}", f"{name}: share kept")
            for i, name in enumerate(selective)
        ]
        caption = (
            "Share of a layer's entries, per cent, that a merge took from each model, from the embedding at the top to "
            "the last norm. In a merge of several steps the step stands over the model that it takes in. A pale column "
            "is a branch of which little is left; a layer that was frozen in training shows 0."
        )
        parts.append(figure(panels, caption))
    dense = [words(name) for name in names if whole[name] and rows[name]]
    if dense:
        parts.append(note(f"Every entry of every branch goes into: {', '.join(dense)}."))
    moved = next((name for name in names if _even(rows[name]) and _one_base(rows[name])), None)
    if moved:
        what = "Change of each branch by layer"
        panel = figures.heat("change by layer, % of its norm", rows[moved], lambda k: k.move, "layermove", what)
        caption = f"|delta| / |base| of each branch in each layer, from the base of {words(moved)}: where it learned."
        parts.append(figure([panel], caption))
    parts.append(_merge_totals(read, chosen))
    return "\n".join(parts)


def _title(name: str, chosen: str) -> str:
    return f"{name.removeprefix('merge/')}{' (chosen)' if name in (chosen, 'merged') else ''}"


def _even(rows: Mapping[str, Sequence[Kept]]) -> bool:
    """Whether all layers went through the same steps with the same models: what a table of cells needs."""
    return len({tuple((k.step, k.model) for k in cells) for cells in rows.values()}) == 1


def _one_base(rows: Mapping[str, Sequence[Kept]]) -> bool:
    """Whether the changes are the branches' own: one step, and no branch that is itself the reference."""
    cells = [k for line in rows.values() for k in line]
    return len({k.step for k in cells}) == 1 and all(
        any(k.move > 0 for k in cells if k.model == m) for m in {k.model for k in cells}
    )


def _merge_totals(read: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    rows = []
    for name, report in read.items():
        label = f"<b>{words(name)}</b>" if name in (chosen, "merged") else words(name)
        for entry in kept(report.get("total")):
            rows.append(
                [label, words(entry.step), words(entry.model), f"{100 * entry.kept:.2f}", decimal(entry.move, 100, 3)]
            )
    if not rows:
        return ""
    return (
        "<details><summary>Every merge over all its layers</summary>\n"
        + table(["merge", "step", "model", "kept, %", "change, % of the step’s base"], rows, 3)
        + note("A merge without a base of its own is measured from its first model, which then shows 0.")
        + "</details>"
    )
