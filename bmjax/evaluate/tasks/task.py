"""What a task is: where its questions are, how they are asked and judged, and what is measured.

A task is declared in a file of this folder and registered by name. Its values are those keys of a task in the config
that the user leaves out. Settings import this module, so nothing heavy may be imported here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bmjax.teach.benchmarks import BENCHMARKS
from bmjax.teach.settings import AdapterName, JudgeName

METRIC = re.compile(r"(avg|pass|maj)@([1-9]\d*)")


@dataclass(frozen=True)
class Task:
    """A benchmark as evaluation asks it.

    Attributes:
        name: what the config calls it, a name of BENCHMARKS where its data are listed there.
        summary: one line for `--help` and the documentation.
        adapter: the form of its rows, which gives prompt, reference and instruction; None: rows are given by templates.
        judge: of its answers; None: the reference decides.
        samples, temperature, top_p, max_new_tokens: how it is sampled, as its paper or the models' cards do.
        metrics: beside the accuracy, which is avg@samples.
        shuffle_options: whether each sample sees the options in an order of its own.
        between: the rows that count, see the key of that name.
        lcb_compat: whether programs are also judged as LiveCodeBench's own code does.
        copy: why the questions are not fetched, and the file that a user has to give; empty where they are fetched.
        needs_traces: whether it measures the loss of traces, which the user gives.
    """

    name: str
    summary: str
    adapter: AdapterName | None = None
    judge: JudgeName | None = None
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768
    metrics: tuple[str, ...] = ()
    shuffle_options: bool = False
    between: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    lcb_compat: bool = False
    copy: str = ""
    needs_traces: bool = False

    def row_values(self) -> dict[str, Any]:
        """Return the keys of the config that say which rows are asked, and how they become questions."""
        values: dict[str, Any] = {"between": dict(self.between)} if self.between else {}
        for key, value in (("adapter", self.adapter), ("judge", self.judge)):
            if value is not None:
                values[key] = value
        if not self.copy and self.name in BENCHMARKS:
            values["questions"] = BENCHMARKS[self.name].data
        return values

    def sampling_values(self) -> dict[str, Any]:
        """Return the keys of the config that say how it is sampled and measured."""
        names = ("samples", "temperature", "top_p", "max_new_tokens", "shuffle_options", "lcb_compat")
        return {name: getattr(self, name) for name in names} | {"metrics": list(self.metrics)}


TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Make a task known by its name."""
    TASKS[task.name] = task
