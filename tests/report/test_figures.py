"""The figures of a synthetic run, in the page and as files."""

import json
import re
from itertools import pairwise
from xml.etree import ElementTree

from bmjax.report.figures import COLOURS, spread
from bmjax.report.page import write_report
from tests.report.page_parser import Page
from tests.report.synthetic import synthetic_run


def test_every_figure_has_a_caption_and_every_picture_a_text(run):
    page = Page(run[2])
    assert len(page.figures) == 6
    assert all(figure["figcaption"] == 1 and figure["svg"] >= 1 for figure in page.figures)
    pictures = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in page.tags) == 3 + 3 + 5 + 1 + 3 + 1
    assert all(len(a["aria-label"] or "") > 40 for a in pictures)
    score = run[1]["models"]["mixture"]["scores"]["code"]
    assert any(f"mixture {100 * score['accuracy']:.1f} (" in (a["aria-label"] or "") for a in pictures)


def test_figures_take_their_colours_from_the_page(run):
    svg = "".join(re.findall(r"<svg.*?</svg>", run[2], flags=re.S))
    drawn = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) - {"none"}
    assert drawn <= set(COLOURS.values())
    for name, colour in COLOURS.items():
        for use in ("fill", "stroke"):
            assert f'svg [style*="{use}: {colour}"]{{{use}:var(--{name})!important}}' in run[2]
    names = set(re.findall(r"var\(--(\w+)\)", run[2]))
    dark = re.search(r"prefers-color-scheme:dark\)\{:root\{(.*?)\}", run[2], flags=re.S)
    assert dark is not None and names == set(re.findall(r"--(\w+):", dark.group(1)))


def test_every_figure_is_a_file_beside_the_page(run):
    directory, _, html = run
    paths = sorted((directory / "figures").glob("*.svg"))
    assert len(paths) == html.count("<svg") == 16
    for path in paths:
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
    for path in paths:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        text = path.read_text(encoding="utf-8")
        assert text[text.index("<svg") :] in html


def test_a_pointer_is_shown_the_numbers(run):
    _, report, html = run
    titles = re.findall(r"<title>(.*?)</title>", html)
    score = report["models"]["mixture"]["scores"]["code"]
    low, high = (f"{100 * end:.1f}" for end in score["ci95"])
    assert f"mixture {100 * score['accuracy']:.1f} ({low} to {high})" in titles
    assert any(title.startswith("step 1: running mean") for title in titles)
    assert any(title.startswith("layer 0, math: ") for title in titles)


def test_a_learned_merge_shows_its_coefficients(tmp_path):
    report = synthetic_run(tmp_path, merges=("linear",))
    path = tmp_path / "merges/linear/hf/merge_report.json"
    saved = json.loads(path.read_text())
    for layer in saved["layers"].values():
        for step in layer.values():
            for values in step["models"].values() if isinstance(step, dict) else ():
                values["coefficient"] = 1.37
    path.write_text(json.dumps(saved))
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    assert "1.37" in page.svg_texts and any("multiplied each branch" in text for text in page.texts)


def test_the_heat_map_shows_what_the_merges_kept(run):
    directory, report, html = run
    page = Page(html)
    saved = json.loads((directory / "merges" / "fusion_symmetric" / "hf" / "merge_report.json").read_text())
    step = next(name for name in saved["total"] if name != "size")
    for layer in ("0", "1", "2", "norm", "embed_tokens"):
        shares = saved["layers"][layer][step]["models"]
        for statistics in shares.values():
            assert f"{100 * statistics['kept']:.1f}" in page.svg_texts
    assert "tinyr1" in page.svg_texts and "← mid" in page.svg_texts
    text = "".join(page.texts)
    assert "Every entry of every branch goes into: merge/linear, merge/task_arithmetic_0.5." in text
    # The linear merge has no base: its first model's change is 0 by definition, so another merge shows the changes.
    assert "from the base of merge/task_arithmetic_0.5" in text


def test_labels_are_spread():
    positions = [50.0, 51.0, 3.0, 99.0, 100.0]
    moved = spread(positions, 10, 100)
    order = sorted(range(5), key=lambda i: positions[i])
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(moved[i] for i in order))
    assert max(moved) <= 100 and moved[2] == 3.0
