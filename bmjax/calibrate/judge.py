"""Held-out losses, document by document, and whether a model is better than another by more than their noise.

A stage of a merge (learned coefficients, polishing, distilling) is kept only if the mean over domains of its gain in
nats a target token is more than twice the gain's standard error, and no domain loses more than twice its own. Both
models read the same documents, so the noise is that of the differences: with documents i of n_i target tokens and gains
g_i in nats, a domain's gain is G = sum g_i / sum n_i, and the variance of this ratio is m / (m - 1) * sum (g_i - G
n_i)^2 / (sum n_i)^2 over its m documents. One document has no noise to measure, so nothing is better by it. A
ten-thousandth of the loss is added, for rounding differs between programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ERRORS = 2.0  # standard errors that a gain has to exceed
ROUNDING = 1e-4  # of the loss


@dataclass(frozen=True)
class Loss:
    """The loss of a domain's held-out documents under one model."""

    nats: np.ndarray  # of each document, float64
    targets: np.ndarray  # target tokens of each document, float64

    @property
    def mean(self) -> float:
        """Nats a target token."""
        return float(self.nats.sum() / max(self.targets.sum(), 1.0))

    def plain(self) -> list[list[float]]:
        """Return it as a journal holds it."""
        return [self.nats.tolist(), self.targets.tolist()]

    @classmethod
    def read(cls, plain: Sequence[Sequence[float]]) -> "Loss":
        """Return the loss that `plain` wrote."""
        return cls(*(np.array(values, np.float64) for values in plain))


def by_document(nats_BT: Any, mask_BT: Any, segment_ids_BT: Any) -> Loss:
    """Sum over each document of packed rows, in their order. mask_BT: weights of the positions that are judged."""
    nats: list[float] = []
    targets: list[float] = []
    masked_BT = np.asarray(nats_BT, np.float64) * (np.asarray(mask_BT) > 0)
    for row, mask, segments in zip(masked_BT, np.asarray(mask_BT), np.asarray(segment_ids_BT), strict=True):
        for sums, values in ((nats, row), (targets, mask)):
            sums += np.bincount(segments, values, minlength=int(segments.max()) + 1)[1:].tolist()
    return Loss(np.array(nats), np.array(targets))


def joined(losses: Sequence[Loss]) -> Loss:
    """Return the documents of several batches as one loss."""
    return Loss(np.concatenate([x.nats for x in losses]), np.concatenate([x.targets for x in losses]))


def gain(before: Loss, after: Loss) -> tuple[float, float]:
    """Return by how many nats a target token a domain's loss fell, and the standard error; inf for one document."""
    gains, targets = before.nats - after.nats, before.targets
    total, count = max(targets.sum(), 1.0), len(gains)
    mean = gains.sum() / total
    if count < 2:
        return float(mean), np.inf
    return float(mean), float(np.sqrt(count / (count - 1) * np.sum((gains - mean * targets) ** 2)) / total)


def fault(names: Sequence[str], before: Sequence[Loss], after: Sequence[Loss]) -> str | None:
    """Return why a model is not better than the one before, for a line that begins with what it is; None: it is.

    names: of the domains, in the order of the losses.
    """
    gains = [gain(*pair) for pair in zip(before, after, strict=True)]
    old, new = (float(np.mean([loss.mean for loss in losses])) for losses in (before, after))
    mean, error = np.mean([g for g, _ in gains]), float(np.sqrt(sum(e**2 for _, e in gains))) / len(gains)
    if alone := [name for name, loss in zip(names, before, strict=True) if len(loss.nats) < 2]:
        return f"one held-out document of '{alone[0]}' shows no noise; give 2 or more (held_out)"
    if not mean > ERRORS * error + ROUNDING * old:  # NaN is not
        return (
            f"held-out loss {new:.4f} is not below {old:.4f} by more than twice the standard error over documents, "
            f"{error:.4f}"
        )
    for name, (of_domain, noise), loss in zip(names, gains, before, strict=True):
        if not of_domain >= -(ERRORS * noise + ROUNDING * loss.mean):
            return (
                f"held-out loss of '{name}' rises from {loss.mean:.4f} by {-of_domain:.4f}, more than twice the "
                f"standard error over documents, {noise:.4f}"
            )
    return None


def worse_than_base(names: Sequence[str], base: Sequence[Loss], result: Sequence[Loss]) -> str | None:
    """Return the domains in which a result's loss is above the base's, with both; None: in none."""
    worse = [
        f"'{name}' {b.mean:.4f} -> {r.mean:.4f}"
        for name, b, r in zip(names, base, result, strict=True)
        if not r.mean <= b.mean * (1 + ROUNDING)
    ]
    return ", ".join(worse) or None
