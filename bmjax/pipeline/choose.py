"""Which merge becomes `merged`: a written rule over the validation rows, never over the test rows."""

from typing import Any

Scores = dict[str, dict[str, Any]]

RULE = (
    "On the validation rows, which are neither trained on nor in the test: the merge that beats the backbone in the "
    "most domains by {by}; among those the one with the best mean {by} over the domains; "
    "among those the lowest mean held-out loss; among those the first in the config."
)


def choose(validation: dict[str, Scores], by: str) -> str:
    """The name of the chosen merge. `validation` holds scores of 'backbone' and of every merge, by domain.

    by: 'accuracy' (higher is better; a domain without questions counts by its loss) or 'loss' (lower is better).
    """
    backbone = validation["backbone"]

    def value(score: dict[str, Any]) -> float:
        return score["accuracy"] if by == "accuracy" and "accuracy" in score else -score["loss"]

    def key(name: str) -> tuple[float, float, float]:
        scores = validation[name]
        wins = sum(value(scores[d]) > value(backbone[d]) for d in backbone)
        mean = sum(value(scores[d]) for d in backbone) / len(backbone)
        loss = sum(scores[d]["loss"] for d in backbone) / len(backbone)
        return wins, mean, -loss

    merges = [name for name in validation if name != "backbone"]
    return max(merges, key=key)  # max keeps the first of equals
