"""Templates that make rows of other columns a prompt and its response: the keys that every command shares.

`bmjax train` has them at the top of its config, a recipe beside each model's `data`. io/rows.py fills them in.
"""

from typing import Any

COLUMNS = ("tools", "system", "prompt", "reasoning", "response")


def columns_of(settings: Any) -> dict[str, str]:
    """Return the templates among a config's keys; empty: rows are as they are."""
    return {key: value for key in COLUMNS if (value := getattr(settings, key)) is not None}


def check_columns(settings: Any) -> None:
    """Raise ValueError for templates that are not a prompt with its response."""
    if (settings.prompt is None) != (settings.response is None):
        raise ValueError("'prompt' and 'response' map columns together: give both, or neither")
    if settings.prompt is None and (given := columns_of(settings)):
        raise ValueError(f"{', '.join(map(repr, given))}: go with 'prompt' and 'response', which are missing")
