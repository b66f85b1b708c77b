"""The entry point `bmjax-lm-eval`: lm-eval with its own arguments, and `--model bmjax` among its models."""

import sys
from typing import NoReturn

from bmjax.errors import UserError, install


def run() -> NoReturn:
    """Run lm-eval with the arguments of this process; a mistake that its user can mend is one line and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from bmjax.evaluate import lm_eval_model  # noqa: F401 - registers the class
    except ModuleNotFoundError as error:
        line = f"bmjax-lm-eval needs the package {error.name}; {install('lm-eval')}"
        print(f"bmjax: error: {line}", file=sys.stderr)
        sys.exit(2)
    try:
        cli_evaluate()
    except UserError as error:
        print(f"bmjax: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
