"""`bmjax init`: asks a command's few questions at a terminal, and writes its first config."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bmjax.cli.parser import Outcome
from bmjax.errors import UserError


def write_config(options: Namespace, settings_of: Mapping[str, Callable[[], Any]]) -> Outcome:
    """Write the file that `options` of `bmjax init` ask for, or return its schema.

    settings_of: gives the class of a command's settings, by the command's name.
    """
    from bmjax.config import nearest, with_overrides
    from bmjax.io.atomic import write_atomic
    from bmjax.starter import RECIPE, STARTERS, commented, schema, with_answers

    name = options.command
    file = Path(options.output or ("recipe.yaml" if name == "merge" else f"{name}.yaml"))
    if name not in STARTERS and name != "merge":
        raise UserError(f"bmjax init: '{name}' takes no config{nearest(name, [*STARTERS, 'merge'])}")
    if name == "merge":
        if options.overrides or options.schema:
            raise UserError("bmjax init merge: takes no keys and has no schema; edit the file that it writes")
        text, then = RECIPE, "bmjax merge FILE OUT --check"
    else:
        settings, starter = settings_of[name](), STARTERS[name]
        if options.schema:
            return Outcome([schema(settings, name)])
        given = {override.partition("=")[0] for override in options.overrides}
        open_questions = [q for q in starter.questions if q.key not in given] if sys.stdin.isatty() else []
        if open_questions:
            _check_new(file)  # before anybody answers
        answers = {q.key: _ask(f"{q.text} [{q.default}]: ") for q in open_questions}
        values = with_overrides(settings, with_answers(starter, answers), options.overrides)
        settings.read(values)  # a wrong key or value is told now
        then = starter.next
        head = f"# bmjax {name} {file}\n# Keys behind a `#` have the value shown; take the `# ` away to change one."
        text = "\n".join([head, *commented(settings, values), ""])
    _check_new(file)
    write_atomic(file, text)
    return Outcome([f"{file}: written. Look it through, then: {then.replace('FILE', str(file))}"])


def _check_new(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file}: exists; give another file by --output")


def _ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None
