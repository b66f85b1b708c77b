"""Statistics of judged samples: pass@1, pass@k, maj@k, and their 95 % intervals over problems.

A problem's samples hang together, so every interval is over problems: a bootstrap that draws whole problems. What could
not be judged is counted apart and is neither right nor wrong. docs/evaluating.md has the formulas.
"""

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from bmjax.errors import UserError
from bmjax.evaluate.tasks.task import METRIC

Z95 = 1.959963984540054
DRAWS = 10_000  # of the bootstrap

Outcomes = Sequence[Sequence[bool | None]]  # of every problem, of every sample: right, wrong, or not judged


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share of n (J. Am. Stat. Assoc. 22, 1927): honest near 0 and 1."""
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may cross the share


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of values, by drawing as many of them with replacement.

    The values of problems are few different ones, so that a draw is a draw of how often each occurs.
    """
    levels, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS)
    low, high = np.quantile(drawn @ levels / len(values), (0.025, 0.975))
    return float(low), float(high)


def interval(values: Sequence[float], seed: int = 0) -> tuple[list[float], str]:
    """Return the 95 % interval of the mean of shares of problems, and its name: 'bootstrap' or 'wilson'.

    Where all problems have the same share every bootstrap draw is the same, and Wilson's interval stands in.
    """
    if min(values) == max(values):
        return list(wilson(values[0], len(values))), "wilson"
    return list(bootstrap(values, seed)), "bootstrap"


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased chance that at least one of k of n samples is right: 1 - C(n - right, k) / C(n, k).

    ValueError for k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} of {n} samples")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[int | None], right: Sequence[bool]) -> float:
    """Return the share of right samples behind the answer that most samples gave.

    Arguments:
        votes: the number of the answer that a sample gave, the same for equal answers; None for a sample without one.
        right: whether each sample is right.

    Answers with equally many votes each win with equal chance, so that the result is their mean. Without any answer it
    is 0.
    """
    groups: dict[int, list[bool]] = {}
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            groups.setdefault(vote, []).append(is_right)
    most = max(map(len, groups.values()), default=0)
    shares = [sum(group) / len(group) for group in groups.values() if len(group) == most]
    return sum(shares) / len(shares) if shares else 0.0


def accuracy(outcomes: Outcomes, seed: int = 0) -> dict[str, Any]:
    """Compute the accuracy of outcomes[problem][sample], which is avg@k: the mean over problems of their shares.

    Returns:
        accuracy: over the n problems with a judged sample, each by its judged samples. ci95, ci95_by: its interval.
        k: samples a problem. unjudged: samples that are neither right nor wrong.

    Raises:
        ValueError: when nothing was judged, or problems have different numbers of samples.
    """
    k = len(outcomes[0])
    if any(len(samples) != k for samples in outcomes):
        raise ValueError("every problem needs the same number of samples")
    judged = [[outcome for outcome in samples if outcome is not None] for samples in outcomes]
    shares = [sum(samples) / len(samples) for samples in judged if samples]
    if not shares:
        raise ValueError("no sample was judged")
    ends, name = interval(shares, seed)
    unjudged = k * len(outcomes) - sum(map(len, judged))
    return {
        "accuracy": sum(shares) / len(shares), "ci95": ends, "ci95_by": name, "n": len(shares), "k": k,
        "unjudged": unjudged,
    }  # fmt: skip


def metric(
    name: str, outcomes: Outcomes, votes: Sequence[Sequence[int | None]] | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """Compute avg@k, pass@k or maj@k; None where no problem has k judged samples.

    Arguments:
        name: such as "pass@8". avg and maj take the first k samples, pass all of them.
        outcomes: of the samples, in the order of their numbers.
        votes: for maj: of the same samples, see `majority`.

    Returns:
        value, its ci95 and ci95_by, and n, the problems with at least k judged samples; others do not count.
    """
    match = METRIC.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown metric '{name}'")
    kind, k = match[1], int(match[2])
    values = []
    for number, samples in enumerate(outcomes):
        judged = [(at, bool(outcome)) for at, outcome in enumerate(samples) if outcome is not None]
        if len(judged) < k:
            continue
        right = [outcome for _, outcome in judged]
        if kind == "pass":
            values.append(pass_at_k(len(right), sum(right), k))
        elif kind == "avg":
            values.append(sum(right[:k]) / k)
        else:
            assert votes is not None
            values.append(majority([votes[number][at] for at, _ in judged[:k]], right[:k]))
    if not values:
        return None
    ends, by = interval(values, seed)
    return {"value": sum(values) / len(values), "ci95": ends, "ci95_by": by, "n": len(values)}


def require_samples(task: str, counts: Sequence[int], k: int) -> None:
    """Raise UserError unless every problem has k samples, for of fewer no avg@k, pass@k or maj@k is reported."""
    lacking = [k - count for count in counts if count < k]
    if lacking:
        raise UserError(
            f"tasks.{task}: {k} samples of each problem are needed, {len(lacking)} of {len(counts)} problems lack "
            f"{sum(lacking)} in all; the same command asks for them"
        )


def token_lengths(counts: Sequence[int | None]) -> dict[str, Any] | None:
    """Return mean, median and max of answers' lengths in tokens, and of how many answers; None where none is known."""
    known = [count for count in counts if count is not None]
    if not known:
        return None
    return {"mean": mean(known), "median": median(known), "max": max(known), "answers": len(known)}
