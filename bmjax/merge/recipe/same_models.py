"""Models that a recipe names in two ways: `base/`, `./base`, an alias and a link are one directory, so one model.

`read_recipe` calls it for every block before its step is built. It opens no model.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bmjax.config import UserError
from bmjax.io.hub import split_adapter
from bmjax.merge.recipe.yaml_blocks import StepBlock
from bmjax.urls import url_of


def with_one_name(block: StepBlock, sources: Mapping[str, str], steps: Sequence[str], location: str) -> StepBlock:
    """Return a block in which the base, wherever it stands among the models, has the name that `base_model` gives it.

    sources: the directories of aliases. steps: names that mean no directory. In a slice two names of one model may
    stand for different layers of it, so there only the base's own entry is renamed. Raises UserError where `models`
    lists a directory by two names.
    """
    base, sources = block.base_model, {**sources, **{name: f"\0{name}" for name in steps}}
    if block.models is not None:
        models = _renamed(block.models, base, sources)
        names_by_directory: dict[str, str] = {}
        for name in filter(None, map(_name, models)):
            first = names_by_directory.setdefault(_directory(name, sources), name)
            if first != name:
                raise UserError(
                    f"{location}: models '{first}' and '{name}' are one directory, so the same model; list it once"
                )
        block = block.model_copy(update={"models": models})
    if block.slices is not None:
        slices = []
        for part in block.slices:
            renamed = _renamed(part.sources, part.base_model or base, sources)
            slices.append(part.model_copy(update={"sources": renamed}))
        block = block.model_copy(update={"slices": slices})
    return block


def _renamed(entries: Sequence[object], base: str | None, sources: Mapping[str, str]) -> list[object]:
    """Return entries of models with the one that is the base under another name renamed to `base`."""
    names = [_name(entry) for entry in entries]
    if base is None or base in names:
        return list(entries)
    directory, renamed, is_done = _directory(base, sources), [], False
    for entry, name in zip(entries, names, strict=True):
        if name is not None and not is_done and _directory(name, sources) == directory:
            is_done = True
            if isinstance(entry, str):
                entry = base
            elif isinstance(entry, Mapping):
                entry = {**entry, "model": base}
            else:
                entry = entry.model_copy(update={"model": base})  # type: ignore[attr-defined]
        renamed.append(entry)
    return renamed


def _name(entry: object) -> str | None:
    """Return the model of an entry, which may still be written wrong."""
    name = entry.get("model") if isinstance(entry, Mapping) else getattr(entry, "model", entry)
    return name if isinstance(name, str) and name else None


def _directory(name: str, sources: Mapping[str, str]) -> str:
    """Return what tells a model from others: the resolved path of a directory that is there, else its name.

    Of MODEL+ADAPTER, both of which may be aliases, it is that of the two.
    """
    text = sources.get(name, name)
    if url_of(text):
        return text.rstrip("/")
    try:
        model, adapter = split_adapter(text)
        parts = [text] if adapter is None else [sources.get(part, part) for part in (model, adapter)]
        paths = [Path(part).expanduser() for part in parts]
        return "+".join(os.path.realpath(p) if p.is_dir() else part for part, p in zip(parts, paths, strict=True))
    except (OSError, RuntimeError, ValueError):  # a name that is no path, for the model's own reader to refuse
        return text
