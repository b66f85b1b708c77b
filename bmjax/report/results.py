"""The sections on scores: models x domains, the bars, and how the merge was chosen."""

from collections.abc import Mapping
from typing import Any

from bmjax.report import figures
from bmjax.report.markup import classes, decimal, figure, missing, note, table, words
from bmjax.report.tables import EMPTY, TITLES, Column, columns, count, domains, interval, shown

BAR_CAPTIONS = {
    "accuracy": "Share of right answers to the test questions; the thin line on a bar is its 95% interval, the dashed "
    "line the backbone. A branch should pass that line in its own domain, the merge in every one.",
    "loss": "Nats a token on held-out answers. Bars show the change against the backbone, the numbers the loss itself: "
    "bars to the left are better than the backbone. Loss tells models apart with less noise than accuracy does.",
}
NOTE = "* and bold: the best of a column. ±: half of the 95% interval. tokens: training tokens after the backbone."


def scores(models: Mapping[str, Any]) -> str:
    if not any(entry.get("scores") for entry in models.values()):
        return missing("No model has a score.")
    return f"{_score_table(models)}\n{note(NOTE)}\n{_every_score(models)}"


def _score_table(models: Mapping[str, Any], tokens: bool = True) -> str:
    own = columns(models)
    groups = {measure: sum(column.measure == measure for column in own) for measure in TITLES}
    spans = "".join(
        f'<th class="group first" colspan="{width}" scope="colgroup">{TITLES[measure]}</th>'
        for measure, width in groups.items()
        if width
    )
    starts = [i == 0 or own[i - 1].measure != column.measure for i, column in enumerate(own)]
    names = "".join(
        f'<th scope="col"{classes("first" if start else "")}>{words(column.title)}</th>'
        for start, column in zip(starts, own, strict=True)
    )
    last = '<th scope="col" class="first">tokens</th>' if tokens else ""
    lines = []
    for model, entry in models.items():
        role = figures.role(model)
        cells = [f'<th scope="row"><span class="key {role}"></span>{words(model)}</th>']
        cells += [_cell(column, model, start) for column, start in zip(own, starts, strict=True)]
        if tokens:
            cells.append(f'<td class="first" title="{words(entry.get("tokens"))}">{count(entry.get("tokens"))}</td>')
        lines.append(f"<tr{classes(role if role == 'merged' else '')}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="wide">\n<thead><tr><th></th>{spans}{"<th></th>" if tokens else ""}</tr>\n'
        f'<tr><th scope="col">model</th>{names}{last}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cell(column: Column, model: str, start: bool) -> str:
    kind = classes("first" if start else "", "best" if model in column.best else "")
    if model not in column.values:
        return f"<td{kind}>{EMPTY}</td>"
    half = ""
    if model in column.halves:
        half = f' <span class="half">±{shown(column.measure, column.halves[model])}</span>'
    return f"<td{kind}>{shown(column.measure, column.values[model])}{half}</td>"


def _every_score(models: Mapping[str, Any]) -> str:
    header = [
        "model", "domain", "accuracy, %", "95% interval", "questions", "samples", "cut off, %", "loss, nats/token",
        "bits/byte", "loss tokens",
    ]  # fmt: skip
    rows = []
    for model, entry in models.items():
        for domain, own in (entry.get("scores") or {}).items():
            ends = interval(models, model, domain)
            rows.append([
                words(model), words(domain), decimal(own.get("accuracy"), 100, 2),
                f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}" if ends else EMPTY,
                words(own.get("n", EMPTY)), words(own.get("k", EMPTY)), decimal(own.get("truncated"), 100, 1),
                decimal(own.get("loss"), 1, 5), decimal(own.get("bits_per_byte"), 1, 5),
                words(own.get("loss_tokens", EMPTY)),
            ])  # fmt: skip
    return f"<details><summary>Every score</summary>\n{table(header, rows, 2)}\n</details>"


def bars(models: Mapping[str, Any], measure: str) -> str:
    own = domains(models, measure)
    if not own:
        return missing(f"No model has {'an accuracy' if measure == 'accuracy' else 'a held-out loss'} in this run.")
    draw = figures.accuracy_bars if measure == "accuracy" else figures.loss_bars
    return figure([draw(models, domain, f"{measure}{i}") for i, domain in enumerate(own)], BAR_CAPTIONS[measure])


def chosen_merge(chosen: Mapping[str, Any]) -> str:
    winner = chosen.get("merge")
    if not winner:
        return missing("The run recorded no choice.")
    parts = [f"<p>Chosen: <b>{words(winner)}</b>.</p>"]
    if chosen.get("rule"):
        parts = [
            "<p>The rule, which never sees the test rows:</p>",
            f"<blockquote><p>{words(chosen['rule'])}</p></blockquote>",
            f"<p>It chose <b>{words(winner)}</b>.</p>",
        ]
    validation = chosen.get("validation")
    if not validation:
        return "\n".join([*parts, missing("The validation scores are missing.")])
    # Under the names that the test table uses.
    models = {
        name if name == "backbone" else f"merge/{name}{' (chosen)' if name == winner else ''}": {"scores": own}
        for name, own in validation.items()
    }
    parts.append(_score_table(models, tokens=False))
    parts.append(note("Scores on the validation rows, which are neither trained on nor part of the test."))
    return "\n".join(parts)
