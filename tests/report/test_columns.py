"""The tables for a terminal and a README, and the headline."""

import math
from typing import Any

import pytest

from bmjax.report.columns import headline, markdown_table, summary_table
from tests.report.synthetic import DOMAINS


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
    assert rows[4] == [
        "merged",
        "62.5 ±1.0",
        "**50.0 ±1.0**",
        "**56.2 ±0.7**",
        "0.3750",
        "**0.5000**",
        "**0.4375**",
        "2k",
    ]


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
