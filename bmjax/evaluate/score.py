"""Accuracy with a 95% interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Mean over n questions of the share of right answers among k samples, with a 95% interval."""

    accuracy: float
    ci95: tuple[float, float]
    n: int
    k: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval for a share (J. Am. Stat. Assoc. 22, 1927): honest near 0 and 1 and for small n."""
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may cross the share


def accuracy(right: Sequence[Sequence[bool]]) -> Accuracy:
    """From right[question][sample]. The interval is over questions: samples of one hang together."""
    n, k = len(right), len(right[0])
    if any(len(samples) != k for samples in right):
        raise ValueError("every question needs the same number of samples")
    shares = [sum(samples) / k for samples in right]
    mean = sum(shares) / n
    if k == 1:
        return Accuracy(mean, wilson(round(sum(shares)), n), n, k)
    variance = sum((share - mean) ** 2 for share in shares) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Accuracy(mean, (max(0.0, mean - half), min(1.0, mean + half)), n, k)
