"""Competitions and word problems with a final answer. AIME's number of samples is TinyR1's (arXiv 2503.04872)."""

from bmjax.evaluate.tasks.task import Task, register

register(Task("aime24", "AIME 2024: 30 problems, avg@16", "auto", "math", samples=16, metrics=("maj@16",)))
register(Task("aime25", "AIME 2025: 30 problems, avg@16", "auto", "math", samples=16, metrics=("maj@16",)))
register(Task("math500", "500 problems of MATH's test set", "math", "math"))
register(Task("gsm8k", "grade-school mathematics, 1,319 test problems", "gsm8k", "math"))
