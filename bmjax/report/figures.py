"""The figures of the report, drawn by Matplotlib. Called by page.py.

A panel is an SVG file about as wide as a phone; the page sets panels side by side. Lengths are points of the drawing,
which are pixels of the page. `name` is always the panel's name, which no other panel of the page has.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import escape
from matplotlib import rc_context, style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmjax.report.columns import ACCURACY, Column
from bmjax.report.records import Kept, Points, smoothed, thinned
from bmjax.report.render import number, one_line, shortened

WIDTH = 340
_UNSEEN = 0.004  # of what is only there for the pointer; a pointer does not meet what is wholly transparent
# The page maps each of these to a CSS variable of that name; page.css has the dark ones.
COLOURS = {
    "ink": "#1b2126", "muted": "#5d6872", "line": "#d8dde2", "raw": "#c3cbd3", "paper": "#fefefd", "panel": "#f4f6f5",
    "backbone": "#7d8791", "branch": "#3f7fc4", "merge": "#8fc3b2", "merged": "#0b7c61", "mixture": "#cf7d22",
    "line0": "#2f74bd", "line1": "#b1417d", "line2": "#8a7206", "line3": "#5b51b5", "line4": "#b4532a",
}  # fmt: skip
# Decorates a drawing function: the user's own Matplotlib settings have no effect on it.
in_page_style = style.context(["default", Path(__file__).with_suffix(".mplstyle")])


@dataclass(frozen=True)
class Panel:
    """One drawing: an SVG file, and what it shows in words."""

    name: str
    svg: str
    alternative: str
    pdf: bytes  # the same, for papers


def role(model: str) -> str:
    """Return what a model is in the run, which is also the name of its colour."""
    kind = model.split("/")[0]
    return kind if kind in ("backbone", "branch", "merge", "mixture") else "merged"


def _axes(title: str, width: float, height: float, left: float, right: float, top: float, bottom: float) -> Axes:
    """Return axes of `height` in a drawing of `width`, with these margins and a title at the upper left edge."""
    total = top + height + bottom
    figure = Figure(figsize=(width / 72, total / 72), dpi=72)
    figure.text(0, 1 - 17 / total, shortened(title, 46), fontsize=11, weight="bold")
    return figure.add_axes((left / width, bottom / total, (width - left - right) / width, height / total))


def _panel(axes: Axes, name: str, alternative: str, titles: Mapping[Artist, str]) -> Panel:
    """Return axes as a drawing. titles: what a browser shows while the pointer is on an artist."""
    figure, file, paper = axes.get_figure(root=True), io.StringIO(), io.BytesIO()
    assert figure is not None
    # Several drawings stand in one page: all ids carry the drawing's name.
    for index, artist in enumerate(figure.findobj()):
        artist.set_gid(f"{name}-{index}")
    with rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # A reader's browser may have the glyphs that DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.savefig(paper, format="pdf", metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
    svg = file.getvalue()
    for artist, title in titles.items():
        group = f'<g id="{artist.get_gid()}">'
        svg = svg.replace(group, f"{group}<title>{escape(title)}</title>", 1)
    return Panel(name, svg, alternative, paper.getvalue())


@in_page_style
def bars(column: Column, name: str) -> Panel:
    """Draw one domain's scores, a bar for each model and its value right of it.

    Accuracies start at zero, with their 95% intervals and a line at the backbone. Losses are drawn as the change
    against the backbone, or from zero where there is no backbone.
    """
    models, values, domain = list(column.values), list(column.values.values()), one_line(column.title)
    texts = [column.measure.text(value) for value in values]
    words = {model: f"{one_line(model)} {text}" for model, text in zip(models, texts, strict=True)}
    words |= {model: f"{words[model]} ({column.ends(model)})" for model in models if model in column.intervals}
    intervals: dict[str, tuple[float, float]] = {}
    backbone = column.values.get("backbone")
    # The scale, and what a bar stands for.
    if column.measure is ACCURACY:
        title, quantity = f"{domain}: accuracy, %", f"Accuracy in {domain}, per cent"
        intervals = {model: (100 * low, 100 * high) for model, (low, high) in column.intervals.items()}
        lengths = [100 * value for value in values]
        ends = 0.0, 1.02 * max([*lengths, *(high for _, high in intervals.values())]) or 1.0
    else:
        title = f"{domain}: loss{' − backbone' if backbone else ''}, nats/token"
        quantity = f"Held-out loss in {domain}, nats per token"
        lengths = [value - (backbone or 0.0) for value in values]
        low, high = min(0.0, *lengths), max(0.0, *lengths)
        room = 0.04 * (high - low or 1.0)
        ends = low - room, high + room
    # Bars, the models' names on the left, the values on the right.
    axes = _axes(title, WIDTH, 19 * len(models), left=150, right=44, top=26, bottom=22)
    axes.set(xlim=ends, ylim=(len(models) - 0.5, -0.5))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    axes.barh(range(len(models)), lengths, height=0.62, color=[COLOURS[role(m)] for m in models])
    axes.set_yticks(range(len(models)), [shortened(m) for m in models], fontsize=10, color=COLOURS["ink"])
    for y, (model, label) in enumerate(zip(models, axes.get_yticklabels(), strict=True)):
        label.set_fontweight("bold" if model == "merged" else "normal")
        axes.text(1.015, y, texts[y], transform=axes.get_yaxis_transform(), va="center", fontsize=10)
        if model in intervals:
            axes.plot(intervals[model], [y, y], color=COLOURS["ink"], lw=1.1, solid_capstyle="butt")
    # What a pointer on a row shows.
    titles: dict[Artist, str] = {}
    for y, model in enumerate(models):
        row = axes.axhspan(y - 0.5, y + 0.5, color=COLOURS["paper"], alpha=_UNSEEN, lw=0, zorder=9)
        titles[row] = words[model]
    # The backbone as a line.
    if column.measure is not ACCURACY:
        axes.axvline(0, color=COLOURS["backbone"], lw=1)
    elif backbone is not None:
        axes.axvline(100 * backbone, color=COLOURS["backbone"], lw=1, ls=(0, (3, 2)), zorder=0.5)
    return _panel(axes, name, f"{quantity}: {'; '.join(words.values())}", titles)


@in_page_style
def loss_curve(model: str, losses: Points, limits: tuple[float, float] | None, name: str) -> Panel:
    """Draw a training's loss over its steps: every step faint, the running mean on top with its last value."""
    points = thinned(losses)
    line = smoothed(points)
    (first, start), (last, _), (_, end) = points[0], points[-1], line[-1]
    axes = _axes(model, WIDTH, 130, left=40, right=48, top=26, bottom=32)
    axes.plot(*zip(*points, strict=True), color=COLOURS["raw"], lw=0.8)
    axes.plot(*zip(*line, strict=True), color=COLOURS[role(model)])
    axes.set_ylim(limits)
    _label(axes, f"{end:.3f}", line[-1], COLOURS["ink"])
    _step_axis(axes, last)
    words = f"Training loss of {one_line(model)}: {start:.3f} at step {first:.0f}, {end:.3f} at step {last:.0f}"
    return _panel(axes, name, words, _bands(axes, {"running mean ": line}, ".4f"))


def _bands(axes: Axes, lines: Mapping[str, Points], form: str, most: int = 24) -> dict[Artist, str]:
    """Put unseen upright bands on curves, and return what a pointer on each shows: the values of all curves there."""
    longest = max(lines.values(), key=lambda line: line[-1][0])
    picked = [x for x, _ in longest[:: max(1, -(-len(longest) // most))]]
    edges = [picked[0], *((a + b) / 2 for a, b in pairwise(picked)), longest[-1][0]]
    titles: dict[Artist, str] = {}
    for x, start, end in zip(picked, edges, edges[1:], strict=False):
        values = {name: min(line, key=lambda point: abs(point[0] - x))[1] for name, line in lines.items()
                  if line[-1][0] >= start}  # fmt: skip
        words = "; ".join(f"{name}{format(value, form)}" for name, value in values.items())
        band = axes.axvspan(start, end, color=COLOURS["paper"], alpha=_UNSEEN, lw=0, zorder=9)
        titles[band] = f"step {x:.0f}: {words}"
    return titles


def _label(axes: Axes, text: str, point: tuple[float, float], colour: str) -> None:
    """Write a text right of a point, in the margin too."""
    settings: dict[str, Any] = {"va": "center", "color": colour, "fontsize": 10, "annotation_clip": False}
    axes.annotate(text, point, xytext=(6, 0), textcoords="offset points", **settings)


def _step_axis(axes: Axes, last: float) -> None:
    axes.set(xlim=(0, last or 1), xlabel="step")
    axes.locator_params(axis="both", nbins=4)
    axes.grid(axis="y")
    axes.spines["bottom"].set_visible(True)


def loss_limits(losses: Sequence[Points]) -> tuple[float, float] | None:
    """Return a scale for trainings from one model: all running means, and the steps but for the 2% at either end."""
    curves = [thinned(points) for points in losses]
    lines = [y for points in curves for _, y in smoothed(points)]
    steps = sorted(y for points in curves for _, y in points)
    if not steps:
        return None
    low, high = (pick([*lines, steps[i]]) for pick, i in ((min, len(steps) // 50), (max, -1 - len(steps) // 50)))
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


@in_page_style
def move_curves(curves: Mapping[str, Mapping[str, Points]], name: str) -> Panel:
    """Draw |delta| / |backbone| of every training over its steps, in per cent, each with its name at its end."""
    height = 180
    lines = {model: [(x, 100 * y) for x, y in thinned(curve["move"])] for model, curve in curves.items()}
    top = 1.06 * max(y for line in lines.values() for _, y in line) or 1.0
    last = max(line[-1][0] for line in lines.values())
    axes = _axes("distance from the backbone, % of its norm", 400, height, left=40, right=126, top=26, bottom=32)
    axes.set_ylim(0, top)
    heights = spread([height * line[-1][1] / top for line in lines.values()], 14, height)
    for i, ((model, line), label_height) in enumerate(zip(lines.items(), heights, strict=True)):
        colour = COLOURS["mixture" if role(model) == "mixture" else f"line{i % 5}"]
        axes.plot(*zip(*line, strict=True), color=colour)
        # A short training's label stands at the right edge like the others, tied to its end by a thin line.
        (x, y), label_y = line[-1], top * label_height / height
        axes.plot([x, last], [y, label_y], color=colour, lw=0.7, ls=(0, (1, 2)), clip_on=False)
        _label(axes, f"{shortened(model, 14)} {y:.2f} %", (last, label_y), colour)
    _step_axis(axes, last)
    words = [f"{one_line(model)} {line[-1][1]:.2f} % after {line[-1][0]:.0f} steps" for model, line in lines.items()]
    titles = _bands(axes, {f"{one_line(model)} ": line for model, line in lines.items()}, ".2f")
    return _panel(axes, name, f"Distance from the backbone: {'; '.join(words)}", titles)


def spread(positions: Sequence[float], gap: float, top: float) -> list[float]:
    """Return the positions moved apart to at least `gap`, in their order, none above `top` where there is room."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = [0.0] * len(positions)
    floor = -float("inf")
    for i in order:
        floor = moved[i] = max(positions[i], floor + gap)
    ceiling = max(top, gap * (len(positions) - 1))
    for i in reversed(order):
        ceiling = moved[i] = min(moved[i], ceiling)
        ceiling -= gap
    return moved


@in_page_style
def heat(
    title: str, what: str, rows: Mapping[str, Sequence[Kept]], value: Callable[[Kept], float], name: str,
    factor: float = 100, unit: str = " %", largest: float | None = None,
) -> Panel:  # fmt: skip
    """Draw layers x models as cells: the larger the number, the darker.

    Arguments:
        what: what the numbers are, for readers who do not see the drawing.
        rows: the cells of every layer, the same models in each.
        value: returns the number of a cell, which is shown times `factor`, with `unit` in words.
        largest: of the scale, as shown; None: the largest number.
    """
    values = {layer: [factor * value(cell) for cell in row] for layer, row in rows.items()}
    top_value = max((v for row in values.values() for v in row if number(v) is not None), default=1.0) or 1.0
    scale = largest or top_value
    digits = 2 if top_value < 10 else 1 if top_value < 99.5 else 0
    # Column names. Of several steps, the step stands above the model it takes in. Long names are slanted.
    cells = next(iter(rows.values()))
    if len({cell.step for cell in cells}) > 1:
        names = [f"{shortened(cell.step, 14)}\n← {shortened(cell.model, 12)}" for cell in cells]
    else:
        names = [shortened(cell.model, 14) for cell in cells]
    right, top, slant = 4, 60 if "\n" in names[0] else 46, dict[str, Any](ha="center")
    if max(len(line) for text in names for line in text.split("\n")) * 6.4 > (WIDTH - 86 - right) / len(names):
        names = [text.replace("\n", " ") for text in names]
        right, top, slant = 66, 118, {"ha": "left", "rotation": 32, "rotation_mode": "anchor"}
    axes = _axes(title, WIDTH, 17 * len(rows), left=86, right=right, top=top, bottom=22)
    axes.set(xlim=(0, len(names)), ylim=(len(rows), 0))
    axes.tick_params(labeltop=True, labelbottom=False, pad=6)
    axes.set_xticks([x + 0.5 for x in range(len(names))], names, **slant)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [shortened(n, 13) for n in rows], color=COLOURS["ink"])
    # Cells.
    titles: dict[Artist, str] = {}
    for y, (layer, row) in enumerate(values.items()):
        for x, v in enumerate(row):
            share = min(1.0, max(0.0, v / scale)) if number(v) is not None else 0.0
            alpha, ink = 0.06 + 0.94 * share, COLOURS["paper" if share > 0.55 else "ink"]
            cell = Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, color=COLOURS["merged"], alpha=alpha, lw=0)
            titles[axes.add_patch(cell)] = f"layer {one_line(layer)}, {names[x]}: {v:.4g}{unit}".replace("\n", " ")
            axes.text(x + 0.5, y + 0.5, f"{v:.{digits}f}", ha="center", va="center", color=ink, fontsize=9)
    _scale(axes, scale, unit)
    models = [text.replace("\n", " ") for text in names]
    words = [
        f"layer {one_line(layer)}: " + ", ".join(f"{model} {v:.2f}" for model, v in zip(models, row, strict=True))
        for layer, row in values.items()
    ]
    return _panel(axes, name, f"{one_line(what)}{', per cent' if unit else ''}: {'; '.join(words)}", titles)


def _scale(axes: Axes, largest: float, unit: str) -> None:
    """Write the legend of cells below them: from 0, pale, to the largest number, dark."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = (72 * size for size in figure.get_size_inches())
    text: dict[str, Any] = {"fontsize": 9, "va": "center", "color": COLOURS["muted"]}
    figure.text(80 / width, 9 / height, f"0{unit}", ha="right", **text)
    for i in range(5):
        left, alpha = (86 + 18 * i) / width, 0.06 + 0.94 * i / 4
        cell = Rectangle((left, 4 / height), 17 / width, 10 / height, color=COLOURS["merged"], alpha=alpha, lw=0)
        cell.set_transform(figure.transFigure)
        figure.add_artist(cell)
    figure.text((86 + 18 * 5 + 5) / width, 9 / height, f"{largest:.3g}{unit}", ha="left", **text)
