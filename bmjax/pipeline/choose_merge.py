"""Which merge becomes `merged`: a written rule over the validation rows, never over the test rows."""

from typing import Any

Scores = dict[str, dict[str, Any]]

RULE = (
    "On the validation rows, which are neither trained on nor in the test: the merge that beats the backbone in the "
    "most domains by {by}; among those the one with the best mean {by} over the domains; "
    "among those the lowest mean held-out loss; among those the first in the config."
)


def choose(validation: dict[str, Scores], by: str) -> str:
    """Return the name of the chosen merge.

    Arguments:
        validation: scores of 'backbone' and of every merge, by domain.
        by: 'accuracy' (higher is better) or 'loss' (lower is better); a domain that has only the other counts by that.
    """
    backbone = validation["backbone"]

    def value(score: dict[str, Any]) -> float:
        by_accuracy = "accuracy" in score and (by == "accuracy" or "loss" not in score)
        return score["accuracy"] if by_accuracy else -score["loss"]

    def key(name: str) -> tuple[float, float, float]:
        scores = validation[name]
        wins = sum(value(scores[d]) > value(backbone[d]) for d in backbone)
        mean = sum(value(scores[d]) for d in backbone) / len(backbone)
        losses = [scores[d]["loss"] for d in backbone if "loss" in scores[d]]
        return wins, mean, -sum(losses) / max(1, len(losses))

    merges = [name for name in validation if name != "backbone"]
    return max(merges, key=key)  # max keeps the first of equals
