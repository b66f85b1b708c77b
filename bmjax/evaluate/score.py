"""Accuracy with a 95% interval."""

import math
from collections.abc import Sequence
from typing import Any

Z95 = 1.959963984540054


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927): honest near 0 and 1 and for small n."""
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may cross the share


def accuracy(outcomes: Sequence[Sequence[bool | None]]) -> dict[str, Any]:
    """Compute the accuracy of outcomes[question][sample]: right, wrong, or None where it could not be judged.

    accuracy: the mean over the n judged questions of the share of right answers among their judged samples. ci95: its
    interval over questions, for samples of one hang together. k: samples a question. unjudged: samples that are neither
    right nor wrong. ValueError when nothing was judged.
    """
    k = len(outcomes[0])
    if any(len(samples) != k for samples in outcomes):
        raise ValueError("every question needs the same number of samples")
    judged = [[outcome for outcome in samples if outcome is not None] for samples in outcomes]
    shares = [sum(samples) / len(samples) for samples in judged if samples]
    if not shares:
        raise ValueError("no sample was judged")
    n, unjudged = len(shares), k * len(outcomes) - sum(map(len, judged))
    mean = sum(shares) / n
    if k == 1:
        low, high = wilson(round(sum(shares)), n)
    else:
        variance = sum((share - mean) ** 2 for share in shares) / max(1, n - 1)
        half = Z95 * math.sqrt(variance / n)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"accuracy": mean, "ci95": [low, high], "n": n, "k": k, "unjudged": unjudged}
