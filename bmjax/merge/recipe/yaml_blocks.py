"""The YAML of a recipe: which keys stand in which block, in one document, in `steps:`, or in several documents."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bmjax.chat.columns import check_columns, columns_of
from bmjax.config import Settings, UserError, aliased_keys, nearest, read_yaml_documents
from bmjax.merge.methods import METHODS
from bmjax.merge.plan.tensor_names import TOWERS
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.merge.recipe.model_names import ModelName, model_key, plain_entry, plain_name
from bmjax.merge.recipe.overrides import assign, root, with_changes
from bmjax.merge.recipe.tokenizer import TokenizerSettings, TokenizerSource

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    BeforeValidator(lambda value: value.removeprefix("torch.") if isinstance(value, str) else value),
]
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
S = TypeVar("S", bound=Settings)


def is_parameter(key: Any) -> bool:
    """Return whether some method has a parameter of that name."""
    return any(key in method.parameters for method in METHODS.values())


class _WithParameters(Settings):
    """A block that has `parameters:`, so that a parameter beside them is a mistake that can be named."""

    @model_validator(mode="before")
    @classmethod
    def _has_its_parameters_inside(cls, block: Any) -> Any:
        for key in block if isinstance(block, Mapping) else ():
            if key not in cls.model_fields and is_parameter(key):
                raise ValueError(f"'{key}' is a parameter: move it under `parameters:`")
        return block


class ModelEntry(_WithParameters):
    """One entry of `models:`."""

    model: ModelName = Field(description="a directory, hub id, alias of `sources`, or an earlier step's name")
    parameters: Parameters = Field({}, description="this model's values of the method's per-model parameters")
    data: str | list[str] | None = Field(
        None,
        description="learned, layerwise, regmean: rows of the model's domain, in the formats that `bmjax train` reads",
    )
    held_out_data: str | list[str] | None = Field(
        None,
        description="rows of the domain that no model was trained on, in the columns of `data`: what does not lower "
        "their loss is not kept; null: `held_out` documents of `data` judge",
    )

    prompt: str | None = Field(None, description="for data of other columns: what is asked, e.g. '{question}'")
    response: str | None = Field(None, description="the answer, with `prompt`, e.g. '{answer}'")
    system: str | None = Field(None, description="the system prompt, with `prompt`")
    reasoning: str | None = Field(None, description="the answer's reasoning, with `prompt`")
    tools: str | None = Field(None, description="descriptions of functions, with `prompt`")

    @model_validator(mode="after")
    def _columns_are_those_of_data(self) -> Self:
        check_columns(self)
        if self.data is None and (given := columns_of(self)):
            raise ValueError(f"'{next(iter(given))}' maps the columns of 'data', which is missing")
        if self.held_out_data is not None:
            if self.data is None:
                raise ValueError("'held_out_data' judges what is learned of 'data', which is missing")
            names = [{value} if isinstance(value, str) else {*value} for value in (self.data, self.held_out_data)]
            if both := names[0] & names[1]:
                raise ValueError(
                    f"'{min(both)}' is both 'data' and 'held_out_data'; name rows that no model was trained on"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _has_a_plain_name(cls, entry: Any) -> Any:
        return plain_entry(entry)


def _whole_range(value: Any) -> Any:
    if isinstance(value, list) and (len(value) != 2 or None in value):
        raise ValueError("expected [first, end], where end is the number of the layer after the last")
    return value


LayerRange = Annotated[tuple[int, int], BeforeValidator(_whole_range)]


class LayersEntry(ModelEntry):
    """One entry of a slice's `sources:`."""

    layer_range: LayerRange = Field(description="the layers read, from the first up to but without the second")


class SliceBlock(_WithParameters):
    """Some layers of the result, merged from as many layers of each source."""

    sources: list[LayersEntry] = Field(min_length=1, description="the models and which of their layers")
    base_model: ModelName | None = Field(None, description="in place of the recipe's own")
    parameters: Parameters = Field({}, description="in place of the recipe's own")
    residual_weight: float | None = Field(None, description="without effect, as in mergekit")

    @model_validator(mode="before")
    @classmethod
    def _has_sources(cls, block: Any) -> Any:
        if isinstance(block, Mapping) and "sources" not in block and {"model", "layer_range"} & block.keys():
            raise ValueError("`sources:` is missing; write `- sources: [{model: NAME, layer_range: [FIRST, END]}]`")
        return block


class StepBlock(_WithParameters):
    """One merge: the whole recipe in mergekit's dialect, or one entry of `steps:`."""

    merge_method: str = Field(description="one of the methods that `bmjax merge --help` lists")
    base_model: ModelName | None = Field(None, description="the model that changes are measured against")
    models: list[Any] | None = Field(None, description="the models: each a name, or `model: NAME` with `parameters:`")
    slices: list[SliceBlock] | None = Field(None, min_length=1, description="the layers of the result, in order")
    parameters: Parameters = Field({}, description="the method's parameters; per-model ones as a default")
    keep: list[Any] | None = Field(
        None, description="tensors left as the donor has them: parts of their names, `filter:` or `regex:`"
    )
    name: str | None = Field(None, min_length=1, description="what later steps call the result")
    dtype: Dtype | None = Field(None, description="as out_dtype, which it gives way to; arithmetic is always float32")
    out_dtype: Dtype | None = Field(None, description="type of the result (default: as the base stores each tensor)")

    @field_validator("models", mode="before")
    @classmethod
    def _have_plain_names(cls, models: Any) -> Any:
        return [plain_entry(entry) for entry in models] if isinstance(models, list) else models


class TopBlock(Settings):
    """What a recipe says once."""

    sources: dict[str, ModelName] = Field({}, description="short names of model directories or hub ids")
    seed: int = Field(0, ge=0, lt=2**63, description="of random masks and of drawn rows; equal seeds give equal bytes")
    compat: Literal["mergekit"] | None = Field(None, description="mergekit: its arithmetic, where ours is better")
    tokenizer_source: TokenizerSource | None = Field(None, description="base, union, or a model")
    tokenizer: TokenizerSettings | None = Field(None, description="source, tokens and pad_to_multiple_of")
    chat_template: str | None = Field(
        None, min_length=1, description="auto (the one that most models have), a name, or jinja"
    )
    dtype: Dtype | None = Field(None, description="as in a step")
    out_dtype: Dtype | None = Field(None, description="as in a step")


# Keys of programs beside mergekit-yaml and mergekit-multi.
_OF_OTHER_TOOLS = {
    "experts": "mergekit-moe (mixtures of experts)", "gate_mode": "mergekit-moe (mixtures of experts)",
    "genome": "mergekit-evolve (searches for recipes)",
}  # fmt: skip
# Options of mergekit's commands, which some write into recipes, where mergekit passes over them. Here they change no
# result, but for random_seed.
_OPTIONS = (
    "allow_crimes", "transformers_cache", "lora_merge_cache", "lora_merge_dtype", "cuda", "device", "low_cpu_memory",
    "out_shard_size", "copy_tokenizer", "clone_tensors", "trust_remote_code", "lazy_unpickle", "write_model_card",
    "safe_serialization", "verbose", "verbosity", "quiet", "read_to_gpu", "multi_gpu", "num_threads", "gpu_rich",
    "async_write", "write_threads", "allow_negative_weights",
)  # fmt: skip
_OF_THE_RESULT = ("tokenizer_source", "tokenizer", "chat_template")
_TOP_ONLY = [key for key in TopBlock.model_fields if key not in StepBlock.model_fields]
_STEP_ONLY = [key for key in StepBlock.model_fields if key not in TopBlock.model_fields]


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe in one document, by which editors complete and check it."""
    step, top, entry = (cls.model_json_schema() for cls in (StepBlock, TopBlock, ModelEntry))
    definitions = {**step.pop("$defs"), **top.pop("$defs")}
    # A model's name may be a block, too, as mergekit's recipes have it.
    entry["properties"]["model"]["type"] = ["string", "object"]
    step["properties"]["models"]["anyOf"][0]["items"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelEntry"}]}
    step["properties"]["merge_method"]["enum"] = [*METHODS, *CALIBRATED]
    steps = {"type": "array", "items": {"$ref": "#/$defs/StepBlock"}, "description": "several merges in a row"}
    modules = {"type": "object", "description": "merges of a model's modules, as in mergekit"}
    return {
        "title": "bmjax merge",
        "type": "object",
        "properties": {**step["properties"], **top["properties"], "steps": steps, "modules": modules},
        "additionalProperties": False,
        "$defs": {**definitions, "ModelEntry": entry, "StepBlock": step},
    }


def read_blocks(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], notes: list[str]
) -> tuple[TopBlock, list[tuple[str, StepBlock]]]:
    """Read the blocks of a YAML file or a mapping, then apply `key.sub=value` overrides (`steps.NAME.key=value`).

    notes: gets a line for every key that is not read. Returns what the recipe says once, and of each step its location
    for errors, and its block.
    """
    location = "recipe" if isinstance(source, Mapping) else str(source)
    # Which keys belong to the whole recipe, and which to each merge.
    raw = [source] if isinstance(source, Mapping) else read_yaml_documents(source)
    for document in raw:
        if not isinstance(document, Mapping | None):
            raise UserError(f"{location}: expected `key: value` lines at the top, found {type(document).__name__}")
    kept = _without_idle_keys(raw, source, location, notes)
    if not any(kept):
        raise UserError(f"{location}: is empty; expected a recipe, with `merge_method:` and `models:`")
    for key in (key for document in kept for key in document if key in _OF_OTHER_TOOLS):
        raise UserError(
            f"{location}: '{key}' stands in recipes of {_OF_OTHER_TOOLS[key]}, which bmjax does not carry out"
        )
    documents = [_without_modules(document, location, document.get("sources")) for document in kept]
    has_steps = len(documents) == 1 and "steps" in documents[0]
    top, merges = _split_steps(documents[0], location) if has_steps else _split_documents(documents, location)
    # Which override belongs to which of them.
    if len(documents) == 1 and not has_steps:
        of_top = [override for override in overrides if root(override) in _TOP_ONLY]
        of_steps = [[override for override in overrides if override not in of_top]]
        locations = [location]
    else:
        names = [str(merge.get("name") or "merged") for merge in merges]
        of_top, of_steps = assign(overrides, names, [*TopBlock.model_fields])
        locations = [f"{location}: {'step' if has_steps else 'document'} '{name}'" for name in names]
        merges = [{**merge, "name": name} for merge, name in zip(merges, names, strict=True)]
    steps = [
        (at, validate(StepBlock, merge, at, changes))
        for at, merge, changes in zip(locations, merges, of_steps, strict=True)
    ]
    return validate(TopBlock, top, location, of_top), steps


def _without_idle_keys(
    documents: Sequence[Mapping[str, Any] | None], source: Any, location: str, notes: list[str]
) -> list[dict[str, Any]]:
    """Return the documents without keys that hold anchors for other keys, or that are marked as private."""
    known = {"steps", "modules", *StepBlock.model_fields, *TopBlock.model_fields}
    unknown = [[key for key in document or () if key not in known] for document in documents]
    aliased = aliased_keys(source) if any(unknown) and not isinstance(source, Mapping) else [set() for _ in documents]
    kept = []
    for document, strange, named in zip(documents, unknown, aliased, strict=True):
        if document is None:
            continue
        idle = {key for key in strange if key in (*named, *_OPTIONS) or str(key).startswith(("x-", "_", "."))}
        for key in strange:
            if key in idle:
                told = "is read only where its anchors are named" if key in named else "is not read"
                told = "has no effect: it is an option of mergekit's command" if key in _OPTIONS else told
                notes.append(f"{location}: key '{key}' {told}")
        # A key without a value says nothing, as tools write those that are not used.
        document = {key: value for key, value in document.items() if key not in idle and value is not None}
        if "random_seed" in document:
            seed = document.pop("random_seed")
            if document.setdefault("seed", seed) != seed:
                raise UserError(f"{location}: random_seed {seed} and seed {document['seed']} both stand; keep seed")
            notes.append(f"{location}: random_seed is read as seed")
        kept.append(document)
    return kept


def _without_modules(document: Mapping[str, Any], location: str, sources: Any) -> Mapping[str, Any]:
    """Return a document with the merge of its language model's module, and `keep` for its other modules.

    Those are the donor's, whether they are listed with that one model or not at all; or all of them are merged as the
    language model is. Raises UserError for modules merged in different ways, and for one of another single model.

    sources: the directories of aliases, not yet checked.
    """
    if "modules" not in document:
        return document
    modules = document["modules"]
    if not isinstance(modules, Mapping) or not modules or not all(isinstance(m, Mapping) for m in modules.values()):
        raise UserError(f"{location}: modules: expected a block for each module, found {str(modules)[:60]}")
    for key in ("models", "slices"):
        if key in document:
            raise UserError(f"{location}: '{key}' stands beside 'modules'; move it into the language model's module")
    for name, module in modules.items():
        for key in module:
            _check_key(key, ["models", "slices"], f"{location}: modules.{name}")
        if not module:
            raise UserError(f"{location}: modules.{name}: expected 'models' or 'slices'")
    texts = [name for name in modules if re.search(r"text|language|llm|decoder|default", str(name))]
    if len(texts) != 1:
        listed = ", ".join(map(str, modules))
        raise UserError(
            f"{location}: modules: which of {listed} is the language model is not clear; name one `text_decoder`"
        )
    text = modules[texts[0]]
    others = {name: module for name, module in modules.items() if name != texts[0]}
    alike = [name for name, module in others.items() if module == text]
    donor = _donor(document, text)
    for name, module in others.items():
        if name in alike:
            continue
        models = module.get("models")
        if not isinstance(models, list) or len(models) != 1:
            raise UserError(
                f"{location}: modules: '{name}' is merged otherwise than '{texts[0]}'; merge it alike, or list the one "
                "model whose tensors it keeps"
            )
        if donor and (model := _model(models[0])) and not _is_one_model(model, donor, sources):
            raise UserError(
                f"{location}: modules: '{name}' keeps the tensors of '{model}', but what is not merged is taken from "
                f"'{donor}', the base_model or else the language model's first; make '{model}' that one"
            )
    if alike and len(alike) < len(others):
        kept = next(name for name in others if name not in alike)
        raise UserError(
            f"{location}: modules: '{alike[0]}' is merged and '{kept}' is kept, and which tensors are whose is not "
            "known; list the models under `models:` and parts of the kept tensors' names under `keep:`"
        )
    keep = [*(document.get("keep") or ()), *([] if alike else [{"regex": TOWERS}])]
    return {key: value for key, value in document.items() if key != "modules"} | dict(text) | {"keep": keep}


def _donor(document: Mapping[str, Any], module: Mapping[str, Any]) -> str | None:
    """Return the model that gives a document's result what is not merged; None where it is written wrong."""
    if document.get("base_model"):
        return _model(document["base_model"])
    entries = module.get("models")
    if not entries and isinstance(slices := module.get("slices"), list) and slices and isinstance(slices[0], Mapping):
        if slices[0].get("base_model"):
            return _model(slices[0]["base_model"])
        entries = slices[0].get("sources")
    return _model(entries[0]) if isinstance(entries, list) and entries else None


def _model(entry: Any) -> str | None:
    """Return the model of an entry; None where it is written wrong, which is said later."""
    with contextlib.suppress(ValueError):
        is_entry = isinstance(entry, Mapping) and not {"path", "lora"} & entry.keys()
        name = plain_entry(entry).get("model") if is_entry else plain_name(entry)
        return name if isinstance(name, str) and name else None
    return None


def _is_one_model(first: str, second: str, sources: Any) -> bool:
    aliases = {key: value for key, value in sources.items() if isinstance(value, str)} if isinstance(
        sources, Mapping
    ) else {}  # fmt: skip
    return first == second or model_key(first, aliases) == model_key(second, aliases)


def validate(kind: type[S], values: Mapping[str, Any], location: str, overrides: Sequence[str] = ()) -> S:
    """Return `values` as settings; errors begin with `location`."""
    try:
        return kind.read(with_changes(kind, values, overrides))
    except UserError as error:
        raise UserError(f"{location}: {str(error).removeprefix('settings: ')}") from None


def _check_key(key: Any, known: Sequence[str], location: str) -> None:
    if key not in known:
        if is_parameter(key):
            raise UserError(f"{location}: '{key}' is a parameter: move it under `parameters:`")
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
    steps = [_without_modules(step, location, document.get("sources")) for step in steps]
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
