"""The figures as inline SVG. Each panel is drawn about as wide as a phone; the page sets them side by side."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmjax.report.records import Curve, Kept, smoothed, thinned
from bmjax.report.style import LIGHT
from bmjax.report.tables import interval, number, one_line, score, shown

WIDTH = 340
NAMES_WIDTH = 150
VALUES_WIDTH = 44
ROW = 19
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bmjax",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": True,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Box:
    """A drawing area in pixels: left and top margins, and its size."""

    left: float
    top: float
    width: float
    height: float


def role(model: str) -> str:
    """What a model is in the run; also the name of its colour."""
    return next(
        (r for r in ("branch", "merge", "mixture", "backbone") if model == r or model.startswith(r + "/")), "merged"
    )


def short(name: str, most: int = 26) -> str:
    text = one_line(name)
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(width: float, height: float, box: Box, draw: Callable[[Axes], None], identity: str, alternative: str) -> str:
    """One drawing as inline SVG: themed by CSS variables, ids prefixed by `identity`, nothing but its own content."""
    with style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        place = (box.left / width, 1 - (box.top + box.height) / height, box.width / width, box.height / height)
        axes = figure.add_axes(place)
        axes.patch.set_visible(False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, colors=LIGHT["muted"], labelsize=9.5, pad=4)
        draw(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<[^>]*>", lambda tag: _themed(tag.group(), identity), body)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alternative)}">'
    return start + re.sub(r"\n\s*", "\n", body).strip()


def _themed(tag: str, identity: str) -> str:
    """A tag of Matplotlib's SVG with the page's colours and with ids that no other figure has."""
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'\bid="', f'id="{identity}-', tag)
    tag = re.sub(r'(href="|url\()#', rf"\g<1>#{identity}-", tag)
    tag = re.sub(r"font(-family)?: ?[^;\"]*'DejaVu Sans'[^;\"]*", _size_only, tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: NAMES.get(colour.group(), colour.group()), tag)


NAMES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def _size_only(font: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", font.group())
    weight = "font-weight: bold; " if re.search(r"\b(bold|700)\b", font.group()) else ""
    return f"{weight}font-size: {size.group()}" if size else ""


def accuracy_bars(models: Mapping[str, object], domain: str, identity: str) -> str:
    """Accuracy of every model in a domain with its 95% interval, per cent; the line is the backbone."""
    rows = [
        (m, value, interval(models, m, domain))
        for m in models
        if (value := score(models, m, domain, "accuracy")) is not None
    ]
    most = max([value for _, value, _ in rows] + [ends[1] for _, _, ends in rows if ends])
    backbone = score(models, "backbone", domain, "accuracy")
    size = _bar_box(len(rows))

    def draw(axes: Axes) -> None:
        axes.set_xlim(0, 100 * most * 1.02 or 1)
        _names(axes, [m for m, _, _ in rows], f"{one_line(domain)}: accuracy, %")
        for y, (model, value, ends) in enumerate(rows):
            axes.barh(y, 100 * value, height=0.62, color=LIGHT[role(model)])
            if ends:
                axes.plot([100 * e for e in ends], [y, y], color=LIGHT["ink"], lw=1.1, solid_capstyle="butt")
            _beside(axes, y, shown("accuracy", value))
        if backbone is not None:
            axes.axvline(100 * backbone, color=LIGHT["backbone"], lw=1, ls=(0, (3, 2)), zorder=0.5)
        axes.set_yticks([])

    words = [
        f"{one_line(m)} {shown('accuracy', v)}" + (f" ({100 * e[0]:.1f} to {100 * e[1]:.1f})" if e else "")
        for m, v, e in rows
    ]
    return _svg(
        WIDTH,
        size.top + size.height + 22,
        size,
        draw,
        identity,
        f"Accuracy in {one_line(domain)}, per cent: {'; '.join(words)}",
    )


def _bar_box(rows: int) -> Box:
    return Box(NAMES_WIDTH, 26, WIDTH - NAMES_WIDTH - VALUES_WIDTH, ROW * rows)


def _names(axes: Axes, models: Sequence[str], title: str) -> None:
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color=LIGHT["line"], lw=0.7)
    axes.set_axisbelow(True)
    _title(axes, title, NAMES_WIDTH)
    for y, model in enumerate(models):
        weight = "bold" if model == "merged" else "normal"
        axes.annotate(
            short(model), (0, y), xytext=(-6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="center", color=LIGHT["ink"], fontsize=10, weight=weight,
        )  # fmt: skip


def _beside(axes: Axes, y: int, label: str) -> None:
    """A row's value in the column right of the bars."""
    axes.text(1.015, y, label, transform=axes.get_yaxis_transform(), va="center", color=LIGHT["ink"], fontsize=10)


def _title(axes: Axes, title: str, left: float) -> None:
    """Above the drawing area, flush with the panel's left edge."""
    text = short(title, 46)
    axes.annotate(
        text, (0, 1), xytext=(-left, 9), xycoords="axes fraction", textcoords="offset points",
        ha="left", va="baseline", color=LIGHT["ink"], fontsize=11, weight="bold",
    )  # fmt: skip


def loss_bars(models: Mapping[str, object], domain: str, identity: str) -> str:
    """Held-out loss as the change against the backbone, nats a token (from zero where there is no backbone)."""
    rows = [(m, value) for m in models if (value := score(models, m, domain, "loss")) is not None]
    backbone = score(models, "backbone", domain, "loss")
    start = backbone or 0.0
    size = _bar_box(len(rows))

    def draw(axes: Axes) -> None:
        changes = [value - start for _, value in rows]
        low, high = min(0.0, *changes), max(0.0, *changes)
        room = (high - low or 1.0) * 0.04
        axes.set_xlim(low - room, high + room)
        _names(axes, [m for m, _ in rows], f"{one_line(domain)}: loss{' − backbone' if backbone else ''}, nats/token")
        for y, ((model, value), change) in enumerate(zip(rows, changes, strict=True)):
            axes.barh(y, change, height=0.62, color=LIGHT[role(model)])
            _beside(axes, y, shown("loss", value))
        axes.axvline(0, color=LIGHT["backbone"], lw=1)
        axes.set_yticks([])

    words = [f"{one_line(m)} {shown('loss', v)}" for m, v in rows]
    return _svg(
        WIDTH,
        size.top + size.height + 22,
        size,
        draw,
        identity,
        f"Held-out loss in {one_line(domain)}, nats per token: {'; '.join(words)}",
    )


def loss_curve(curve: Curve, limits: tuple[float, float] | None, identity: str) -> str:
    """Training loss over steps: every step faint, the running mean on top, its last value written at its end."""
    points = thinned(curve.values["loss"])
    line = smoothed(points)
    end = line[-1][1]
    size = Box(40, 26, WIDTH - 40 - 48, 130)

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=LIGHT["raw"], lw=0.8)
        axes.plot(*zip(*line, strict=True), color=LIGHT[role(curve.name)], lw=1.9, solid_capstyle="round")
        if limits:
            axes.set_ylim(*limits)
        axes.annotate(
            f"{end:.3f}", line[-1], xytext=(6, 0), textcoords="offset points", va="center", color=LIGHT["ink"],
            fontsize=10, annotation_clip=False,
        )  # fmt: skip
        _time_axes(axes, curve.name, points[-1][0], 40)

    (first, before), (last, _) = points[0], points[-1]
    alternative = (
        f"Training loss of {one_line(curve.name)}: {before:.3f} at step {first:.0f}, {end:.3f} at step {last:.0f}"
    )
    return _svg(WIDTH, 26 + 130 + 32, size, draw, identity, alternative)


def _time_axes(axes: Axes, title: str, last: float, left: float) -> None:
    axes.set_xlim(0, last or 1)
    axes.locator_params(axis="both", nbins=4)
    axes.grid(axis="y", color=LIGHT["line"], lw=0.7)
    axes.spines["bottom"].set(visible=True, color=LIGHT["line"])
    axes.set_xlabel("step", color=LIGHT["muted"], fontsize=9.5, labelpad=2)
    _title(axes, title, left)


def loss_limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """One scale for trainings that start from the same model: all running means, and nearly all steps."""
    lines = [y for curve in curves for _, y in smoothed(thinned(curve.values["loss"]))]
    raw = sorted(y for curve in curves for _, y in thinned(curve.values["loss"]))
    if not raw:
        return None
    low = min([*lines, raw[len(raw) // 50]])
    high = max([*lines, raw[len(raw) - 1 - len(raw) // 50]])
    room = (high - low or 1.0) * 0.06
    return low - room, high + room


def move_curves(curves: Sequence[Curve], identity: str) -> str:
    """|delta| / |backbone| of every training over its steps, per cent, each named at its end."""
    width, height, right = 400, 180, 126
    size = Box(40, 26, width - 40 - right, height)
    lines = [(c.name, [(x, 100 * y) for x, y in thinned(c.values["move"])]) for c in curves]
    top = max(y for _, line in lines for _, y in line) * 1.06 or 1.0
    last = max(line[-1][0] for _, line in lines)

    def draw(axes: Axes) -> None:
        axes.set_ylim(0, top)
        ends = spread([height * line[-1][1] / top for _, line in lines], 14, height)
        for i, ((name, line), place) in enumerate(zip(lines, ends, strict=True)):
            colour = LIGHT["mixture"] if role(name) == "mixture" else LIGHT[f"line{i % 5}"]
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.9, solid_capstyle="round")
            x, y = line[-1]
            # A short training's label stands at the right edge like the others, tied to its end by a thin line.
            axes.plot([x, last], [y, top * place / height], color=colour, lw=0.7, ls=(0, (1, 2)), clip_on=False)
            axes.annotate(
                f"{short(name, 14)} {y:.2f} %", (last, top * place / height), xytext=(6, 0), textcoords="offset points",
                va="center", color=colour, fontsize=10, annotation_clip=False,
            )  # fmt: skip
        _time_axes(axes, "distance from the backbone, % of its norm", last, 40)

    words = [f"{one_line(name)} {line[-1][1]:.2f} % after {line[-1][0]:.0f} steps" for name, line in lines]
    return _svg(width, 26 + height + 32, size, draw, identity, f"Distance from the backbone: {'; '.join(words)}")


def spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """The places moved apart to at least `gap`, in their order, none above `top` where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = [0.0] * len(places)
    floor = -float("inf")
    for i in order:
        floor = found[i] = max(places[i], floor + gap)
    ceiling = max(top, gap * (len(places) - 1))
    for i in reversed(order):
        ceiling = found[i] = min(found[i], ceiling)
        ceiling -= gap
    return found


def heat(
    title: str, rows: Mapping[str, Sequence[Kept]], value: Callable[[Kept], float], identity: str, what: str
) -> str:
    """Layers x models as cells: the darker the larger, each with its number in per cent."""
    columns = next(iter(rows.values()))
    several = len({kept.step for kept in columns}) > 1
    names = [
        f"{short(kept.step, 14)}\n← {short(kept.model, 12)}" if several else short(kept.model, 14) for kept in columns
    ]
    left, high, width = 86, 17, WIDTH - 86 - 4
    slanted = max(len(line) for name in names for line in name.split("\n")) * 6.4 > width / len(names)
    if slanted:
        names, width = [name.replace("\n", " ") for name in names], width - 62
    top = 26 + (92 if slanted else 34 if several else 20)
    values = {layer: [100 * value(kept) for kept in cells] for layer, cells in rows.items()}
    most = max((v for line in values.values() for v in line if number(v) is not None), default=1.0) or 1.0
    digits = 2 if most < 10 else 1 if most < 99.5 else 0

    def draw(axes: Axes) -> None:
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(values), 0)
        axes.set(xticks=[], yticks=[])
        for y, (layer, line) in enumerate(values.items()):
            axes.annotate(
                short(layer, 13), (0, y + 0.5), xytext=(-6, 0), textcoords="offset points", ha="right", va="center",
                color=LIGHT["ink"], fontsize=9.5,
            )  # fmt: skip
            for x, v in enumerate(line):
                share = v / most if number(v) is not None else 0.0
                place, alpha = (x + 0.02, y + 0.04), 0.06 + 0.94 * share
                axes.add_patch(Rectangle(place, 0.96, 0.92, color=LIGHT["merged"], alpha=alpha, lw=0))
                ink = LIGHT["paper" if share > 0.55 else "ink"]
                axes.text(x + 0.5, y + 0.5, f"{v:.{digits}f}", ha="center", va="center", color=ink, fontsize=9)
        for x, name in enumerate(names):
            axes.annotate(
                name, (x + 0.5, 0), xytext=(0, 6), textcoords="offset points", ha="left" if slanted else "center",
                va="baseline" if slanted else "bottom", rotation=32 if slanted else 0, rotation_mode="anchor",
                color=LIGHT["muted"], fontsize=9.5, annotation_clip=False,
            )  # fmt: skip
        axes.annotate(
            short(title, 46), (0, 0), xytext=(-left, top - 14), textcoords="offset points", ha="left",
            color=LIGHT["ink"], fontsize=11, weight="bold", annotation_clip=False,
        )  # fmt: skip

    names_in_words = [name.replace("\n", " ") for name in names]
    words = [
        f"layer {one_line(layer)}: " + ", ".join(f"{n} {v:.2f}" for n, v in zip(names_in_words, line, strict=True))
        for layer, line in values.items()
    ]
    box = Box(left, top, width, high * len(rows))
    alternative = f"{one_line(what)}, per cent: {'; '.join(words)}"
    return _svg(WIDTH, top + box.height + 6, box, draw, identity, alternative)
