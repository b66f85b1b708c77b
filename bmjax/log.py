"""What a command says while it works: one line a remark, on standard error."""

import sys
from collections.abc import Callable

Log = Callable[[str], None]


def write_line(text: str) -> None:
    """Write one line to standard error, above a progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def silent(text: str) -> None:
    """Say nothing: the log of a caller that wants none, and of all processes but the first."""
