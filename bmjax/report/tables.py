"""What a run's numbers say, for a terminal and a README: a headline in sentences, the table models x domains as text.

`report` is report.json's content.
"""

from collections.abc import Mapping
from typing import Any

from bmjax.report.render import render
from bmjax.report.scores import MEASURES, columns, compare
from bmjax.report.text import count, listed, one_line


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return sentences made from the numbers: the merged model against the backbone, then against the mixture."""
    models = report["models"]
    table = columns(models)
    text = render(
        "headline.txt.jinja",
        merged="merged" in models,
        chosen=(report.get("chosen") or {}).get("merge"),
        backbone=compare(table, "merged", "backbone"),
        mixture=compare(table, "merged", "mixture"),
        tokens=[count((models.get(name) or {}).get("tokens")) for name in ("mixture", "merged")],
        listed=listed,
    )
    return text.splitlines()


def summary_table(report: Mapping[str, Any]) -> str:
    """Return the table models x domains for a terminal of 80 columns: accuracy, held-out loss, the headline.

    `*` marks the best of a column.
    """
    models = report["models"]
    blocks = []
    for measure in MEASURES:
        group = [column for column in columns(models) if column.measure is measure]
        if not group:
            continue
        rows = [[measure.title, *(f"{one_line(column.title)} " for column in group), "tokens"]]
        for model, entry in models.items():
            marked = [column.text(model) + ("*" if column.best(model) else " ") for column in group]
            rows.append([one_line(model), *marked, count(entry.get("tokens"))])
        # The first column stands to the left, the others to the right.
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        align = [str.ljust, *[str.rjust] * (len(widths) - 1)]
        lines = [[put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows]
        blocks.append("\n".join("  ".join(line) for line in lines))
    blocks.append("* best of its column; ± half of the 95% interval; tokens: training tokens after the backbone")
    return "\n\n".join([*blocks, "\n".join(headline(report))])


def markdown_table(report: Mapping[str, Any]) -> str:
    """Return the table models x domains for a README, the best of a column bold."""
    return render("table.md.jinja", models=report["models"], columns=columns(report["models"]))
