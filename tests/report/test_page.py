"""report.html of a synthetic run, read with html.parser."""

import json
import re

import numpy as np
import pytest

from bmjax.report.columns import markdown_table, summary_table
from bmjax.report.page import write_report
from tests.report.page_parser import Page
from tests.report.synthetic import DOMAINS, synthetic_run


def test_every_model_and_number_is_on_the_page(run):
    _, report, html = run
    page = Page(html)
    rows = [[row[0].removesuffix(" (chosen)"), *row[1:]] for row in page.rows if row]
    rows = [row for row in rows if row[0] in report["models"]]
    for name, entry in report["models"].items():
        table = next(row for row in rows if row[0] == name)
        accuracies = [entry["scores"][d]["accuracy"] for d in DOMAINS]
        losses = [entry["scores"][d]["loss"] for d in DOMAINS]
        halves = [(entry["scores"][d]["ci95"][1] - entry["scores"][d]["ci95"][0]) / 2 for d in DOMAINS]
        assert table[1:4] == [f"{100 * a:.1f} ±{100 * h:.1f}" for a, h in zip(accuracies, halves, strict=True)]
        assert table[4].startswith(f"{100 * np.mean(accuracies):.1f} ±")
        assert table[5:8] == [f"{loss:.4f}" for loss in losses]
        assert table[8] == f"{np.mean(losses):.4f}"
        for domain in DOMAINS:
            score = entry["scores"][domain]
            full = next(row for row in rows if row[:2] == [name, domain])
            assert full[2] == f"{100 * score['accuracy']:.2f}"
            assert full[4:6] == [str(score["n"]), str(score["k"])]
            assert full[6] == f"{100 * score['truncated']:.1f}"
            assert full[7:] == [f"{score['loss']:.5f}", "–", f"{score['bits_per_byte']:.5f}", str(score["loss_tokens"])]
        assert any(row == [name, entry["hf"]] for row in page.rows)
        assert name in page.svg_texts
    for name, score in report["chosen"]["validation"].items():
        label = "backbone" if name == "backbone" else f"merge/{name}" + (" (chosen)" if name == "linear" else "")
        expected = [f"{score[d]['loss']:.4f}" for d in DOMAINS]
        assert any(row[0] == label and row[5:8] == expected for row in page.rows if len(row) == 9)
    for domain, entry in report["selection"].items():
        numbers = [entry["asked"], entry["failed"], entry["collected"], *entry["verdicts"].values(), entry["kept"]]
        row = next(row for row in page.rows if row[:8] == [domain, *map(str, numbers)])
        assert set(map(str, entry["dropped"].values())) <= set(row[9:])
    stages = [row[:2] for row in page.rows]
    assert all([name, f"{stage['seconds']:.1f}"] in stages for name, stage in report["stages"].items())
    assert all([name, version] in page.rows for name, version in report["versions"].items())
    assert "max_new_tokens: 72" in "".join(page.texts)
    assert report["chosen"]["rule"] in page.texts


def test_the_page_loads_nothing(run):
    # The names of the XML namespaces are no addresses.
    html = re.sub(r' xmlns(:xlink)?="http://www.w3.org/(2000/svg|1999/xlink)"', "", run[2])
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "@import" not in html and "javascript:" not in html
    assert not {"script", "link", "img", "image", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "srcset", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_references_lead_somewhere(run):
    html = run[2]
    ids = [attributes["id"] for _, attributes in Page(html).tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", html)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    report = synthetic_run(tmp_path)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9, "savefig.dpi": 300}):
        again = write_report(tmp_path, report)
    assert again.read_bytes() == run[2].encode()


HOSTILE = "<script>alert('x')</script>\"&amp;$x_{1"


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    report = synthetic_run(tmp_path)
    text = json.dumps(report).replace("fusion_paper", json.dumps(HOSTILE)[1:-1]).replace("science", "$_{$</svg><b>sci")
    report = json.loads(text)
    report["config"]["system"] = f"</pre>{HOSTILE}"
    report["chosen"]["rule"] = f"</blockquote>{HOSTILE}"
    report["versions"]["</td>"] = HOSTILE
    report["stages"][HOSTILE] = {"seconds": 1.0, "peak_rss_mib": 2.0}
    report["selection"]["</tr>"] = {"collected": 3, "kept": 1, "dropped": {HOSTILE: 2}}
    report["models"]["merge/" + HOSTILE]["merge_report"] = HOSTILE
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html and "<b>sci" not in html
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert any(row[0] == f"merge/{HOSTILE}" for row in page.rows if row)
    assert any("$_{$</svg><b>sci" in text for text in page.svg_texts)
    assert any(f"</pre>{HOSTILE}" in text.replace("''", "'") for text in page.texts)
    assert [HOSTILE, "1.0", "2"] in page.rows
    assert "\x1b" not in summary_table({"models": {"a\x1b[2J": {"scores": {"d": {"loss": 1.0}}}}})


def test_what_is_missing_is_said(tmp_path):
    report = synthetic_run(tmp_path)
    (tmp_path / "branch" / "math" / "metrics.jsonl").unlink()
    (tmp_path / "branch" / "code" / "metrics.jsonl").write_text("\x00 not json\n")
    lines = (tmp_path / "mixture" / "metrics.jsonl").read_text().splitlines()[:-1]
    unmoved = [json.dumps({k: v for k, v in json.loads(line).items() if k != "move"}) for line in lines]
    (tmp_path / "mixture" / "metrics.jsonl").write_text("\n".join([*unmoved, '{"step": 601, "loss": NaN}']))
    (tmp_path / "merges" / "fusion_paper" / "hf" / "merge_report.json").unlink()
    (tmp_path / "merges" / "linear" / "hf" / "merge_report.json").write_text("{")
    text = "".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).texts)
    assert "branch/math: branch/math/metrics.jsonl is missing" in text
    assert "branch/code: branch/code/metrics.jsonl holds no step" in text
    assert "mixture: mixture/metrics.jsonl has no move" in text
    assert "merge/fusion_paper: merges/fusion_paper/hf/merge_report.json is missing" in text
    assert "merge/linear: merges/linear/hf/merge_report.json is not JSON" in text


def test_a_report_with_nothing_but_names(tmp_path):
    report = {"models": {"backbone": {"hf": "backbone/hf", "scores": {}}}}
    text = "".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).texts)
    assert "No model has a score." in text and "The run recorded no stage." in text
    assert "This run has no merged model." in summary_table(report)
    assert markdown_table(report).splitlines()[2] == "| backbone | – |"


@pytest.mark.parametrize(("gone", "left"), [("accuracy", "held-out loss"), ("loss", "accuracy")])
def test_one_measure_is_enough(tmp_path, gone, left):
    report = synthetic_run(tmp_path)
    for scores in [*(m["scores"] for m in report["models"].values()), *report["chosen"]["validation"].values()]:
        for score in scores.values():
            score.pop(gone, None)
    text = "".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).texts)
    assert f"No model has {'an accuracy' if gone == 'accuracy' else 'a held-out loss'} in this run." in text
    lines = summary_table(report).splitlines()
    assert lines[0].startswith(left) and sum(line.startswith("mixture ") for line in lines) == 1
    assert len(markdown_table(report).splitlines()[0].split("|")) == 2 + 1 + 4 + 1


def test_the_page_marks_the_best_and_names_the_merged(run):
    _, report, html = run
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">.*?</tr>", html)[: len(report["models"])]
    for column, domain in enumerate(DOMAINS):
        values = {name: entry["scores"][domain]["accuracy"] for name, entry in report["models"].items()}
        for name, row in zip(values, rows, strict=True):
            cell = re.findall(r"<td[^>]*>", row)[column]
            assert ("best" in cell) == (values[name] == max(values.values()))
    assert [row.startswith('<tr class="merged">') for row in rows] == [name == "merged" for name in report["models"]]


def test_a_long_deep_run_stays_a_small_page(tmp_path):
    report = synthetic_run(tmp_path, layers=64, merges=("linear", "fusion_symmetric"))
    line = {"loss": 0.5, "learning_rate": 1e-5, "grad_norm": 1.0, "move": 0.01, "tokens_per_second": 100.0}
    long = "\n".join(json.dumps({"step": step, **line}) for step in range(1, 30_001))
    (tmp_path / "branch" / "math" / "metrics.jsonl").write_text(long)
    path = write_report(tmp_path, report)
    assert path.stat().st_size < 2_000_000
    assert {"0", "31", "63"} <= set(Page(path.read_text(encoding="utf-8")).svg_texts)
