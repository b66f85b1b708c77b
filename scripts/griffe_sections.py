"""Let mkdocstrings read the sections of our docstrings that stand on one line: `Returns: ...`, `Raises: ...`."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Returns|Raises): (.+(?:\n(?!Returns:|Raises:).+)*)", re.MULTILINE)


class Sections(griffe.Extension):
    """Writes such a section as Google's style has it: its content indented, an error's name before a colon."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(_as_block, obj.docstring.value)


def _as_block(match: re.Match[str]) -> str:
    kind, text = match[1], " ".join(match[2].split())
    if kind == "Raises":
        text = re.sub(r"^(\w+(?:Error|Interrupt)),? ", r"\1: ", text)
    return f"\n{kind}:\n    {text}\n"
