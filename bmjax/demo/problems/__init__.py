"""Procedural problems in three domains, and the solver that the demo's teacher answers with.

Texts are short (prompt and reasoning together at most about 160 characters) and all domains write arithmetic the
same way, so that a student of a few hundred thousand parameters can learn them and its branches can be merged.
"""

import random
import re
from collections.abc import Container, Sequence
from typing import Literal

from bmjax.config import UserError
from bmjax.demo.problems import code, math, science
from bmjax.demo.problems.common import Calculator, Problem, Solution, split_of

__all__ = ["DOMAINS", "Problem", "Solution", "make_problems", "solve", "solve_with_slip", "split_of"]

MAX_PROMPT_CHARACTERS = 1000

_GENERATORS = {"math": math.generate, "code": code.generate, "science": science.generate}
DOMAINS = tuple(_GENERATORS)
_MAX_FRUITLESS_DRAWS = 10_000
_SLIPS = ((1, -1, 2, -2, 10, -10), (100, -100, 1000, -1000))


def make_problems(
    domain: str,
    n: int,
    seed: int = 0,
    levels: Sequence[int] = (1, 2, 3),
    exclude: Container[str] = (),
    split: Literal["train", "val", "test"] = "train",
) -> list[Problem]:
    """Return `n` problems of a domain with distinct prompts, the levels in turn; the same arguments give the same list.

    Splits are disjoint whatever the seeds: the sha256 of a prompt decides which one it belongs to. `exclude` holds
    prompts to leave out. A smaller `n` gives a prefix of a larger one. UserError when the domain has no more than so
    many distinct problems.
    """
    rng = random.Random(f"{domain}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    fruitless = 0
    while len(problems) < n:
        if fruitless == _MAX_FRUITLESS_DRAWS:
            raise UserError(
                f"{domain}: only {len(problems)} distinct {split} problems of levels {list(levels)} found, "
                f"{n} asked for; ask for fewer or for more levels"
            )
        fruitless += 1
        problem = _GENERATORS[domain](levels[len(problems) % len(levels)], rng)
        if problem is None or problem.prompt in problems or problem.prompt in exclude:
            continue
        if split_of(problem.prompt) == split:
            fruitless = 0
            problems[problem.prompt] = problem
    return list(problems.values())


def solve(prompt: str, calculator: Calculator | None = None) -> Solution:
    """Return the worked solution, from the prompt alone. ValueError for a prompt of none of the three domains."""
    prompt, calculator = prompt.strip(), calculator or Calculator()
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError("the prompt is too long for a problem of the demo")
    if prompt.startswith(code.QUESTION):
        return code.solve(prompt, calculator)
    if re.search(r"\n\d+, \d+, \d+ or ", prompt):
        return science.solve(prompt, calculator)
    return math.solve(prompt, calculator)


def solve_with_slip(prompt: str, rng: random.Random) -> Solution:
    """Return a solution with one arithmetic mistake, carried through to a wrong answer (ValueError as for `solve`).

    A mistake that does not reach the answer, because of a comparison or the nearest choice, is drawn again.
    """
    counter = Calculator()
    right = solve(prompt, counter)
    small, large = ([(step, by) for step in range(counter.steps) for by in group] for group in _SLIPS)
    rng.shuffle(small)
    for step, by in small + large:
        try:
            wrong = solve(prompt, Calculator(step, by))
        except ValueError:
            continue
        if wrong.answer != right.answer and "-" not in wrong.answer:
            return wrong
    return right
