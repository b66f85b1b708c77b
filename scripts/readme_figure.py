#!/usr/bin/env python
"""Draw the README's figure from the report.json of a run: accuracy of the main models in every domain.

scripts/readme_figure.py runs/demo/report.json docs/figures/demo.svg
"""

import io
import json
import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from bmjax.io.atomic import write_atomic
from bmjax.report.figures import COLOURS, role


def main() -> int:
    """Draw the figure that the command line asks for."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    models = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["models"]
    domains = list(models["backbone"]["scores"])
    rcParams.update({"svg.hashsalt": "bmjax", "font.size": 9})
    figure = Figure(figsize=(8.4, 1.7), layout="constrained")
    panels = figure.subplots(1, len(domains))
    for axes, domain in zip(panels, domains, strict=True):
        names = ["backbone", f"branch/{domain}", "merged", "mixture"]
        scores = [models[name]["scores"][domain] for name in names]
        values = [100 * score["accuracy"] for score in scores]
        errors = [[100 * abs(score["accuracy"] - score["ci95"][end]) for score in scores] for end in (0, 1)]
        bars = axes.barh(names, values, color=[COLOURS[role(name)] for name in names], xerr=errors, height=0.65)
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        axes.set(title=f"{domain}: accuracy, %", xlim=(0, 100))
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    write_atomic(sys.argv[2], file.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
