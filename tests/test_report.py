"""The report of a run: a synthetic run directory, its page read with html.parser, its tables against formulas."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmjax.merge.recipe.recipe import read_recipe
from bmjax.merge.report.statistics import Stats
from bmjax.merge.report.statistics import report as merge_report
from bmjax.report import markdown_table, summary_table, write_report
from bmjax.report.figures import spread
from bmjax.report.records import smoothed, thinned
from bmjax.report.tables import count, headline

DOMAINS = ("math", "code", "science")
MERGES = ("linear", "task_arithmetic_0.5", "fusion_paper", "fusion_sequential", "fusion_symmetric")
SKILL = {
    "backbone": 0.0, "branch/math": 0.02, "branch/code": 0.015, "branch/science": 0.02, "merge/linear": 0.04,
    "merge/task_arithmetic_0.5": 0.05, "merge/fusion_paper": 0.018, "merge/fusion_sequential": 0.015,
    "merge/fusion_symmetric": 0.03, "mixture": 0.155,
}  # fmt: skip
RECIPES = {
    "fusion_paper": {
        "steps": [
            {"name": "mid", "merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]},
            {"name": "tinyr1", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]},
        ]
    },
    "fusion_sequential": {
        "steps": [
            {"name": "first", "merge_method": "arcee_fusion", "base_model": "backbone", "models": ["math"]},
            {"name": "second", "merge_method": "arcee_fusion", "base_model": "first", "models": ["code"]},
            {"name": "third", "merge_method": "arcee_fusion", "base_model": "second", "models": ["science"]},
        ]
    },
    "fusion_symmetric": {"merge_method": "arcee_fusion", "base_model": "backbone", "models": list(DOMAINS)},
    "task_arithmetic_0.5": {"merge_method": "task_arithmetic", "base_model": "backbone", "models": list(DOMAINS)},
    "linear": {"merge_method": "linear", "models": list(DOMAINS), "parameters": {"weight": 1.0}},
}


def synthetic_run(directory: Path, layers: int = 3, merges: tuple[str, ...] = MERGES) -> dict[str, Any]:
    """A run directory as the pipeline leaves it, with numbers of the prototype's size, and its report."""
    rng = np.random.default_rng(7)
    models: dict[str, Any] = {}
    for name in ["backbone", *(f"branch/{d}" for d in DOMAINS), *(f"merge/{m}" for m in merges), "mixture"]:
        where = name.replace("merge/", "merges/")
        if name == "mixture":
            models["merged"] = models["merge/linear"] | {
                "hf": "merged/hf",
                "merge_report": "merged/hf/merge_report.json",
            }
        trained, move = not name.startswith("merge/"), None
        if trained:
            move = write_metrics(directory / where / "metrics.jsonl", name, rng)
        else:
            write_merge_report(directory / where / "hf" / "merge_report.json", name.removeprefix("merge/"), layers, rng)
        models[name] = {
            "hf": f"{where}/hf",
            "metrics": f"{where}/metrics.jsonl" if trained else None,
            "merge_report": None if trained else f"{where}/hf/merge_report.json",
            "tokens": {"backbone": 0, "mixture": 1_158_340}.get(name, 386_113 if trained else 1_158_340),
            "move": move,
            "scores": {d: synthetic_score(name, d, 600, rng) for d in DOMAINS},
        }
    (directory / "merged" / "hf").mkdir(parents=True)
    source = directory / "merges" / "linear" / "hf" / "merge_report.json"
    (directory / "merged" / "hf" / "merge_report.json").write_bytes(source.read_bytes())
    validation = {m: {d: synthetic_score(f"merge/{m}", d, 300, rng) for d in DOMAINS} for m in merges}
    report = {
        "models": models,
        "chosen": {
            "merge": "linear",
            "rule": "On the validation rows: the merge ahead of the backbone in most domains; then the best mean.",
            "validation": {"backbone": {d: synthetic_score("backbone", d, 300, rng) for d in DOMAINS}, **validation},
        },
        "selection": {
            "math": synthetic_selection(3109, duplicate=12, truncated=204, wrong=611, malformed=64),
            "code": synthetic_selection(2877, truncated=310, wrong=702, malformed=111),
            "science": synthetic_selection(3321, truncated=95, wrong=501, malformed=52, enough=31),
        },
        "stages": synthetic_stages(models, rng),
        "versions": {"bmjax": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "numpy": "2.3.1"},
        "config": {
            "seed": 0, "domains": {d: {"problems": {"data": f"{d}.jsonl"}} for d in DOMAINS},
            "branch": {"steps": 200, "learning_rate": 0.0005, "freeze": ["embed/*"]},
            "evaluate": {"max_new_tokens": 72},
        },
    }  # fmt: skip
    (directory / "report.json").write_text(json.dumps(report))
    return report


def synthetic_selection(kept: int, **dropped: int) -> dict[str, Any]:
    return {"collected": kept + sum(dropped.values()), "kept": kept, "dropped": dropped}


def synthetic_score(name: str, domain: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    at = {"math": 0.31, "code": 0.22, "science": 0.29}[domain]
    own = 0.11 if name.endswith(domain) else 0.0
    right = int(rng.binomial(n, at + SKILL[name] + own))
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    loss = 0.19 - 0.25 * SKILL[name] - 0.2 * own + 0.004 * rng.standard_normal()
    return {
        "accuracy": p, "ci95": [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)],
        "n": n, "k": 1, "truncated": round(0.05 * rng.random(), 4), "loss": loss,
        "bits_per_byte": loss * 0.61, "loss_tokens": int(25_000 + rng.integers(3000)),
    }  # fmt: skip


def write_metrics(path: Path, name: str, rng: np.random.Generator) -> float | None:
    """A training's metrics.jsonl, its last line cut off; returns the final move."""
    path.parent.mkdir(parents=True)
    steps = {"backbone": 900, "mixture": 600}.get(name, 200)
    lines = []
    for step in range(1, steps + 1):
        start, end = (6.2, 0.19) if name == "backbone" else (0.21, 0.15 if name == "mixture" else 0.165)
        loss = end + (start - end) * math.exp(-8 * step / steps) + 0.012 * rng.standard_normal()
        line = {
            "step": step, "epoch": step / 100, "loss": abs(loss), "grad_norm": 0.4 + 0.2 * rng.random(),
            "learning_rate": 5e-4 * min(1.0, step / 20), "tokens_per_second": 16_000 + 800 * rng.standard_normal(),
        }  # fmt: skip
        if name != "backbone":
            line["move"] = (0.03 if name == "mixture" else 0.022 + 0.0008 * len(name)) * (
                1 - math.exp(-4 * step / steps)
            )
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + '\n{"step": 9, "loss": 0.2, "le')
    return line.get("move")


def write_merge_report(path: Path, name: str, layers: int, rng: np.random.Generator) -> None:
    """Through bmjax.merge.report.statistics.report, so that the page is tested on what merges write."""
    recipe = read_recipe(RECIPES[name] | {"sources": {n: n for n in ("backbone", *DOMAINS)}})
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    tensors: dict[str, dict[str, Stats]] = {}
    for tensor in sorted(names):
        tensors[tensor] = {}
        for step in recipe.steps:
            size, selects = len(step.branches), step.method.name == "arcee_fusion"
            frozen = "embed" in tensor
            kept = rng.uniform(0.03, 0.16, size) if selects else np.ones(size)
            delta = 8 * rng.uniform(0.02, 0.04, size)
            if name == "linear":
                delta[0] = 0.0
            tensors[tensor][step.name] = Stats(
                4096, step.branches, np.diag((delta * (0 if frozen else 1)) ** 2), 64.0, 0.01, 0.0,
                4096 * kept * (0 if frozen and selects else 1),
            )  # fmt: skip
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"recipe": dict(recipe.text), **merge_report(recipe, tensors)}))


def synthetic_stages(models: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    names = [
        *(f"data/{d}" for d in DOMAINS),
        "backbone",
        *(f"teach/{d}" for d in DOMAINS),
        *(f"branch/{d}" for d in DOMAINS),
    ]
    names += [
        "mixture",
        *(m for m in models if m.startswith("merge/")),
        "merged",
        *(f"evaluate/test/{m}" for m in models),
    ]
    return {
        name: {"seconds": round(float(rng.uniform(0.4, 40)), 2), "peak_rss_mib": 400 + 10.0 * i}
        for i, name in enumerate(names)
    }


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on a tag that is not closed in order."""

    VOID = ("meta", "br", "hr", "path", "use", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.svg_texts: list[str] = []
        self.figures: list[dict[str, int]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figure":
            self.figures.append({"svg": 0, "figcaption": 0})
        if tag in ("svg", "figcaption") and "figure" in self.stack:
            self.figures[-1][tag] += 1

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.texts.append(data)
        if "svg" in self.stack:
            self.svg_texts.append(data.strip())
        elif "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    directory = tmp_path_factory.mktemp("run")
    report = synthetic_run(directory)
    path = write_report(directory, report)
    assert path == directory / "report.html"
    return directory, report, path.read_text(encoding="utf-8")


def test_every_model_and_number_is_on_the_page(run):
    _, report, html = run
    page = Page(html)
    rows = [row for row in page.rows if row and row[0] in report["models"]]
    for name, entry in report["models"].items():
        table = next(row for row in rows if row[0] == name)
        accuracies = [entry["scores"][d]["accuracy"] for d in DOMAINS]
        losses = [entry["scores"][d]["loss"] for d in DOMAINS]
        halves = [(entry["scores"][d]["ci95"][1] - entry["scores"][d]["ci95"][0]) / 2 for d in DOMAINS]
        assert table[1:4] == [f"{100 * a:.1f} ±{100 * h:.1f}" for a, h in zip(accuracies, halves, strict=True)]
        assert table[4] == f"{100 * np.mean(accuracies):.1f}"
        assert table[5:8] == [f"{loss:.4f}" for loss in losses]
        assert table[8] == f"{np.mean(losses):.4f}"
        for domain in DOMAINS:
            own = entry["scores"][domain]
            full = next(row for row in rows if row[:2] == [name, domain])
            assert full[2] == f"{100 * own['accuracy']:.2f}"
            assert full[4:6] == [str(own["n"]), str(own["k"])]
            assert full[6] == f"{100 * own['truncated']:.1f}"
            assert full[7:] == [f"{own['loss']:.5f}", f"{own['bits_per_byte']:.5f}", str(own["loss_tokens"])]
        assert any(row == [name, entry["hf"]] for row in page.rows)
        assert name in page.svg_texts
    for name, score in report["chosen"]["validation"].items():
        label = "backbone" if name == "backbone" else f"merge/{name}" + (" (chosen)" if name == "linear" else "")
        expected = [f"{score[d]['loss']:.4f}" for d in DOMAINS]
        assert any(row[0] == label and row[5:8] == expected for row in page.rows if len(row) == 9)
    for domain, own in report["selection"].items():
        row = next(row for row in page.rows if row[:3] == [domain, str(own["collected"]), str(own["kept"])])
        assert set(map(str, own["dropped"].values())) <= set(row[4:])
    stages = [row[:2] for row in page.rows]
    assert all([name, f"{own['seconds']:.1f}"] in stages for name, own in report["stages"].items())
    assert all([name, version] in page.rows for name, version in report["versions"].items())
    assert "max_new_tokens: 72" in "".join(page.texts)
    assert report["chosen"]["rule"] in page.texts


def test_the_page_loads_nothing(run):
    html = run[2]
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


def test_every_figure_has_a_caption_and_every_picture_a_text(run):
    page = Page(run[2])
    assert len(page.figures) == 6
    assert all(figure["figcaption"] == 1 and figure["svg"] >= 1 for figure in page.figures)
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert len(pictures) == 3 + 3 + 5 + 1 + 3 + 1
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in pictures)
    score = run[1]["models"]["mixture"]["scores"]["code"]
    assert any(f"mixture {100 * score['accuracy']:.1f} (" in (a["aria-label"] or "") for a in pictures)


def test_figures_take_their_colours_from_the_page(run):
    svg = "".join(re.findall(r"<svg.*?</svg>", run[2], flags=re.S))
    assert set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) <= {"none"} | set(re.findall(r"var\(--\w+\)", svg))
    names = set(re.findall(r"var\(--(\w+)\)", run[2]))
    dark = re.search(r"prefers-color-scheme:dark\)\{:root\{(.*?)\}", run[2])
    assert dark is not None and names <= set(re.findall(r"--(\w+):", dark.group(1)))


def test_the_heat_map_shows_what_the_merges_kept(run):
    directory, report, html = run
    page = Page(html)
    saved = json.loads((directory / "merges" / "fusion_symmetric" / "hf" / "merge_report.json").read_text())
    step = next(name for name in saved["total"] if name != "size")
    for layer in ("0", "1", "2", "norm", "embed_tokens"):
        shares = saved["layers"][layer][step]["models"]
        for own in shares.values():
            assert f"{100 * own['kept']:.1f}" in page.svg_texts
    assert "tinyr1" in page.svg_texts and "← mid" in page.svg_texts
    text = "".join(page.texts)
    assert "Every entry of every branch goes into: merge/linear, merge/task_arithmetic_0.5." in text
    # The linear merge has no base: its first model's change is 0 by definition, so another merge shows the changes.
    assert "from the base of merge/task_arithmetic_0.5" in text


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


def small(**scores: tuple[float | None, ...]) -> dict[str, Any]:
    """A report of given accuracies by model, in domains a, b, ...; the loss is 1 - accuracy."""

    def score(x: float) -> dict[str, Any]:
        return {"accuracy": x, "ci95": [x - 0.01, x + 0.01], "loss": 1 - x}

    models = {
        name: {
            "tokens": 1000 * i,
            "scores": {d: score(x) for d, x in zip("abc", values, strict=False) if x is not None},
        }
        for i, (name, values) in enumerate(scores.items())
    }
    return {"models": models, "chosen": {"merge": "linear"}}


def test_the_best_of_each_column_is_marked():
    report = small(backbone=(0.5, 0.25), branch=(0.75, None), merged=(0.625, 0.5), mixture=(0.75, 0.375))
    lines = [line.split() for line in summary_table(report).splitlines()]
    accuracy, loss = lines[1:5], lines[7:11]
    assert accuracy == [
        ["backbone", "50.0", "±1.0", "25.0", "±1.0", "37.5", "0"],
        ["branch", "75.0", "±1.0*", "–", "–", "1k"],
        ["merged", "62.5", "±1.0", "50.0", "±1.0*", "56.2*", "2k"],
        ["mixture", "75.0", "±1.0*", "37.5", "±1.0", "56.2*", "3k"],
    ]
    assert loss == [
        ["backbone", "0.5000", "0.7500", "0.6250", "0"],
        ["branch", "0.2500*", "–", "–", "1k"],
        ["merged", "0.3750", "0.5000*", "0.4375*", "2k"],
        ["mixture", "0.2500*", "0.6250", "0.4375*", "3k"],
    ]
    rows = [line.strip("| ").split(" | ") for line in markdown_table(report).splitlines()]
    assert rows[4] == ["merged", "62.5 ±1.0", "**50.0 ±1.0**", "**56.2**", "0.3750", "**0.5000**", "**0.4375**", "2k"]


def test_the_page_marks_the_best_and_names_the_merged(run):
    _, report, html = run
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">.*?</tr>", html)[: len(report["models"])]
    for column, domain in enumerate(DOMAINS):
        values = {name: entry["scores"][domain]["accuracy"] for name, entry in report["models"].items()}
        for name, row in zip(values, rows, strict=True):
            cell = re.findall(r"<td[^>]*>", row)[column]
            assert ("best" in cell) == (values[name] == max(values.values()))
    assert [row.startswith('<tr class="merged">') for row in rows] == [name == "merged" for name in report["models"]]


def test_summary_table_fits_a_terminal(run):
    table = summary_table(run[1]).split("* best of its column")[0]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("scores", "parts"),
    [
        ({"backbone": (0.2, 0.3), "merged": (0.3, 0.35), "mixture": (0.25, 0.3)},
         ["The merged model (linear) beats the backbone in both domains by accuracy: a +10.0 and b +5.0 points; ",
          "It beats the backbone in both domains by held-out loss: a −0.1000 and b −0.0500; mean 0.7500 → 0.6750.",
          "does not win: mean accuracy 27.5 % against 32.5 % and mean held-out loss 0.7250 against 0.6750, with 2k "]),
        ({"backbone": (0.2, 0.3, 0.4), "merged": (0.3, 0.25, 0.4), "mixture": (0.4, 0.5, 0.6)},
         ["beats the backbone in 1 of 3 domains by accuracy: a +10.0, b −5.0 and c +0.0 points;",
          "The mixture, one model trained on all domains together, wins:"]),
        ({"backbone": (0.2,), "merged": (0.212,)},
         ["beats the backbone in the one domain, a, by accuracy: a +1.2 points.",
          "In a the gain is within what chance can give"]),
        ({"backbone": (0.2, 0.3), "merged": (0.1, 0.3)},
         ["beats the backbone in no domain by accuracy: a −10.0 and b +0.0"]),
    ],
)  # fmt: skip
def test_the_headline_says_what_the_numbers_say(scores, parts):
    text = "\n".join(headline(small(**scores)))
    for part in parts:
        assert part in text
    assert ("mixture" in text) == ("mixture" in scores)
    # Intervals of ±1 point each: a difference of up to sqrt(2) points may be chance.
    assert ("chance" in text) == any(
        0 < m - b < 0.0141 for b, m in zip(scores["backbone"], scores["merged"], strict=True)
    )


def test_chance_is_named_only_where_it_may_be(run):
    models = run[1]["models"]
    unsure = []
    for domain in DOMAINS:
        old, new = (models[name]["scores"][domain] for name in ("backbone", "merged"))
        both = math.hypot(*((s["ci95"][1] - s["ci95"][0]) / 2 for s in (old, new)))
        unsure += [domain] if 0 < new["accuracy"] - old["accuracy"] < both else []
    assert 0 < len(unsure) < 3
    assert f"In {' and '.join(unsure)} the gain is within" in "\n".join(headline(run[1]))


def test_curves_are_thinned_and_smoothed():
    rng = np.random.default_rng(0)
    y = rng.standard_normal(10_007)
    points = list(enumerate(y.tolist()))
    thin = thinned(points, 400)
    assert len(thin) == math.ceil(10_007 / 26)
    assert thin[3] == pytest.approx((np.mean(range(78, 104)), np.mean(y[78:104])))
    assert thinned(points[:50], 400) == points[:50]
    smooth = smoothed(points[:480])
    assert [x for x, _ in smooth] == list(range(480))
    assert smooth[0][1] == pytest.approx(y[0]) and smooth[7][1] == pytest.approx(np.mean(y[:15]))
    assert smooth[200][1] == pytest.approx(np.mean(y[180:221]))
    assert smooth[479][1] == pytest.approx(np.mean(y[459:480]))


def test_a_long_deep_run_stays_a_small_page(tmp_path):
    report = synthetic_run(tmp_path, layers=64, merges=("linear", "fusion_symmetric"))
    line = {"loss": 0.5, "learning_rate": 1e-5, "grad_norm": 1.0, "move": 0.01, "tokens_per_second": 100.0}
    long = "\n".join(json.dumps({"step": step, **line}) for step in range(1, 30_001))
    (tmp_path / "branch" / "math" / "metrics.jsonl").write_text(long)
    path = write_report(tmp_path, report)
    assert path.stat().st_size < 2_000_000
    assert {"0", "31", "63"} <= set(Page(path.read_text(encoding="utf-8")).svg_texts)


def test_labels_are_spread():
    places = [50.0, 51.0, 3.0, 99.0, 100.0]
    found = spread(places, 10, 100)
    order = sorted(range(5), key=lambda i: places[i])
    moved = [found[i] for i in order]
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(moved))
    assert max(found) <= 100 and found[2] == 3.0


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (940, "940"), (12_345, "12.3k"), (1_234_567, "1.23M"), (4.56e9, "4.56B"), (None, "–")],
)
def test_token_counts_are_short(tokens, text):
    assert count(tokens) == text
