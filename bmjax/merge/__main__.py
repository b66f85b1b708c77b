"""`python -m bmjax.merge RECIPE OUT` is `bmjax merge RECIPE OUT`."""

import sys
from collections.abc import Sequence

from bmjax.cli import main as cli


def main(arguments: Sequence[str]) -> int:
    """Run `bmjax merge` with `arguments`; return its exit code."""
    return cli.main(["merge", *arguments])


if __name__ == "__main__":
    cli.run(["merge", *sys.argv[1:]])
