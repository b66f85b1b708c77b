"""The command line of bmjax: a parser for every row of the table of commands.

`bmjax COMMAND WORDS [key=value ...] [options]`, in any order. Parsing imports nothing of the phases; settings and help
texts are loaded for the one command that needs them.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bmjax.cli.foreign_options import in_place_of
from bmjax.errors import UserError, nearest
from bmjax.version import __version__

HELP = Path(__file__).parent / "help"


class Option:
    """One option: its spellings, and the keywords of argparse's `add_argument`."""

    def __init__(self, *flags: str, **keywords: Any) -> None:
        self.flags, self.keywords = flags, keywords

    @property
    def usage(self) -> str:
        metavar = self.keywords.get("metavar") or ()
        text = " ".join([self.flags[0], *([metavar] if isinstance(metavar, str) else metavar)])
        return text if self.keywords.get("required") else f"[{text}]"


CHECK = Option("--check", action="store_true", help="only say what would be done, and what it takes; write nothing")
QUIET = Option("--quiet", "-q", action="store_true", help="print nothing but errors")
JSON = Option("--json", action="store_true", help="print one JSON object; all else goes to standard error")


@dataclass(frozen=True)
class Outcome:
    """What a command has to tell when it is done: lines for a person, or the same as one JSON object for a script."""

    lines: Sequence[str] = ()
    value: Mapping[str, Any] | None = None
    problem: str | None = None  # what its user has to mend all the same

    def tell(self, as_json: bool, quiet: bool) -> None:
        """Print it on standard output. Raises UserError for the problem, after that."""
        lines = [json.dumps(self.value, default=str)] if as_json else () if quiet else self.lines
        try:
            for line in lines:
                print(line, flush=True)
        except BrokenPipeError:  # who read them has enough, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.problem is not None:
            raise UserError(self.problem)


@dataclass(frozen=True)
class Command:
    """One command: a row of the table in commands.py.

    Its help is help/NAME.txt, the options, and then the keys of its settings or what `details` returns. `call` does the
    work. It gets the words by their names in lower case, the options, `overrides` (list of key=value) and, where the
    command has `settings`, those, read from CONFIG and the overrides.
    """

    name: str
    summary: str  # its line in the overview
    call: Callable[[argparse.Namespace], Outcome | None]
    words: tuple[str, ...] = ("CONFIG",)  # those that must be given, in order
    options: tuple[Option, ...] = ()  # beside --help, --quiet and --json
    json: bool = False  # whether scripts may want its outcome
    settings: str | None = None  # "module:class" of the settings in CONFIG; None: `call` reads the words itself
    overrides: bool = True  # whether key=value may follow
    details: Callable[[], str] | None = None
    check: Callable[[argparse.Namespace], Iterable[str]] | None = None  # the lines of --check, where it is an option
    alone: str | None = None  # the option that stands in place of the words, as --compare does
    extra: str | None = None  # the extra that brings what it needs, where the core is not enough
    foreign: Mapping[str, str] = field(default_factory=dict)  # options of other tools, and what to do in their place
    stopped: str = "stopped; the same command continues from there"  # said after an interrupt

    @property
    def all_options(self) -> tuple[Option, ...]:
        """The options, --check before the others where there is one, those of all commands behind them."""
        check = () if self.check is None else (CHECK,)
        return (*check, *self.options, *((JSON,) if self.json else ()), QUIET)

    @property
    def usage(self) -> str:
        ending = ["[key=value ...]"] if self.overrides else []
        return " ".join(["bmjax", self.name, *self.words, *(option.usage for option in self.all_options), *ending])

    def settings_class(self) -> Any:
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
        if match := re.fullmatch(r"expected (\d+) arguments", problem):
            raise UserError(f"{argument}: {match[1]} values must follow")
        if argument == "the following arguments are required":
            raise UserError(f"{self.prog}: {problem} is missing; see {self.prog} --help")
        problem = problem.replace("ignored explicit argument", "takes no value, found")
        if match := re.fullmatch(r"invalid choice: (.+) \(choose from (.+)\)", problem):
            choices = " or ".join(re.findall(r"[^\s,']+", match[2]))
            problem = f"expected {choices}, found {match[1]}"
        raise UserError(f"{argument}: {problem}")


def make_parser(commands: Mapping[str, Command], name: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command's options; without a name that of `bmjax` alone, whose help lists the commands."""
    if name is not None:
        command = commands[name]
        parser = _Parser(f"bmjax {name}", command.usage, command.help_texts)
        for row in command.all_options:
            parser.add_argument(*row.flags, **row.keywords)
        return parser

    def overview() -> tuple[str, str]:
        lines = []
        for command in commands.values():
            required = [option.usage for option in command.options if option.keywords.get("required")]
            lines.append(f"  {' '.join([command.name, *command.words, *required]):<34} {command.summary}")
        text = (HELP / "overview.txt").read_text(encoding="utf-8")
        return text.format(version=__version__, commands="\n".join(lines)), ""

    parser = _Parser("bmjax", "bmjax COMMAND CONFIG [key=value ...]", overview)
    parser.add_argument("-V", "--version", action="version", version=f"bmjax {__version__}", help="print the version")
    return parser


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command of a command line, and its options, words and overrides.

    Raises UserError, one line, for an unknown command or option and for missing words; SystemExit(0) after --help and
    --version.
    """
    if arguments[0].startswith("-"):
        make_parser(commands).parse_known_args(arguments)  # prints the help or the version
        raise UserError(f"unknown option '{arguments[0].partition('=')[0]}'; see bmjax --help")
    name, *words = arguments
    if name not in commands:
        raise UserError(f"unknown command '{name}'{nearest(name, list(commands))}")
    command = commands[name]
    options, rest = make_parser(commands, name).parse_known_args(words)
    # Everything that is no known option of the command is in `rest`, in order.
    flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
    if advice := in_place_of(flags, command.foreign):
        raise UserError(f"bmjax {name} has no such option: {advice}")
    for flag in flags:
        hint = nearest(flag, [spelling for row in command.all_options for spelling in row.flags])
        hint = hint if "did you mean" in hint else ""
        settings = "settings are given as key=value, " if command.overrides else ""
        raise UserError(f"unknown option '{flag}'; {settings}see bmjax {name} --help{hint}")
    overrides = []
    is_alone = command.alone is not None and getattr(options, command.alone) is not None
    missing = [] if is_alone else list(command.words)
    if is_alone and getattr(options, "check", False):
        raise UserError(f"--check: --{command.alone} writes nothing; leave out one of them")
    if is_alone and rest:
        raise UserError(f"'{rest[0]}': --{command.alone} takes no other words; see bmjax {name} --help")
    for word in rest:
        if missing and not (command.overrides and re.match(r"[^/=]*=", word)):
            setattr(options, missing.pop(0).lower(), word)
        elif command.overrides:
            overrides.append(word)
        else:
            raise UserError(f"'{word}': a word too many; see bmjax {name} --help")
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"bmjax {name}: {' and '.join(missing)} {verb} missing; see bmjax {name} --help")
    options.overrides = overrides
    return command, options
