"""`python -m bmjax` is `bmjax`."""

from bmjax.cli.main import run

if __name__ == "__main__":
    run()
