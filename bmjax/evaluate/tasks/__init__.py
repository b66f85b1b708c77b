"""Benchmarks by name. A new one is a declaration in one of the files that are imported here."""

from bmjax.evaluate.tasks import choice, loss, mathematics, programs  # noqa: F401 - importing registers their tasks
from bmjax.evaluate.tasks.task import TASKS, Task

__all__ = ["TASKS", "Task"]
