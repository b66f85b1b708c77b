"""Documents into rows of a fixed length: best-fit decreasing, within 11/9 of the least number of rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of document numbers; each document goes where it leaves the least room (longest first).

    Every length must be at most `capacity`. The result depends on nothing but the arguments.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(room, (free - length, row))
    return rows


def fill(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of positions that hold a token."""
    return sum(lengths) / (len(rows) * capacity)
