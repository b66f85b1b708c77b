"""Tables for papers, intervals of means, and the lines on what made a run."""

import csv
import io
import math

import pytest

from bmjax.report.columns import columns, csv_table, latex_table, summary_table
from bmjax.report.page import write_report
from bmjax.report.render import first_sentence, latex
from tests.report.page_parser import Page
from tests.report.synthetic import DOMAINS, synthetic_run


def test_the_csv_table_has_every_number(run):
    directory, report, _ = run
    text = (directory / "table.csv").read_text()
    assert text == csv_table(report)
    rows = {(r["model"], r["measure"], r["domain"]): r for r in csv.DictReader(io.StringIO(text))}
    for name, entry in report["models"].items():
        for domain in DOMAINS:
            score, row = entry["scores"][domain], rows[name, "accuracy", domain]
            assert float(row["value"]) == score["accuracy"] and int(row["training_tokens"]) == entry["tokens"]
            assert [float(row["ci95_low"]), float(row["ci95_high"])] == score["ci95"]
            assert float(rows[name, "loss", domain]["value"]) == score["loss"]


def test_the_latex_table_is_one_and_obeys_nothing(run):
    directory, report, _ = run
    text = (directory / "table.tex").read_text()
    lines = text.splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert all(line.count(" & ") == 9 for line in lines[3:-2] if not line.startswith("\\"))
    assert r"merge/task\_arithmetic\_0.5" in text and text.count(r"\textbf") >= 8 and r"$\pm$" in text
    assert latex(r"50% of $x_1 & \y{") == r"50\% of \$x\_1 \& \textbackslash{}y\{"
    assert latex_table({"models": {"a&b": {"scores": {}}}}).count(r"a\&b") == 1


def test_the_interval_of_a_mean_adds_the_domains_as_squares(run):
    _, report, html = run
    mean = next(column for column in columns(report["models"]) if column.mean)
    scores = [report["models"]["mixture"]["scores"][domain] for domain in DOMAINS]
    above = math.sqrt(sum((score["ci95"][1] - score["accuracy"]) ** 2 for score in scores)) / len(DOMAINS)
    assert mean.intervals["mixture"][1] - mean.values["mixture"] == pytest.approx(above)
    assert f'title="95% interval: {mean.ends("mixture")}"' in html
    assert max(map(len, summary_table(report).splitlines()[:8])) <= 80


def test_the_page_says_which_run_it_was_and_what_to_do(tmp_path):
    report = synthetic_run(tmp_path)
    report["config"]["merges"] = {
        "linear": {"merge_method": "linear"}, "learned": {"merge_method": "learned"},
        "twice": {"steps": [{"merge_method": "ties"}, {"merge_method": "ties"}]}, "odd": {"merge_method": "none"},
    }  # fmt: skip
    report["run"] = {
        "finished": "2026-01-02 03:04 UTC", "devices": "1 x cpu", "machine": "Linux", "parameters": 330_000,
        "layers": 3, "context": 256,
    }  # fmt: skip
    for entry in report["models"].values():
        for score in entry["scores"].values():
            score["loss_ci95"] = [score["loss"] - 0.0123, score["loss"] + 0.0123]
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    page, text = Page(html), html
    for fact in ("2026-01-02 03:04 UTC", "1 x cpu", "330k parameters, 3 layers, context 256"):
        assert fact in text
    assert "±0.0123" in text and "bmjax push merged/hf OWNER/NAME --check" in text
    assert ["merge/linear", "linear", "sum(weight * model) / sum(weight): model soups, arXiv 2203.05482."] in page.rows
    assert any(row[:2] == ["merge/twice", "ties, 2 steps"] for row in page.rows)
    assert "(chosen)</span></th>" in text


def test_first_sentences():
    assert first_sentence("One, two:\nthree. Four.") == "One, two: three."
    assert first_sentence("TIES, arXiv 2306.01708.\n\nOf each") == "TIES, arXiv 2306.01708."
