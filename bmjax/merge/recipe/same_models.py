"""Models that a recipe names in two ways: `base/`, `./base`, an alias and a link are one directory, so one model.

`read_recipe` calls it for every block before its step is built. It opens no model.
"""

from collections.abc import Mapping, Sequence

from bmjax.config import UserError
from bmjax.merge.recipe.model_names import model_key
from bmjax.merge.recipe.yaml_blocks import StepBlock


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
            first = names_by_directory.setdefault(model_key(name, sources), name)
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
    directory, renamed, is_done = model_key(base, sources), [], False
    for entry, name in zip(entries, names, strict=True):
        if name is not None and not is_done and model_key(name, sources) == directory:
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
