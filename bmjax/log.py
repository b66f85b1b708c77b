"""What a command says while it works: one line a remark and progress bars, on standard error."""

import sys
from collections.abc import Callable
from typing import Any

Log = Callable[[str], None]


def write_line(text: str) -> None:
    """Write one line to standard error, above a progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def silent(text: str) -> None:
    """Say nothing: the log of a caller that wants none, and of all processes but the first."""


def progress_bar(name: str, unit: str, total: int | None = None, done: int = 0, shown: bool = True) -> Any:
    """Return tqdm's progress bar, a context manager with `update(n)`; it shows on a terminal only, and where `shown`.

    unit: what is counted; "B" is written as kB, MB, GB. total, done: the count at the end and at the start.
    """
    from tqdm import tqdm

    return tqdm(
        desc=name, unit=unit, unit_scale=unit == "B", total=total, initial=done, disable=None if shown else True,
        dynamic_ncols=True, leave=False,
    )  # fmt: skip
