"""The chat template of a merge's result, and the tokens at which it stops.

A chat model stops where its template ends a turn. A base's end tokens under a branch's template would let it write on
for ever, so end tokens follow the template, and where they cannot a note says so.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError, first_line
from bmjax.merge.plan.heads import config_blocks
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.tokenizer_text import EOS, end_text, further_templates, ids_in, token_ids
from bmjax.merge.plan.vocabulary import Vocabulary
from bmjax.merge.recipe.tokenizer import write_chat_template
from bmjax.weights.tokenizer import read_json, stored_template

AUTO = "auto"


@dataclass(frozen=True)
class Chat:
    """What a merge changes in its result's chat template and end tokens."""

    template: str | None = None  # Jinja; None: the files keep theirs
    end: str | None = None  # the token that becomes the tokenizer's end token
    end_id: int | None = None
    notes: tuple[str, ...] = ()

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the end tokens of a config with the template's first, where it lacks that one."""
        ids = list(ids_in(config))
        if self.end_id is None or self.end_id in ids:
            return {}
        return {EOS: [self.end_id, *ids] if ids else self.end_id}

    def write(self, folder: Path) -> None:
        """Change the files of the tokenizer and of the generation in a result's directory."""
        if self.template is not None:
            write_chat_template(folder, self.template)
        if self.end is None:
            return
        path = folder / "generation_config.json"
        if changes := self.config_changes(read_json(path)) if path.is_file() else {}:
            _update(path, changes)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file() and end_text_of(read_json(folder / name)) != self.end:
                _update(folder / name, {"eos_token": self.end})


def end_text_of(content: Mapping[str, Any]) -> Any:
    """Return the end token of a tokenizer's file, which is text or an object with that text."""
    token = content.get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _update(path: Path, changes: Mapping[str, Any]) -> None:
    text = json.dumps({**read_json(path), **changes}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def chat_of(layout: Layout, config: Mapping[str, Any], tokens: Vocabulary | None) -> Chat:
    """Return the chat template and end tokens of a recipe's result.

    Arguments:
        layout: of the recipe and its models.
        config: the config.json that the result gets, before this; its end tokens count.
        tokens: the result's tokenizer; None: the donor's.
    """
    recipe, models = layout.recipe, layout.models
    source = models[recipe.donor].directory if tokens is None else tokens.source
    stored, notes = stored_template(source), list[str]()
    # Which template: the recipe's, the one that most models have, or the tokenizer's own.
    template = recipe.chat_template
    templates = {name: text for name in models if (text := stored_template(models[name].directory)) is not None}
    if template == AUTO:
        template, names = _most_common(templates, stored)
        if template is not None:
            shown = ", ".join(f"'{name}'" for name in names)
            notes.append(f"chat_template: that of {shown}, {len(names)} of the {len(templates)} models with one")
            if template != stored and (further := further_templates(models[names[0]].directory)):
                notes.append(f"chat_template: not taken of '{names[0]}', the default alone is: {', '.join(further)}")
        else:
            notes.append("chat_template: auto: no model has one, so the result has none")
        template = None if template == stored else template
    elif template is None and stored is not None:
        if others := [f"'{name}'" for name, text in templates.items() if text.strip() != stored.strip()]:
            notes.append(
                f"the result's chat template, its tokenizer's own, is not that of {', '.join(others)}; write "
                "chat_template: auto for the one that most models have, or name one"
            )
    elif template is None and templates:
        notes.append(
            f"the result has no chat template, as '{recipe.donor}', but '{next(iter(templates))}' has one; "
            "write chat_template: auto for the one that most models have"
        )
    if template is not None and (further := further_templates(source)):
        notes.append(
            f"chat_template: the tokenizer's other templates ({', '.join(further)}) are left out: they belong to "
            "the one that is replaced"
        )
    # Where it ends turns.
    end, end_id = None, None
    if template is not None:
        known = token_ids(source) if tokens is None else tokens.tokens
        try:
            end = _end_of_turn(source, template)
            if end is None:
                notes.append("chat_template: it writes no mark after an answer, so the end tokens stay as they are")
            elif known is None or (end_id := known.get(end)) is None:
                notes.append(
                    f"chat_template: it ends turns with '{end}', which is no token of the result's tokenizer, so "
                    "nothing stops there; name the token under `tokenizer:` `tokens:`, or choose another template"
                )
                end = None
        except UserError as error:
            notes.append(f"chat_template: the end tokens stay as they are: {error}")
    chat = Chat(template, end, end_id)
    # What the models stop at and the result does not.
    result = _Ends(
        source,
        {**config, **chat.config_changes(config)},
        None if tokens is None else tokens.tokens,
        None if tokens is None else tokens.generation,
    )
    extra = {end} if end is not None else set()
    for name, model in layout.models.items():
        ends = _Ends(model.directory, layout.configs[name] or {})
        if model.directory != source and (lacking := ends.lacking_in(result, extra)):
            notes.append(
                f"model '{name}' ends an answer at {', '.join(lacking)}, the result at {result}: it may not stop; "
                "choose a chat_template that ends turns so, or write the token into its eos_token_id"
            )
    return Chat(template, end, end_id, tuple(notes))


class _Ends:
    """The tokens at which a model stops: those of its two configs by id, that of its tokenizer by text."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        tokens: Mapping[str, int] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.tokens = directory, tokens
        stored = read_json(directory / "generation_config.json") if generation is None else generation
        blocks = [*config_blocks(dict(config)), stored]
        self.ids = list(dict.fromkeys(i for block in blocks for i in ids_in(block)))
        self.text = end_text(directory)

    @functools.cached_property
    def spelt(self) -> list[str]:
        """Each token's text, or its id where the text is not known."""
        known = token_ids(self.directory) if self.tokens is None else self.tokens
        texts = {i: text for text, i in (known or {}).items()}
        return list(dict.fromkeys([*(texts.get(i, str(i)) for i in self.ids), *([self.text] if self.text else [])]))

    def lacking_in(self, result: "_Ends", extra: set[str]) -> list[str]:
        """Return what another model does not stop at. extra: where it stops beside that."""
        # Tokenizers are read only where the ids do not settle it.
        if set(self.ids) <= set(result.ids) and self.text in (None, result.text) and result.tokens is None:
            return []
        return [text for text in self.spelt if text not in {*result.spelt, *extra}]

    def __str__(self) -> str:
        return ", ".join(self.spelt) or "no token"


def _most_common(templates: Mapping[str, str], stored: str | None) -> tuple[str | None, list[str]]:
    """Return the template that most models have, and their names; of equally many the tokenizer's own or the first."""
    by_text: dict[str, list[str]] = {}
    for name, text in templates.items():
        by_text.setdefault(text.strip(), []).append(name)
    if not by_text:
        return None, []
    most = max(map(len, by_text.values()))
    leaders = [text for text, names in by_text.items() if len(names) == most]
    chosen = stored.strip() if stored is not None and stored.strip() in leaders else leaders[0]
    names = by_text[chosen]
    return (stored if stored is not None and stored.strip() == chosen else templates[names[0]]), names


def _end_of_turn(source: Path, template: str) -> str | None:
    """Return the mark that a template writes after an answer. UserError where the tokenizer cannot be loaded."""
    from bmjax.chat.marks import marks_of
    from bmjax.weights.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(f"{source}: has no tokenizer")
    try:
        return marks_of(tokenizer, template).end
    except Exception as error:  # a template is a program; whatever it raises is its author's mistake
        raise UserError(f"the template cannot be rendered: {first_line(error)}") from None
