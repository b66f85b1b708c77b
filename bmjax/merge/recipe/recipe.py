"""Merge recipes: mergekit-style YAML, or named `steps:` of such blocks, read into checked, frozen steps.

The one reader of recipes, for methods of every kind. It opens no model and no data.
"""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmjax.config import UserError, nearest
from bmjax.io import hub
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.merge.recipe.model_names import model_key
from bmjax.merge.recipe.same_models import with_one_name
from bmjax.merge.recipe.step import Step, build_step
from bmjax.merge.recipe.tokenizer import WORDS, TokenizerSettings, chat_template
from bmjax.merge.recipe.yaml_blocks import StepBlock, TopBlock, read_blocks
from bmjax.urls import url_of


@dataclass(frozen=True)
class Recipe:
    """Merges in order; the last one's result is written. The rest is as in `yaml_blocks.TopBlock`."""

    steps: tuple[Step, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None  # what the result is rounded to; None: as the donor stores each tensor
    notes: tuple[str, ...] = ()  # what has no effect, a line each
    text: Mapping[str, Any] = field(default_factory=dict)  # the recipe as plain values, for the report
    seed: int = 0
    compat: str | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None  # Jinja, `auto`, None for the donor's
    vocabularies: tuple[str, ...] = ()  # models of which only the tokenizer and the rows of tokens are read

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the models that are read, not made, in order of first use."""
        made = {step.name for step in self.steps}
        names = [name for step in self.steps for name in step.models if name not in made]
        return tuple(dict.fromkeys([*names, *self.vocabularies]))

    @property
    def donor(self) -> str:
        """The input whose config, tokenizer and storage types the result takes."""
        return self.donor_of(self.steps[-1].name)

    def donor_of(self, name: str) -> str:
        """Return the input that a step's donor leads back to; an input is its own."""
        steps = {step.name: step for step in self.steps}
        while name in steps:
            name = steps[name].donor
        return name

    def same_input(self, name: str) -> str:
        """Return the input that is the model `name` under another name, such as its directory; else `name`."""
        if name in self.inputs:
            return name
        key = model_key(name, self.sources)
        return next((other for other in self.inputs if model_key(other, self.sources) == key), name)

    @property
    def is_calibrated(self) -> bool:
        """Whether a step looks at data; bmjax/calibrate/ then carries the recipe out."""
        return any(step.calibration is not None for step in self.steps)

    def revision(self, name: str) -> str | None:
        """Return the hub revision asked for: what follows @ in `org/name@revision`."""
        return hub.split_revision(self._parts(name)[0])[1]

    def _parts(self, name: str) -> tuple[str, str | None]:
        """Return the model and the adapter that an input is made of. In MODEL+ADAPTER both may be aliases."""
        model, adapter = hub.split_adapter(self.sources.get(name, name))
        if adapter is None:
            return model, None
        return self.sources.get(model, model), self.sources.get(adapter, adapter)

    def pinned(self, name: str) -> str:
        """Return an input as MODEL or MODEL+ADAPTER without aliases, hub models with the commit that is here."""
        return "+".join(hub.pinned(part) for part in self._parts(name) if part is not None)

    def pinned_text(self) -> dict[str, Any]:
        """Return the recipe as plain values that read the same models again: `sources` pins those of the hub."""
        named = {*self.inputs}
        if self.tokenizer is not None and self.tokenizer.source not in WORDS:
            named.add(self.tokenizer.source)
        pins = {name: pinned for name in sorted(named) if (pinned := self.pinned(name)) != name}
        pins = {name: pin for name, pin in pins.items() if name not in self.sources or "@" in pin}
        return {key: value for key, value in {**self.text, "sources": {**self.sources, **pins}}.items()
                if value not in (None, {})}  # fmt: skip

    @property
    def relative_paths(self) -> list[str]:
        """The names in it that mean files or directories below the working directory, or beside it."""
        source = [] if self.tokenizer is None or self.tokenizer.source in WORDS else [self.tokenizer.source]
        models = [part for name in (*self.inputs, *source) for part in self._parts(name) if part]
        data = [part for step in self.steps for part in step.files_of_rows]
        templates = [step.calibration.template or "" for step in self.steps if step.calibration]
        names = [name for name in (*models, *data, *templates) if not url_of(name) and not name.startswith(("/", "~"))]
        return [name for name in names if os.path.lexists(name) or glob.has_magic(name)]

    def adapter(self, name: str, *, download: bool = True) -> Path | None:
        """Return the directory of an input's adapter, of `MODEL+ADAPTER`; None where it has none."""
        adapter = self._parts(name)[1]
        if adapter is None:
            return None
        if self.is_calibrated:
            method = next(step.method.name for step in self.steps if step.calibration is not None)
            raise UserError(
                f"model '{name}': {method} runs its models: merge the adapter first, in a recipe of its own"
            )
        return hub.adapter_directory(adapter, label=f"model '{name}': ", download=download)

    def directory(self, name: str, *, download: bool = True, weights: bool = True, key: str = "") -> Path:
        """Return the directory of an input: an alias of `sources`, a directory, or a hub model.

        download False: a hub model must have been fetched before. weights False: only config and tokenizer are fetched.
        key: of the recipe that named it, for errors.
        """
        label = f"model '{name}': " if name in self.sources else f"{key}: " if key else ""
        known = [*self.sources, *(step.name for step in self.steps)] if self.sources or len(self.steps) > 1 else []
        return hub.model_directory(self._parts(name)[0], label=label, known=known, download=download, weights=weights)


def read_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    data: Mapping[str, str | list[str]] | None = None,
    held_out_data: Mapping[str, str | list[str]] | None = None,
) -> Recipe:
    """Read a recipe.

    Arguments:
        source: a YAML file or a mapping. Several YAML documents are steps, the one without a name (or the last) being
            the result.
        overrides: `key.sub=value`, applied in order; `steps.NAME.key=value` for a step.
        data: rows of models by name, for methods that look at data, when the recipe gives a model none.
        held_out_data: rows to judge such models by, which none was trained on.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key, method, parameter or model name, a missing base_model
            or data, a wrong number of models.
    """
    notes: list[str] = []
    top, blocks = read_blocks(source, overrides, notes)
    blocks = [(at, _complete(block, data or {}, held_out_data or {})) for at, block in blocks]
    names = [str(block.name) for _, block in blocks]
    blocks = [(at, with_one_name(block, top.sources, names, at)) for at, block in blocks]
    steps = tuple(build_step(block, at, notes, top.compat) for at, block in blocks)
    try:
        _check_names(steps, top)
        template = chat_template(top.chat_template)
        tokenizer = _tokenizer(top, steps)
    except UserError as error:
        raise UserError(f"{'recipe' if isinstance(source, Mapping) else source}: {error}") from None
    for name in [*top.sources, *names[:-1]]:
        if os.path.isdir(name) and top.sources.get(name) != name:
            what = "an alias of sources" if name in top.sources else "a step"
            notes.append(f"'{name}' is {what} here, not the directory of that name; write ./{name} for that")
    for (at, block), step in zip(blocks, steps, strict=True):
        if step is not steps[-1] and (block.dtype or block.out_dtype) and top.compat is None:
            notes.append(f"{at}: dtype has no effect: steps stay float32 in memory, only the last one is rounded")
        if step.calibration is not None and top.compat is not None:
            notes.append(f"{at}: compat has no effect: mergekit has no {step.method.name} to be compatible with")
    last = blocks[-1][1]
    dtype = last.out_dtype or last.dtype or top.out_dtype or top.dtype
    dtype = None if dtype == "auto" else dtype  # as the donor stores each tensor
    # The recipe as plain values, for the report.
    texts = [{k: v for k, v in block.model_dump(mode="json").items() if v not in (None, {})} for _, block in blocks]
    rest = {k: v for k, v in top.model_dump(mode="json", exclude_defaults=True).items() if "dtype" not in k}
    text = {"sources": top.sources, "steps": texts, "dtype": dtype, **rest}
    return Recipe(steps, top.sources, dtype, tuple(notes), text, top.seed, top.compat, tokenizer, template)


def _complete(
    block: StepBlock, data: Mapping[str, str | list[str]], held_out_data: Mapping[str, str | list[str]]
) -> StepBlock:
    """Return the block with a name, and with the rows of models that it gives none."""
    entries = [{"model": entry} if isinstance(entry, str) else entry for entry in block.models or ()]
    changes: dict[str, Any] = {}
    if not block.name:
        # The only step's name: one that none of its models has.
        models = [entry.get("model") for entry in entries if isinstance(entry, Mapping)]
        models += [source.model for part in block.slices or () for source in part.sources]
        taken = [block.base_model, block.parameters.get("rebase"), *models]
        changes["name"] = next(name for name in ("merged", "merge", "result", "student") if name not in taken)
    if data and block.models is not None and block.merge_method in CALIBRATED:
        # An entry with rows of its own is as it stands: the others may have other columns.
        rows = {name: {"data": of_model} for name, of_model in data.items()}
        for name, of_model in held_out_data.items():
            rows.get(name, {})["held_out_data"] = of_model
        changes["models"] = [
            entry
            if not isinstance(entry, Mapping) or "data" in entry
            else {**rows.get(str(entry.get("model")), {}), **entry}
            for entry in entries
        ]
    return block.model_copy(update=changes)


def _check_names(steps: Sequence[Step], top: TopBlock) -> None:
    """Raise a UserError when a name means two things, when a step reads a later one, or when none reads a step."""
    names = [step.name for step in steps]
    for i, step in enumerate(steps):
        if step.name in names[:i]:
            raise UserError(f"two steps are named '{step.name}'; every step needs its own name")
        if step.name in top.sources:
            raise UserError(f"'{step.name}' is a step and an alias of sources; rename one of them")
        for model in step.models:
            if model in names[i:]:
                which = "itself" if model == step.name else f"step '{model}', which is made after it"
                raise UserError(f"step '{step.name}' reads {which}; a step may read earlier ones only")
    for alias, text in top.sources.items():
        if text in top.sources and text != alias and not os.path.exists(os.path.expanduser(text)):
            raise UserError(f"sources: '{alias}' stands for '{text}', an alias itself; write what that one stands for")
    read = {model for step in steps for model in step.models}
    for name in names[:-1]:
        if name not in read:
            raise UserError(f"no later step reads step '{name}'; remove it, or name it where it is meant")


def _tokenizer(top: TopBlock, steps: tuple[Step, ...]) -> TokenizerSettings | None:
    if top.tokenizer_source is not None and top.tokenizer is not None:
        raise UserError("'tokenizer_source' and 'tokenizer' both stand; keep 'tokenizer', with its `source:`")
    if top.tokenizer_source is None and top.tokenizer is None:
        return None
    tokenizer = top.tokenizer or TokenizerSettings(source=str(top.tokenizer_source))
    recipe = Recipe(steps, top.sources)
    source = tokenizer.source
    if source not in (*WORDS, *top.sources) and "/" not in source and not os.path.lexists(source):
        hint = nearest(source.lower(), WORDS)
        if "did you mean" in hint and recipe.same_input(source) not in recipe.inputs:
            key = "tokenizer" if top.tokenizer else "tokenizer_source"
            raise UserError(f"{key}: '{source}' is no model here, nor one of {', '.join(WORDS)}{hint}")
    for rule in tokenizer.rules.values():
        if rule.model is not None and recipe.same_input(rule.model) not in recipe.inputs:
            raise UserError(f"tokenizer.tokens: '{rule.model}' is not a model here{nearest(rule.model, recipe.inputs)}")
    if tokenizer.source in {step.name for step in steps}:
        raise UserError(f"tokenizer: '{tokenizer.source}' is a step; name the model whose tokenizer it has")
    return tokenizer
