"""What is said of a recipe that can be carried out, but may mean something else than its author thinks.

The builder of steps asks for these lines. Nothing here changes what is merged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bmjax.merge.recipe.values import Rule


def depth_remark(name: str, value: Any) -> str | None:
    """Return a line where a list, which may have been meant for the models, goes along the depth."""
    if not isinstance(value, list) or len(value) < 2 or any(isinstance(entry, Mapping) for entry in value):
        return None
    return (
        f"{name}: {value} goes along the depth, from the first layer to the last, for every model alike; for one value "
        f"a model write {{model: NAME, parameters: {{{name}: VALUE}}}}"
    )


def remainder_remarks(parameter: str, rules: Sequence[Rule], default: Any) -> Iterator[str]:
    """Yield a line where filters leave tensors to the default, which their author may not have meant.

    parameter: its name, and whose it is. rules: all that are tried before the default.
    """
    if rules and not any(rule.fits("") for rule in rules):  # which only those for any name do
        yield (
            f"{parameter}: tensors that no filter fits get the default, {default}; add a last entry `- value: V` to "
            "set theirs"
        )


def shadow_remarks(parameter: str, rules: Sequence[Rule]) -> Iterator[str]:
    """Yield a line where an entry for every tensor stands before others of its list, which then decide for none.

    parameter: its name, and whose it is. rules: of one list.
    """
    first = next((i for i, rule in enumerate(rules) if rule.text is None), len(rules))
    if behind := rules[first + 1 :]:
        shown = ", ".join("`value` alone" if rule.text is None else f"filter '{rule.text}'" for rule in behind[:3])
        more = ", ..." if behind[3:] else ""
        yield (
            f"{parameter}: the entry that fits every tensor stands before {shown}{more}, which decides for none: the "
            "first that fits is taken; put it last"
        )


def unlisted_base_remark(method: str, base: str, is_added: bool) -> str:
    """Return a line on a base_model that is not among the models of a method without a base.

    is_added: whether mergekit, which refuses it without a common weight, would merge it with them.
    """
    mergekit = ", or write `compat: mergekit`, which adds it as mergekit does" if is_added else ""
    return (
        f"base_model '{base}' is not among the models, so {method} does not merge it: it gives the config and the "
        f"tokenizer alone; list it under 'models' to merge it, too{mergekit}"
    )


def lone_model_remark(model: str, base: str) -> str:
    """Return a line on a slice that lists one model, and not the base."""
    return f"a slice lists '{model}' alone, so its layers are copied; to merge them list '{base}' there, too"
