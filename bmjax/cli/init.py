"""`bmjax init`: asks a command's few questions at a terminal, and writes its first config."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.parser import Outcome
from bmjax.errors import UserError

if TYPE_CHECKING:
    from bmjax.starter import Question


def write_config(options: Namespace, settings_of: Mapping[str, Callable[[], Any]]) -> Outcome:
    """Write the file that `options` of `bmjax init` ask for, or return its schema.

    settings_of: gives the class of a command's settings, by the command's name.
    """
    from bmjax.config import nearest, with_overrides
    from bmjax.io.atomic import write_atomic
    from bmjax.starter import MERGE, STARTERS, commented, schema, with_answers

    name = options.command
    if name not in STARTERS and name != "merge":
        raise UserError(f"bmjax init: '{name}' takes no config{nearest(name, [*STARTERS, 'merge'])}")
    starter = MERGE if name == "merge" else STARTERS[name]
    if options.schema:
        return Outcome([_recipe_schema() if name == "merge" else schema(settings_of[name](), name)])
    file = Path(options.output or ("recipe.yaml" if name == "merge" else f"{name}.yaml"))
    if name == "merge":
        text = _recipe(options.overrides, file)
    else:
        settings = settings_of[name]()
        answers = _answers(starter.questions, options.overrides, file)
        values = with_overrides(settings, with_answers(starter, answers), options.overrides)
        settings.read(values)  # a wrong key or value is told now
        head = f"# bmjax {name} {file}\n# Keys behind a `#` have the value shown; take the `# ` away to change one."
        text = "\n".join([head, *commented(settings, values), ""])
    _check_new(file)
    write_atomic(file, text)
    return Outcome([f"{file}: written. Look it through, then: {starter.next.replace('FILE', str(file))}"])


def _answers(questions: "Sequence[Question]", overrides: Sequence[str], file: Path) -> dict[str, str]:
    """Return what is answered at a terminal to the questions that no override answers, by their keys."""
    overridden = _overridden(overrides)
    asked = [question for question in questions if question.key not in overridden] if sys.stdin.isatty() else []
    if asked:
        _check_new(file)  # before anybody answers
    return {question.key: _ask(f"{question.text} [{question.default}]: ") for question in asked}


def _overridden(overrides: Sequence[str]) -> set[str]:
    """Return the keys that `key=value` gives."""
    return {override.partition("=")[0].strip() for override in overrides}


def _recipe(overrides: Sequence[str], file: Path) -> str:
    """Return the text of a first recipe, by the answers and `key=value`; UserError for one that is no recipe."""
    import yaml

    from bmjax.config import with_overrides
    from bmjax.merge.methods import METHODS
    from bmjax.merge.recipe.calibration import CALIBRATED
    from bmjax.merge.recipe.recipe import read_recipe
    from bmjax.merge.recipe.yaml_blocks import StepBlock
    from bmjax.starter import MERGE, recipe, with_answers

    *questions, base = MERGE.questions
    answers = _answers(questions, overrides, file)
    values = with_overrides(StepBlock, with_answers(MERGE, answers), overrides)
    name = str(values["merge_method"])
    method = METHODS.get(name)
    if method is None or method.base != "unused":
        answers |= _answers([base], overrides, file)
        values = with_overrides(StepBlock, with_answers(MERGE, answers), overrides)
    elif base.key not in _overridden(overrides):
        del values["base_model"]
    if isinstance(values["models"], str):
        values["models"] = [name.strip() for name in values["models"].split(",")]
    if not isinstance(values["models"], list) or not values["models"]:
        raise UserError(f"models: expected names with commas between them, found {values['models']!r}")
    has_weights = method is not None and "weight" in method.parameters
    text = recipe(values, has_weights, name in CALIBRATED)
    read_recipe(yaml.safe_load(text))  # a wrong key or value is told now
    return text


def _recipe_schema() -> str:
    from bmjax.merge.recipe.yaml_blocks import recipe_schema

    return json.dumps(recipe_schema(), indent=1)


def _check_new(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file}: exists; give another file by --output")


def _ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None
