"""Messages as the text of a chat template.

Training, evaluation, generation and merging all render through here. Nothing else knows templates; forms.py makes
messages of rows, marks.py looks at what a template writes around turns.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line, read_text

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))


def chat_template(tokenizer: Any, template: str | None) -> str:
    """Return the Jinja text of `template`: None is the tokenizer's, a name is one in TEMPLATES, else it is a file."""
    if template is None:
        text = getattr(tokenizer, "chat_template", None)
        if not text:
            raise UserError(
                "template: the student's tokenizer has no chat template; "
                f"set template: {', '.join(TEMPLATE_NAMES)} or FILE.jinja"
            )
        return text if isinstance(text, str) else text.get("default") or next(iter(text.values()))
    if template in TEMPLATE_NAMES:
        return named_template(template)
    if not template.endswith(".jinja"):
        raise UserError(f"template: {template!r} is not one of {', '.join(TEMPLATE_NAMES)}, nor a FILE.jinja")
    try:
        return read_text(template)
    except UserError as error:
        raise UserError(f"template: {error}") from None


def check_repeatable(template: str) -> None:
    """Raise UserError for a template that writes today's date: the same rows would be other tokens tomorrow."""
    if re.search(r"\bstrftime_now\s*\(", template):
        raise UserError(
            "template: it writes today's date (strftime_now), so a training that goes on tomorrow would see other "
            "tokens; write a fixed date in its place in a copy, and set template: FILE.jinja"
        )


def named_template(name: str) -> str:
    """Return the Jinja text of one of TEMPLATE_NAMES."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str,
    location: str,
    prompt: bool,
    tools: list[Any] | None = None,
) -> str:
    """Render a conversation as text.

    Arguments:
        messages: as `bmjax.chat.forms` makes them.
        location: where they come from, which begins an error.
        prompt: whether the opening of the assistant's next turn follows.
        tools: descriptions of functions, for templates that show them.
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template}
    if tools:
        options["tools"] = tools
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # a template is a program; whatever it raises is its author's mistake
        problem = first_line(error)
    if any("tool_calls" in message for message in messages):
        with contextlib.suppress(Exception):  # some templates join a call's arguments to text
            return tokenizer.apply_chat_template([_arguments_as_text(m) for m in messages], **options)
    raise UserError(f"{location}: the chat template cannot render this conversation: {problem}")


def _arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [dict(call, function=dict(call["function"])) for call in message["tool_calls"]]
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": calls}


def render_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str,
    location: str,
    tools: list[Any] | None = None,
) -> str:
    """Render the text that a model continues: all turns, then the opening of the assistant's."""
    return render(tokenizer, messages, template, location, prompt=True, tools=tools)
