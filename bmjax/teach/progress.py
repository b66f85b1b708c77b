"""What a collecting run has done so far: counts, speed, cost, and how long and how dear the rest will be."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bmjax.log import Bar
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.record import ending
from bmjax.teach.settings import Price

COUNTS = ("wanted", "present", "collected", "failed", "right", "wrong", "unjudged", "disputed", "truncated", "refused")


class Progress:
    """Counts of a run. price: of tokens; without one, the cost that the endpoint itself tells is summed."""

    def __init__(self, wanted: int, present: int, price: Price | None) -> None:
        self.counts = dict.fromkeys(COUNTS, 0) | {"wanted": wanted, "present": present}
        self.finish_reasons: Counter[str] = Counter()
        self._price, self._started = price, time.monotonic()
        self._cost = 0.0
        self._is_costed = price is not None
        self.bar: Bar | None = None

    def note_answer(self, verdict: Verdict, finish_reason: str, usage: Mapping[str, Any]) -> None:
        """Count an answer that was recorded; disputed is one of which a second judge says otherwise."""
        self.counts["collected"] += 1
        self.counts[verdict.verdict] += 1
        self.counts["disputed"] += bool(verdict.disagreement)
        if (end := ending(finish_reason)) != "whole":
            self.counts[end] += 1
            self.finish_reasons[finish_reason] += 1
        self._cost += self._cost_of(usage)

    @property
    def is_bar(self) -> bool:
        """Whether a bar on a terminal shows the progress."""
        return self.bar is not None and self.bar.is_bar

    def show(self) -> None:
        """Bring the bar up to date."""
        if self.bar is not None:
            self.bar.update(self.counts["collected"] + self.counts["failed"] - self.bar.count)
            if self._is_costed:
                self.bar.remark(f"cost {self._cost:.2f}")

    def _cost_of(self, usage: Mapping[str, Any]) -> float:
        if self._price is None:
            cost = _number(usage, "cost")
            self._is_costed |= cost > 0
            return cost
        tokens = self._price.input * _number(usage, "prompt_tokens")
        return (tokens + self._price.output * _number(usage, "completion_tokens")) / 1e6

    def line(self) -> str:
        """Return where the run is: done, rate, failures, cost so far and to go, time to go."""
        counts = self.counts
        done, todo = counts["collected"] + counts["failed"], counts["wanted"] - counts["present"]
        rate = done / max(time.monotonic() - self._started, 1e-9)
        parts = [f"{done}/{todo}", f"{rate:.1f}/s", f"{counts['failed']} failed"]
        if self._is_costed:
            each = self._cost / max(counts["collected"], 1)
            parts.append(f"cost {self._cost:.2f}, about {each * (todo - done):.2f} to go")
        if rate:
            parts.append(f"eta {_duration((todo - done) / rate)}")
        return ", ".join(parts)

    def summary(self) -> str:
        """Return what came of the run."""
        counts = self.counts
        text = (
            f"{counts['collected']} collected ({counts['right']} right, {counts['wrong']} wrong, "
            f"{counts['unjudged']} unjudged, {counts['truncated']} truncated, {counts['refused']} refused), "
            f"{counts['failed']} failed"
        )
        if counts["disputed"]:
            text += f"; a second judge says otherwise of {counts['disputed']}"
        if self.finish_reasons:
            names = ", ".join(f"{name} {count}" for name, count in self.finish_reasons.most_common())
            text += f"; ended by {names}"
        return f"{text}; cost {self._cost:.2f}" if self._is_costed else text


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
