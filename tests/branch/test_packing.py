"""Packing against the bound of best-fit decreasing, and real lengths."""

import math

import numpy as np
import pytest

from bmjax.branch.loader import best_fit


def lengths(seed: int, count: int, top: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(math.log(top / 6), 0.9, count).astype(int), 1, top).tolist()


def first_come(sizes: list[int], capacity: int) -> int:
    """Rows used when each document goes into the current row, or opens the next one."""
    rows, room = 0, 0
    for size in sizes:
        if size > room:
            rows, room = rows + 1, capacity
        room -= size
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_each_document_and_the_capacity(seed):
    sizes = lengths(seed, 300, 512)
    rows = best_fit(sizes, 512)
    assert sorted(document for row in rows for document in row) == list(range(300))
    assert all(sum(sizes[document] for document in row) <= 512 for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_packing_needs_nearly_the_fewest_rows(seed):
    sizes = lengths(seed, 300, 512)
    rows = best_fit(sizes, 512)
    assert len(rows) < first_come(sizes, 512)
    least = math.ceil(sum(sizes) / 512)
    assert len(rows) <= 11 / 9 * least + 1


def test_packing_a_case_by_hand():
    # 7 opens a row, 5 another; 4 fits only beside 5, 3 fits exactly beside 7, 1 exactly beside 5 and 4.
    assert best_fit([3, 5, 7, 4, 1], 10) == [[2, 0], [1, 3, 4]]
    assert best_fit([10, 10], 10) == [[0], [1]]


def test_packing_depends_on_its_arguments_only():
    sizes = lengths(9, 200, 100)
    assert best_fit(sizes, 128) == best_fit(list(sizes), 128)
