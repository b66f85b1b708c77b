"""Overrides of a recipe, `key.sub=value`: which step they belong to, and which entry of `models:` they mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from bmjax.config import Settings, UserError, nearest, with_overrides
from bmjax.merge.recipe.model_names import plain_entry

_MODELS = "models."


def with_changes(kind: type[Settings], block: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    """Return a step's block after its overrides in order.

    An entry of `models:` is named by its number or by its model: `models.0.parameters.weight=2`, `models.math.data=x`.

    kind: of the block. Raises UserError for a name and a number that no entry has.
    """
    for override in overrides:
        key, sign, value = override.partition("=")
        rest, models = key.removeprefix(_MODELS), block.get("models")
        if sign and rest != key and isinstance(models, list):
            # A name may hold points, so the longest that fits is meant.
            numbers = {name: i for i, name in enumerate(map(_name, models)) if name}
            names = [name for name in numbers if rest == name or rest.startswith(f"{name}.")]
            if names:
                name = max(names, key=len)
                rest = f"{numbers[name]}{rest[len(name) :]}"
            number = rest.partition(".")[0]
            if number not in map(str, range(len(models))):
                shown = ", ".join(f"{i} ({name})" for name, i in numbers.items())
                raise UserError(
                    f"override '{override[:200]}': no entry of 'models' is called '{number}'; name it by its model or "
                    f"its number: {shown}"
                )
            # An entry that is its name alone may get keys.
            entries = [{"model": entry} if isinstance(entry, str) else entry for entry in models]
            block, override = {**block, "models": entries}, f"{_MODELS}{rest}={value}"
        block = with_overrides(kind, block, [override])
    return block


def _name(entry: Any) -> str | None:
    """Return the model of an entry as it is written; None where that is no text."""
    try:
        entry = plain_entry(entry)
    except ValueError:  # which the entry's own reader words
        return None
    name = entry.get("model") if isinstance(entry, Mapping) else entry
    return name if isinstance(name, str) else None


def root(override: str) -> str:
    """Return the key at the top that an override changes."""
    return override.split("=")[0].split(".")[0].strip()


def assign(
    overrides: Sequence[str], names: Sequence[str], top_keys: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the overrides of the whole recipe, and those of every step without their `steps.NAME.`.

    names: of the steps. top_keys: of the whole recipe.
    """
    of_top: list[str] = []
    of_steps: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        _, _, rest = override.partition(".")
        if override.startswith("steps.") and "=" in rest:
            name, _, key = rest.partition(".")
            if name not in of_steps or not key:
                target = name.split("=")[0]
                raise UserError(f"override '{override}': no step is named '{target}'{nearest(target, names)}")
            of_steps[name].append(key)
        elif root(override) in ("dtype", "out_dtype"):
            of_steps[names[-1]].append(override)
        elif "=" in override and root(override) not in top_keys:
            hint = nearest(root(override), ["steps", *top_keys])
            raise UserError(f"override '{override}': unknown key{hint} (a step's key: steps.{names[-1]}.KEY=VALUE)")
        else:
            of_top.append(override)
    return of_top, [of_steps[name] for name in names]
