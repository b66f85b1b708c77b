"""How documents are packed into rows: by their lengths alone, so that every process packs alike."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows by best-fit decreasing, within 11/9 of the least number of rows.

    Arguments:
        lengths: tokens of each document, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows as lists of document numbers. The longest document goes first, each into the row with the least room left.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        tightest = bisect_left(room, (length, -1))
        if tightest < len(room):
            free, row = room.pop(tightest)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(room, (free - length, row))
    return rows
