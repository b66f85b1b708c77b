"""report.html: one file with its style and figures inside, no script, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from bmjax.io.atomic import write_atomic
from bmjax.report.markup import bar, decimal, missing, section, table, words
from bmjax.report.process import merges, moves, selected, training
from bmjax.report.results import bars, chosen_merge, scores
from bmjax.report.style import CSS
from bmjax.report.tables import EMPTY, headline, number

NAME = "report.html"
# The browser itself refuses to load anything: what the page shows is in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(directory: Path, report: Mapping[str, Any]) -> Path:
    """Write DIRECTORY/report.html from report.json's content and the run's metrics and merge reports.

    The same input gives the same bytes. A file that is missing or broken is named where its figure would stand.
    """
    directory = Path(directory)
    path = directory / NAME
    write_atomic(path, page(directory, report))
    return path


def page(directory: Path, report: Mapping[str, Any]) -> str:
    """The HTML of a run's report."""
    models = report["models"]
    sections = [
        section("Models and domains", scores(models)),
        section("Accuracy", bars(models, "accuracy")),
        section("Held-out loss", bars(models, "loss")),
        section("Training", training(directory, models)),
        section("How far the branches moved", moves(directory, models)),
        section("What the merges kept", merges(directory, report)),
        section("How the merge was chosen", chosen_merge(report.get("chosen") or {})),
        section("What the selection kept", selected(report.get("selection") or {})),
        section("Time and memory", _stages(report.get("stages") or {})),
        section("Versions and config", _versions(report)),
    ]
    sentences = "".join(f"<p>{words(sentence)}</p>\n" for sentence in headline(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>bmjax: branch-merge run</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header class="headline">\n<h1>Branch-merge run</h1>\n{sentences}</header>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _stages(stages: Mapping[str, Any]) -> str:
    if not stages:
        return missing("The run recorded no stage.")
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for name, own in stages.items():
        groups.setdefault(name.split("/")[0], []).append(
            (number(own.get("seconds")) or 0.0, number(own.get("peak_rss_mib")))
        )
    total = sum(seconds for group in groups.values() for seconds, _ in group)
    rows = []
    for name, group in groups.items():
        seconds = sum(s for s, _ in group)
        rows.append(
            [
                words(name),
                str(len(group)),
                _time(seconds),
                bar(seconds / total if total else 0.0),
                _peak([peak for _, peak in group]),
            ]
        )
    rows.append(
        [
            "<b>all</b>",
            str(len(stages)),
            f"<b>{_time(total)}</b>",
            "",
            _peak([peak for group in groups.values() for _, peak in group]),
        ]
    )
    single = [
        [words(name), decimal(own.get("seconds"), 1, 1), decimal(own.get("peak_rss_mib"), 1, 0)]
        for name, own in stages.items()
    ]
    phases = table(["phase", "stages", "time", "share", "peak memory, MiB"], rows)
    every = table(["stage", "seconds", "peak memory, MiB"], single)
    return f"{phases}\n<details><summary>Every stage</summary>\n{every}\n</details>"


def _peak(peaks: Sequence[float | None]) -> str:
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known):,.0f}" if known else EMPTY


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _versions(report: Mapping[str, Any]) -> str:
    versions = report.get("versions") or {}
    rows = [[words(name), words(value)] for name, value in versions.items()]
    known = table(["package", "version"], rows, 2) if rows else missing("The run recorded no versions.")
    paths = [[words(name), words(entry.get("hf") or EMPTY)] for name, entry in report["models"].items()]
    where = f"<details><summary>Where each model lies</summary>\n{table(['model', 'directory'], paths, 2)}\n</details>"
    text = yaml.safe_dump(_plain(report.get("config") or {}), sort_keys=False, allow_unicode=True, width=100)
    return (
        f"{known}\n{where}\n<details><summary>The config of this run</summary>\n<pre>{escape(text)}</pre>\n</details>"
    )


def _plain(value: Any) -> Any:
    """Values that YAML can write: what JSON knows as it is, all else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
