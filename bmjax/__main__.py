"""`python -m bmjax` is `bmjax`."""

import gc
import sys
from collections.abc import Callable
from typing import NoReturn

from bmjax.cli import main


def run(command: Callable[[], int] = main) -> NoReturn:
    """The process of a command: exits with its code."""
    code = command()
    # All is written: what the interpreter would take apart piece by piece, for half a second, goes with the process.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    run()
