"""The YAML of a recipe: which keys stand in which block, in one document, in `steps:`, or in several documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from bmjax.config import Settings, UserError, nearest, read_yaml_documents
from bmjax.merge.recipe.tokenizer import TokenizerSettings

Dtype = Literal["float32", "bfloat16", "float16"]
S = TypeVar("S", bound=Settings)


class ModelEntry(Settings):
    """One entry of `models:`."""

    model: str = Field(min_length=1, description="a directory, hub id, alias of `sources`, or an earlier step's name")
    parameters: dict[str, Any] = Field({}, description="this model's values of the method's per-model parameters")
    data: str | list[str] | None = Field(
        None, description="learned and regmean: rows of the model's domain, in the formats that `bmjax train` reads"
    )


class LayersEntry(ModelEntry):
    """One entry of a slice's `sources:`."""

    layer_range: tuple[int, int] = Field(description="the layers read, from the first up to but without the second")


class SliceBlock(Settings):
    """Some layers of the result, merged from as many layers of each source."""

    sources: list[LayersEntry] = Field(min_length=1, description="the models and which of their layers")
    base_model: str | None = Field(None, min_length=1, description="in place of the recipe's own")
    parameters: dict[str, Any] = Field({}, description="in place of the recipe's own")
    residual_weight: float | None = Field(None, description="without effect, as in mergekit")


class StepBlock(Settings):
    """One merge: the whole recipe in mergekit's dialect, or one entry of `steps:`."""

    merge_method: str = Field(description="one of the methods that `bmjax merge --help` lists")
    base_model: str | None = Field(None, min_length=1, description="the model that changes are measured against")
    models: list[Any] | None = Field(None, description="the models: each a name, or `model: NAME` with `parameters:`")
    slices: list[SliceBlock] | None = Field(None, min_length=1, description="the layers of the result, in order")
    parameters: dict[str, Any] = Field({}, description="the method's parameters; per-model ones as a default")
    name: str | None = Field(None, min_length=1, description="what later steps call the result")
    dtype: Dtype | None = Field(None, description="as out_dtype, which it gives way to; arithmetic is always float32")
    out_dtype: Dtype | None = Field(None, description="type of the result (default: as the base stores each tensor)")


class TopBlock(Settings):
    """What a recipe says once."""

    sources: dict[str, str] = Field({}, description="short names of model directories or hub ids")
    seed: int = Field(0, ge=0, lt=2**63, description="of random masks and of drawn rows; equal seeds give equal bytes")
    compat: Literal["mergekit"] | None = Field(None, description="mergekit: its arithmetic, where ours is better")
    tokenizer_source: str | None = Field(None, min_length=1, description="base, union, or a model")
    tokenizer: TokenizerSettings | None = Field(None, description="source, tokens and pad_to_multiple_of")
    chat_template: str | None = Field(None, min_length=1, description="auto (the base's), a name, or jinja")
    dtype: Dtype | None = Field(None, description="as in a step")
    out_dtype: Dtype | None = Field(None, description="as in a step")


_OF_THE_RESULT = ("tokenizer_source", "tokenizer", "chat_template")
_TOP_ONLY = [key for key in TopBlock.model_fields if key not in StepBlock.model_fields]
_STEP_ONLY = [key for key in StepBlock.model_fields if key not in TopBlock.model_fields]


def read_blocks(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[TopBlock, list[tuple[str, StepBlock]]]:
    """Read the blocks of a YAML file or a mapping, then apply `key.sub=value` overrides (`steps.NAME.key=value`).

    Returns what the recipe says once, and of each step its location for errors, and its block.
    """
    location = "recipe" if isinstance(source, Mapping) else str(source)
    # Which keys belong to the whole recipe, and which to each merge.
    raw = [source] if isinstance(source, Mapping) else read_yaml_documents(source)
    documents = [document for document in raw if document is not None] or [{}]
    for document in documents:
        if not isinstance(document, Mapping):
            raise UserError(f"{location}: expected `key: value` lines at the top, found {type(document).__name__}")
        if "modules" in document:
            raise UserError(
                f"{location}: 'modules' is not supported: list whole models under 'models', or layers under 'slices'"
            )
    has_steps = len(documents) == 1 and "steps" in documents[0]
    top, merges = _split_steps(documents[0], location) if has_steps else _split_documents(documents, location)
    # Which override belongs to which of them.
    if len(documents) == 1 and not has_steps:
        of_top = [override for override in overrides if _root(override) in _TOP_ONLY]
        of_steps = [[override for override in overrides if override not in of_top]]
        locations = [location]
    else:
        names = [str(merge.get("name") or "merged") for merge in merges]
        of_top, of_steps = _assign(overrides, names)
        locations = [f"{location}: {'step' if has_steps else 'document'} '{name}'" for name in names]
        merges = [{**merge, "name": name} for merge, name in zip(merges, names, strict=True)]
    steps = [
        (at, validate(StepBlock, merge, at, changes))
        for at, merge, changes in zip(locations, merges, of_steps, strict=True)
    ]
    return validate(TopBlock, top, location, of_top), steps


def validate(kind: type[S], values: Mapping[str, Any], location: str, overrides: Sequence[str] = ()) -> S:
    """Return `values` as settings; errors begin with `location`."""
    try:
        return kind.read(values, overrides)
    except UserError as error:
        raise UserError(f"{location}: {str(error).removeprefix('settings: ')}") from None


def _check_key(key: Any, known: Sequence[str], location: str) -> None:
    if key not in known:
        raise UserError(f"{location}: unknown key '{key}'{nearest(str(key), known)}")


def _split_steps(document: Mapping[str, Any], location: str) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the keys of the whole recipe, and those of each of its `steps:`."""
    for key in document:
        if key in _STEP_ONLY:
            raise UserError(f"{location}: '{key}' stands beside 'steps'; move it into a step")
        _check_key(key, ["steps", *TopBlock.model_fields], location)
    steps = document["steps"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise UserError(
            f"{location}: steps: expected a list of merges, each a block of keys, found {str(steps)[:60]!r}"
        )
    for key in (key for step in steps for key in step):
        if key in _TOP_ONLY:
            raise UserError(f"{location}: '{key}' is the whole recipe's, not a step's; move it beside 'steps'")
    for step in steps[:-1]:
        if not step.get("name"):
            raise UserError(f"{location}: every step but the last needs a name: add `name: ...` to {step}"[:300])
    return {key: value for key, value in document.items() if key != "steps"}, steps


def _split_documents(
    documents: Sequence[Mapping[str, Any]], location: str
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return what the documents say of the whole recipe, and each one's merge, the one without a name last."""
    ordered = sorted(documents, key=lambda document: document.get("name") is None)
    unnamed = sum(document.get("name") is None for document in documents)
    if unnamed > 1:
        raise UserError(f"{location}: {unnamed} documents have no name; only the result's may have none")
    top: dict[str, Any] = {}
    for document in ordered:
        for key, value in document.items():
            _check_key(key, [*StepBlock.model_fields, *_TOP_ONLY, "steps"], location)
            if key == "steps":
                raise UserError(f"{location}: 'steps' stands in one of {len(documents)} documents; keep one form")
            if key in StepBlock.model_fields:
                continue
            if key in _OF_THE_RESULT and document is not ordered[-1]:
                raise UserError(f"{location}: '{key}' belongs to the last document, which makes the result")
            if key == "sources" and isinstance(value, Mapping) and isinstance(top.get(key, {}), Mapping):
                value = {**top.get(key, {}), **value}
            elif key in top and top[key] != value:
                raise UserError(f"{location}: '{key}' is {top[key]!r} in one document and {value!r} in another")
            top[key] = value
    return top, [{k: v for k, v in document.items() if k in StepBlock.model_fields} for document in ordered]


def _root(override: str) -> str:
    return override.split("=")[0].split(".")[0].strip()


def _assign(overrides: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the overrides of the whole recipe, and those of every step without their `steps.NAME.`."""
    of_top: list[str] = []
    of_steps: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        root, _, rest = override.partition(".")
        if root == "steps" and "=" in rest:
            name, _, key = rest.partition(".")
            if name not in of_steps or not key:
                target = name.split("=")[0]
                raise UserError(f"override '{override}': no step is named '{target}'{nearest(target, names)}")
            of_steps[name].append(key)
        elif _root(override) in ("dtype", "out_dtype"):
            of_steps[names[-1]].append(override)
        elif "=" in override and _root(override) not in TopBlock.model_fields:
            hint = nearest(_root(override), ["steps", *TopBlock.model_fields])
            raise UserError(f"override '{override}': unknown key{hint} (a step's key: steps.{names[-1]}.KEY=VALUE)")
        else:
            of_top.append(override)
    return of_top, [of_steps[name] for name in names]
