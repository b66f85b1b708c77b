"""The entry point of all commands: parse, call, and turn what a user can mend into one line and exit code 2."""

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

from bmjax.cli.commands import COMMANDS
from bmjax.cli.parser import make_parser, parse
from bmjax.errors import DISK_ERRORS, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the words after `bmjax` (None: those of this process) and return the exit code.

    0: success, 2: a mistake its user can mend, 130: an interrupt. What is wrong is one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(make_parser(COMMANDS).format_help(), end="")
        return 2
    stopped = "stopped"
    try:
        command, options = parse(COMMANDS, [*words[1:], "--help"] if words[0] == "help" else words)
        stopped = command.stopped
        if command.settings is not None:
            options.settings = command.settings_class().read(options.config, options.overrides)
        command.call(options)
    except SystemExit as end:  # argparse has printed a help or the version
        return int(end.code or 0)
    except UserError as error:
        print(f"bmjax: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        line = UserError(f"{error.filename or 'writing'}: {error.strerror}")
        print(f"bmjax: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bmjax: {stopped}", file=sys.stderr)
        return 130
    return 0


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command as this process: exit with its code."""
    code = main(arguments)
    # All is written: what the interpreter would take apart piece by piece, for half a second, goes with the process.
    gc.freeze()
    sys.exit(code)
