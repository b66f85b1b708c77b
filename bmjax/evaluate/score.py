"""Accuracy with a 95% interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Mean over n judged questions of the share of right answers among their judged samples, with a 95% interval.

    k: samples a question. unjudged: samples that no judge could decide; they are neither right nor wrong.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    k: int
    unjudged: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927): honest near 0 and 1 and for small n."""
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may cross the share


def accuracy(outcomes: Sequence[Sequence[bool | None]]) -> Accuracy:
    """Compute the accuracy of outcomes[question][sample]: right, wrong, or None where it could not be judged.

    The interval is over questions, for samples of one hang together. ValueError when nothing was judged.
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
        return Accuracy(mean, wilson(round(sum(shares)), n), n, k, unjudged)
    variance = sum((share - mean) ** 2 for share in shares) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Accuracy(mean, (max(0.0, mean - half), min(1.0, mean + half)), n, k, unjudged)
