"""The report in a headless Chromium, where there is one: every figure drawn, no text cut off, nothing logged."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.page_parser import Page

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars",
]  # fmt: skip
# Measures what was drawn. The page itself has no script, and its policy would let none run.
MEASURE = """<script>addEventListener("load", () => {
  const figures = [...document.querySelectorAll("svg")].map(svg => {
    const frame = svg.getBoundingClientRect(), shapes = [...svg.querySelectorAll("path, use, text")];
    const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    return {width: frame.width, height: frame.height,
      drawn: shapes.filter(shape => shape.getBoundingClientRect().width > 0).length,
      cut: texts.filter(t => t.left < frame.left - 2 || t.right > frame.right + 2 ||
        t.top < frame.top - 2 || t.bottom > frame.bottom + 2).length}});
  const root = document.documentElement;
  root.setAttribute("data-measured", JSON.stringify({figures, overflow: root.scrollWidth - root.clientWidth}))});
</script></body>"""


def chromium(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    return done


@pytest.mark.parametrize("width", [1200, 520])
def test_every_figure_is_drawn_and_no_text_is_cut_off(run, tmp_path, width):
    html = run[2]
    (tmp_path / "page.html").write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", MEASURE), encoding="utf-8"
    )
    out = chromium(tmp_path, f"--window-size={width},900", "--dump-dom", f"file://{tmp_path}/page.html").stdout
    measured = next(a["data-measured"] for tag, a in Page(out).tags if tag == "html")
    values = json.loads(measured or "")
    assert values["overflow"] <= 0
    assert len(values["figures"]) == html.count("<svg") == 16
    for figure in values["figures"]:
        assert figure["width"] > 200 and figure["height"] > 60 and figure["drawn"] > 10 and figure["cut"] == 0, figure


def test_the_page_as_it_is_logs_nothing_and_prints(run, tmp_path):
    page = f"file://{run[0]}/report.html"
    chromium(tmp_path, "--window-size=1200,3000", f"--screenshot={tmp_path}/page.png", page)
    chromium(tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", page)
    assert (tmp_path / "page.png").stat().st_size > 50_000
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 4 <= pages <= 20
