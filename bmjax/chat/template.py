"""A row as chat messages, and messages as the text of a chat template.

Training, evaluation, generation and merging all render through here. Nothing else knows roles, turns or templates.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.chat.reasoning import join_think
from bmjax.config import UserError, first_line, read_text

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # the keys of a turn


def messages_of(row: Mapping[str, Any], location: str) -> list[dict[str, str]]:
    """Return a row as chat messages, each with `role` and `content`.

    Known forms are `messages`, `conversations` (ShareGPT) and `prompt` with `response`. A record's `reasoning` becomes
    <think>...</think> before the response, as the teacher wrote it. UserError for a row of another form.
    """
    turns: list[tuple[Any, Any]]
    if form := next((key for key in _FORMS if key in row), None):
        role, content = _FORMS[form]
        if not isinstance(row[form], list) or not all(isinstance(turn, Mapping) for turn in row[form]):
            raise UserError(f"{location}: '{form}' must be a list of turns, each with '{role}' and '{content}'")
        turns = [(turn.get(role), turn.get(content)) for turn in row[form]]
    elif "prompt" in row and "response" in row:
        answer = join_think(row["reasoning"], row["response"]) if row.get("reasoning") else row["response"]
        turns = [("system", row["system"])] if row.get("system") else []
        turns += [("user", row["prompt"]), ("assistant", answer)]
    else:
        fields = ", ".join(sorted(row)[:8]) or "nothing"
        raise UserError(f"{location}: expected 'prompt' and 'response', 'messages' or 'conversations'; found {fields}")
    messages = []
    for role, content in turns:
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"{location}: a turn has role {role!r} and {type(content).__name__} content; "
                f"expected text by one of {', '.join(ROLES)}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def chat_template(tokenizer: Any, template: str | None) -> str:
    """Return the Jinja text of `template`: None is the tokenizer's, a name is one in TEMPLATES, else it is a file."""
    if template is None:
        text = getattr(tokenizer, "chat_template", None)
        if not text:
            raise UserError(
                "template: the student's tokenizer has no chat template; "
                "set template: chatml, deepseek-r1 or FILE.jinja"
            )
        return text if isinstance(text, str) else text.get("default") or next(iter(text.values()))
    if template in TEMPLATE_NAMES:
        return named_template(template)
    if not template.endswith(".jinja"):
        raise UserError(f"template: {template!r} is not one of {', '.join(TEMPLATE_NAMES)}, nor a FILE.jinja")
    return read_text(template)


def named_template(name: str) -> str:
    """Return the Jinja text of one of TEMPLATE_NAMES."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str, location: str, prompt: bool) -> str:
    """Render a conversation as text. prompt: whether the opening of the assistant's next turn follows."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=template
        )
    except Exception as error:  # a template is a program; whatever it raises is its author's mistake
        raise UserError(f"{location}: the chat template cannot render this conversation: {first_line(error)}") from None


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str, location: str) -> str:
    """Render the text that a model continues: all turns, then the opening of the assistant's."""
    return render(tokenizer, messages, template, location, prompt=True)


def end_of_turn(tokenizer: Any, template: str) -> int | None:
    """Return the special token that the template writes after an assistant's turn, or None. A generation ends there."""
    turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        full = render(tokenizer, turns, template, "template", prompt=False)
    except UserError:  # a template for conversations of another form
        return None
    after = tokenizer(full[full.rfind("Answer") + len("Answer") :], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((token for token in after if token in special), None)
