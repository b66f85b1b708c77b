"""The YAML of a recipe: which keys stand where, in one document, in `steps:`, or in several documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from bmjax.config import Settings, UserError, nearest, read_yaml_documents

Dtype = Literal["float32", "bfloat16", "float16"]
_OF_THE_RESULT = ("tokenizer_source", "tokenizer", "chat_template")


class ModelEntry(Settings):
    """One entry of `models:`."""

    model: str = Field(min_length=1, description="a directory, hub id, alias of `sources`, or an earlier step's name")
    parameters: dict[str, Any] = Field({}, description="this model's values of the method's per-model parameters")


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
    seed: int = Field(0, ge=0, lt=2**63, description="of random masks; the same seed gives the same bytes")
    compat: Literal["mergekit"] | None = Field(None, description="mergekit: its arithmetic, where ours is better")
    tokenizer_source: str | None = Field(None, min_length=1, description="base, union, or a model")
    tokenizer: dict[str, Any] | None = Field(None, description="source, tokens and pad_to_multiple_of")
    chat_template: str | None = Field(None, min_length=1, description="auto (the base's), a name, or jinja")
    dtype: Dtype | None = Field(None, description="as in a step")
    out_dtype: Dtype | None = Field(None, description="as in a step")


class Blocks(NamedTuple):
    """A recipe's YAML, every key known and of its type. steps: for each its place in words, and its block."""

    where: str
    top: TopBlock
    steps: list[tuple[str, StepBlock]]


def read_blocks(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Blocks:
    """The blocks of a YAML file or a mapping, then `key.sub=value` overrides (`steps.NAME.key=value` for a step)."""
    where = "recipe" if isinstance(source, Mapping) else str(source)
    documents = _documents(source, where)
    for document in documents:
        if "modules" in document:
            raise UserError(
                f"{where}: 'modules' is not supported: list whole models under 'models', or layers under 'slices'"
            )
    if len(documents) == 1 and "steps" in documents[0]:
        top, raw = _with_steps(documents[0], where)
        return _several(where, top, raw, overrides, "step")
    top, raw = _split(documents, where)
    if len(raw) > 1:
        return _several(where, top, raw, overrides, "document")
    of_top = [o for o in overrides if _root(o) in TopBlock.model_fields.keys() - StepBlock.model_fields.keys()]
    block = settings(StepBlock, raw[0], where, [o for o in overrides if o not in of_top])
    return Blocks(where, settings(TopBlock, top, where, of_top), [(where, block)])


def settings(kind: type[Any], values: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Any:
    """`kind` read from `values`, the unknown key named before what it was meant to be is missed."""
    for key in values:
        _check_key(key, kind.model_fields, where)
    try:
        return kind.read(values, overrides)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('settings: ')}") from None


def _documents(source: str | Path | Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    raw = [source] if isinstance(source, Mapping) else read_yaml_documents(source)
    documents = [document for document in raw if document is not None] or [{}]
    for document in documents:
        if not isinstance(document, Mapping):
            raise UserError(f"{where}: expected `key: value` lines at the top, found {type(document).__name__}")
    return [dict(document) for document in documents]


def _check_key(key: Any, known: Any, where: str) -> None:
    if key not in known:
        raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), list(known))}")


def _with_steps(document: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for key in document:
        if key in StepBlock.model_fields and key not in TopBlock.model_fields:
            raise UserError(f"{where}: '{key}' stands beside 'steps'; move it into a step")
        _check_key(key, ["steps", *TopBlock.model_fields], where)
    steps = document["steps"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise UserError(f"{where}: steps: expected a list of merges, each a block of keys, found {str(steps)[:60]!r}")
    for step in steps:
        for key in step:
            if key in TopBlock.model_fields and key not in StepBlock.model_fields:
                raise UserError(f"{where}: '{key}' is the whole recipe's, not a step's; move it beside 'steps'")
    for step in steps[:-1]:
        if not step.get("name"):
            raise UserError(f"{where}: every step but the last needs a name: add `name: ...` to {step}"[:300])
    return {key: value for key, value in document.items() if key != "steps"}, [dict(step) for step in steps]


def _split(documents: list[dict[str, Any]], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the documents say of the whole recipe, and each one's merge; the one without a name is the result."""
    known = list(dict.fromkeys([*StepBlock.model_fields, *TopBlock.model_fields, "steps"]))
    unnamed = [document for document in documents if document.get("name") is None]
    if len(unnamed) > 1:
        raise UserError(f"{where}: {len(unnamed)} documents have no name; only the result's may have none")
    ordered = [document for document in documents if document.get("name") is not None] + unnamed
    top: dict[str, Any] = {}
    for document in ordered:
        for key, value in document.items():
            _check_key(key, known, where)
            if key == "steps":
                raise UserError(f"{where}: 'steps' stands in one of {len(documents)} documents; keep one form")
            if key in StepBlock.model_fields:
                continue
            if key in _OF_THE_RESULT and document is not ordered[-1]:
                raise UserError(f"{where}: '{key}' belongs to the last document, which makes the result")
            if key == "sources" and isinstance(value, Mapping) and isinstance(top.get(key, {}), Mapping):
                value = {**top.get(key, {}), **value}
            elif key in top and top[key] != value:
                raise UserError(f"{where}: '{key}' is {top[key]!r} in one document and {value!r} in another")
            top[key] = value
    return top, [{k: v for k, v in document.items() if k in StepBlock.model_fields} for document in ordered]


def _root(override: str) -> str:
    return override.split("=")[0].split(".")[0].strip()


def _several(
    where: str, top: Mapping[str, Any], raw: Sequence[Mapping[str, Any]], overrides: Sequence[str], kind: str
) -> Blocks:
    labels = [str(block.get("name") or "merged") for block in raw]
    of_steps: dict[str, list[str]] = {label: [] for label in labels}
    of_top: list[str] = []
    for override in overrides:
        root, _, rest = override.partition(".")
        if root == "steps" and "=" in rest:
            label, _, key = rest.partition(".")
            if label not in of_steps or not key:
                target = label.split("=")[0]
                raise UserError(f"override '{override}': no step is named '{target}'{nearest(target, labels)}")
            of_steps[label].append(key)
        elif _root(override) in ("dtype", "out_dtype"):
            of_steps[labels[-1]].append(override)
        elif "=" in override and _root(override) not in TopBlock.model_fields:
            hint = nearest(_root(override), ["steps", *TopBlock.model_fields])
            raise UserError(f"override '{override}': unknown key{hint} (a step's key: steps.{labels[-1]}.KEY=VALUE)")
        else:
            of_top.append(override)
    blocks = []
    for label, block in zip(labels, raw, strict=True):
        at = f"{where}: {kind} '{label}'"
        blocks.append((at, settings(StepBlock, {**block, "name": label}, at, of_steps[label])))
    return Blocks(where, settings(TopBlock, top, where, of_top), blocks)
