"""The entry point of all commands: parse, call, and turn what a user can mend into one line and exit code 2."""

import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import NoReturn

from bmjax.cli.commands import COMMANDS
from bmjax.cli.parser import Outcome, make_parser, parse
from bmjax.errors import DISK_ERRORS, UserError, disk_problem, missing_package
from bmjax.log import quieted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the words after `bmjax` (None: those of this process) and return the exit code.

    0: success, 2: a mistake its user can mend, 130: an interrupt. What is wrong is one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(make_parser(COMMANDS).format_help(), end="")
        return 2
    stopped, extra = "stopped", None
    try:
        command, options = parse(COMMANDS, [*words[1:], "--help"] if words[0] == "help" else words)
        stopped, extra = command.stopped, command.extra
        if command.settings is not None and "config" in options:
            options.settings = command.settings_class().read(options.config, options.overrides)
        as_json = command.json and options.json
        with quieted() if options.quiet else nullcontext():
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                if command.check is not None and options.check:
                    lines = [*command.check(options)]
                    outcome: Outcome | None = Outcome(lines, {"check": lines})
                else:
                    outcome = command.call(options)
            if outcome is not None:
                outcome.tell(as_json, options.quiet)
    except SystemExit as end:  # argparse has printed a help or the version
        return int(end.code or 0)
    except UserError as error:
        print(f"bmjax: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = missing_package(error, extra)
        if missing is None:
            raise
        print(f"bmjax: error: {missing}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        line = UserError(f"{error.filename or 'writing'}: {disk_problem(error)}")
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
