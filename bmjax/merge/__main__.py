"""`python -m bmjax.merge` is `bmjax merge`."""

from bmjax.cli.main import run
from bmjax.cli.merge import main

if __name__ == "__main__":
    run(main)
