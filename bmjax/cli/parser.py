"""The command line of bmjax as argparse sees it: one parser, a subcommand for every row of the table of commands.

`bmjax COMMAND WORDS [key=value ...] [options]`, in any order. Parsing imports nothing of the phases; settings and help
texts are loaded for the one command that needs them.
"""

import argparse
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bmjax.errors import UserError, nearest
from bmjax.version import __version__

HELP = Path(__file__).parent / "help"


class Option:
    """One option: its spellings, and the keywords of argparse's `add_argument`."""

    def __init__(self, *flags: str, **keywords: Any) -> None:
        self.flags, self.keywords = flags, keywords

    @property
    def usage(self) -> str:
        """Return the option as a usage line shows it."""
        text = " ".join([self.flags[0], *filter(None, [self.keywords.get("metavar")])])
        return text if self.keywords.get("required") else f"[{text}]"


@dataclass(frozen=True)
class Command:
    """One command: a row of the table in commands.py.

    Its help is help/NAME.txt, the options, and then the keys of its settings or what `details` returns. `call` does the
    work. It gets the words by their names in lower case, the options, `overrides` (list of key=value) and, where the
    command has `settings`, those, read from CONFIG and the overrides.
    """

    name: str
    summary: str  # its line in the overview
    call: Callable[[argparse.Namespace], None]
    words: tuple[str, ...] = ("CONFIG",)  # those that must be given, in order
    options: tuple[Option, ...] = ()  # beside --help
    settings: str | None = None  # "module:class" of the settings in CONFIG; None: `call` reads the words itself
    overrides: bool = True  # whether key=value may follow
    details: Callable[[], str] | None = None
    stopped: str = "stopped; the same command continues where it was"  # said after an interrupt

    @property
    def usage(self) -> str:
        """Return the command with its words and options, as its usage line shows it."""
        ending = ["[key=value ...]"] if self.overrides else []
        return " ".join(["bmjax", self.name, *self.words, *(option.usage for option in self.options), *ending])

    def settings_class(self) -> Any:
        """Import and return the class of the command's settings."""
        module, _, name = (self.settings or "").partition(":")
        return getattr(importlib.import_module(module), name)

    def help_texts(self) -> tuple[str, str]:
        """Return the help before the options and after them."""
        before = (HELP / f"{self.name}.txt").read_text(encoding="utf-8").rstrip()
        if self.settings is None:
            return before, self.details() if self.details else ""
        from bmjax.config import describe

        keys = "\n".join(describe(self.settings_class()))
        return before, f"keys of CONFIG (YAML), with defaults; nested keys are overridden as a.b=value:\n{keys}"


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that makes its help when it is asked for it, and reports errors as UserError."""

    def __init__(self, prog: str, usage: str, texts: Callable[[], tuple[str, str]]) -> None:
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120)
        super().__init__(prog, usage, formatter_class=formatter, allow_abbrev=False)
        self.texts = texts

    def format_help(self) -> str:
        self.description, self.epilog = self.texts()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        if problem == "expected one argument":
            raise UserError(f"{argument}: a value must follow")
        if argument == "the following arguments are required":
            raise UserError(f"{self.prog}: {problem} is missing; see {self.prog} --help")
        problem = problem.replace("ignored explicit argument", "takes no value, found")
        if match := re.fullmatch(r"invalid choice: (.+) \(choose from (.+)\)", problem):
            choices = " or ".join(re.findall(r"[^\s,']+", match[2]))
            problem = f"expected {choices}, found {match[1]}"
        raise UserError(f"{argument}: {problem}")


def overview(commands: Mapping[str, Command]) -> str:
    """Return the text that `bmjax --help` shows: every command with its words, required options and summary."""
    lines = []
    for command in commands.values():
        required = [option.usage for option in command.options if option.keywords.get("required")]
        lines.append(f"  {' '.join([command.name, *command.words, *required]):<34} {command.summary}")
    return (HELP / "overview.txt").read_text(encoding="utf-8").format(version=__version__, commands="\n".join(lines))


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser("bmjax", "bmjax COMMAND CONFIG [key=value ...]", lambda: (overview(commands), ""))
    parser.add_argument("-V", "--version", action="version", version=f"bmjax {__version__}", help="print the version")
    subparsers = parser.add_subparsers(dest="command", help=argparse.SUPPRESS)
    for command in commands.values():
        program = f"bmjax {command.name}"
        subparser = subparsers.add_parser(command.name, prog=program, usage=command.usage, texts=command.help_texts)
        for row in command.options:
            subparser.add_argument(*row.flags, **row.keywords)
    return parser


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, words and overrides of a command line; `command` is the name, None where there is none.

    Raises UserError, one line, for an unknown command or option and for missing words; SystemExit(0) after --help and
    --version.
    """
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in commands:
        raise UserError(f"unknown command '{name}'{nearest(name, list(commands))}")
    options, rest = make_parser(commands).parse_known_args(arguments)
    program = f"bmjax {name}" if name else "bmjax"
    command = commands.get(name or "")
    # Everything that is no known option of the command is in `rest`, in order.
    for word in rest:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            hint = nearest(flag, [spelling for row in (command.options if command else ()) for spelling in row.flags])
            hint = hint if "did you mean" in hint else ""
            settings = "settings are given as key=value, " if command and command.overrides else ""
            raise UserError(f"unknown option '{flag}'; {settings}see {program} --help{hint}")
    if command is None:
        return options
    overrides = []
    missing = list(command.words)
    for word in rest:
        if missing and not (command.overrides and re.match(r"[^/=]*=", word)):
            setattr(options, missing.pop(0).lower(), word)
        elif command.overrides:
            overrides.append(word)
        else:
            raise UserError(f"'{word}': a word too many; see {program} --help")
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{program}: {' and '.join(missing)} {verb} missing; see {program} --help")
    options.overrides = overrides
    return options
