"""Merge recipes: mergekit-style YAML, or named `steps:` of such blocks, read into checked, frozen steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bmjax.config import Settings, UserError, nearest, read_yaml
from bmjax.merge.methods import Method, find

Dtype = Literal["float32", "bfloat16", "float16"]
_NOT_HERE = {
    "slices": "only whole models are merged; list them under 'models'",
    "modules": "only whole models are merged; list them under 'models'",
    "tokenizer_source": "the tokenizer is copied from the base model; remove the key",
    "tokenizer": "the tokenizer is copied from the base model; remove the key",
    "chat_template": "the chat template is copied from the base model; remove the key",
}


class ModelEntry(Settings):
    """One entry of `models:`."""

    model: str = Field(min_length=1, description="a directory, an alias of `sources`, or the name of an earlier step")
    parameters: dict[str, Any] = Field({}, description="this model's values of the method's per-model parameters")


class StepBlock(Settings):
    """One merge: the whole recipe in mergekit's dialect, or one entry of `steps:`."""

    merge_method: str = Field(description="one of the methods that `bmjax merge --help` lists")
    base_model: str | None = Field(None, description="the model that changes are measured against")
    models: list[Any] = Field(description="the models: each a name, or `model: NAME` with its `parameters:`")
    parameters: dict[str, Any] = Field({}, description="the method's parameters; per-model ones as a default")
    name: str | None = Field(None, description="what later steps call the result")
    dtype: Dtype | None = Field(None, description="as out_dtype, which it gives way to; arithmetic is always float32")
    out_dtype: Dtype | None = Field(None, description="type of the result (default: as the base stores each tensor)")


class RecipeFile(Settings):
    """The top of a recipe with `steps:`."""

    steps: list[dict[str, Any]] = Field(min_length=1, description="merges in order; the last one is the result")
    sources: dict[str, str] = Field({}, description="short names of model directories")
    dtype: Dtype | None = Field(None, description="as in a step")
    out_dtype: Dtype | None = Field(None, description="as in a step")


@dataclass(frozen=True)
class Step:
    """A checked merge. Models are names: of earlier steps, aliases or directories.

    arguments: every parameter of the method by its recipe name; per-model numbers are tuples in branch order, models
    are names. base is None for a method that measures against none; `donor` then still names the model whose
    config, tokenizer and storage types the result takes.
    """

    name: str
    method: Method
    base: str | None
    branches: tuple[str, ...]
    donor: str
    arguments: Mapping[str, Any]

    @property
    def models(self) -> Iterator[str]:
        """Every model name this step reads."""
        yield self.donor
        yield from self.branches
        for parameter in self.method.parameters.values():
            value = self.arguments[parameter.name]
            if parameter.about.model and value is not None:
                yield value


@dataclass(frozen=True)
class Recipe:
    """Checked steps in order; the last is the result. `dtype`: type of the result, None = as the donor stores it.

    notes: what the reader of the recipe should know, one line each. text: the recipe as plain values, for reports.
    """

    steps: tuple[Step, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    compat: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the models that are read, not made, in order of first use."""
        made = {step.name for step in self.steps}
        return tuple(dict.fromkeys(name for step in self.steps for name in step.models if name not in made))

    @property
    def donor(self) -> str:
        """The input whose config, tokenizer and storage types the result takes: the last step's base, traced back."""
        steps = {step.name: step for step in self.steps}
        name = self.steps[-1].donor
        while name in steps:
            name = steps[name].donor
        return name


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a mapping, then `key.sub=value` overrides (`steps.NAME.key=value` for a step).

    Raises UserError, one line, for a missing file, bad YAML, an unknown key, method, parameter or model name, a
    missing base_model or a wrong number of models.
    """
    where = "recipe" if isinstance(source, Mapping) else str(source)
    values = dict(source) if isinstance(source, Mapping) else read_yaml(source)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected `key: value` lines at the top, found {type(values).__name__}")
    for key, reason in _NOT_HERE.items():
        if key in values:
            raise UserError(f"{where}: '{key}' is not supported: {reason}")
    if "steps" in values:
        top = _settings(RecipeFile, values, where, [o for o in overrides if not o.startswith("steps.")])
        blocks = list(_blocks(top.steps, where, [o for o in overrides if o.startswith("steps.")]))
    else:
        sources = {"sources": values["sources"]} if "sources" in values else {}
        single = {key: value for key, value in values.items() if key != "sources"}
        block = _settings(StepBlock, single, where, [o for o in overrides if not o.startswith("sources.")])
        blocks = [(where, block.model_copy(update={"name": block.name or _free_name(block)}))]
        extra = [o for o in overrides if o.startswith("sources.")]
        top = _settings(RecipeFile, {"steps": [{}], **sources}, where, extra)
    notes: list[str] = []
    names = [str(block.name) for _, block in blocks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two steps are named '{name}'; every step needs its own name")
        if name in top.sources:
            raise UserError(f"{where}: '{name}' is a step and an alias of sources; rename one of them")
    steps = tuple(_step(block, at, notes) for at, block in blocks)
    _check_order(steps, where)
    last = blocks[-1][1]
    for at, block in blocks[:-1]:
        if block.dtype or block.out_dtype:
            notes.append(f"{at}: dtype has no effect: steps stay float32 in memory, only the last one is rounded")
    dtype = last.out_dtype or last.dtype or top.out_dtype or top.dtype
    plain = [{k: v for k, v in block.model_dump().items() if v not in (None, {})} for _, block in blocks]
    return Recipe(steps, top.sources, dtype, tuple(notes), {"sources": top.sources, "steps": plain, "dtype": dtype})


def _free_name(block: StepBlock) -> str:
    """A name for the only step that none of its models has."""
    models = [entry.get("model") if isinstance(entry, Mapping) else entry for entry in block.models]
    taken = [block.base_model, block.parameters.get("rebase"), *models]
    return next(name for name in ("merged", "merge", "result", "student") if name not in taken)


def _settings(kind: type[Any], values: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Any:
    for key in values:
        # Before pydantic looks, which would first miss the key that this one was meant to be.
        if key not in kind.model_fields:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), list(kind.model_fields))}")
    try:
        return kind.read(values, overrides)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('settings: ')}") from None


def _blocks(raw: list[dict[str, Any]], where: str, overrides: Sequence[str]) -> Iterator[tuple[str, StepBlock]]:
    labels = [str(block.get("name") or ("merged" if i == len(raw) - 1 else "")) for i, block in enumerate(raw)]
    for override in overrides:
        target = override.split("=")[0].split(".")[1]
        if target not in labels:
            raise UserError(f"override '{override}': no step is named '{target}'{nearest(target, labels)}")
    for label, block in zip(labels, raw, strict=True):
        if not label:
            raise UserError(f"{where}: every step but the last needs a name: add `name: ...` to {block}"[:300])
        at, prefix = f"{where}: step '{label}'", f"steps.{label}."
        own = [o.removeprefix(prefix) for o in overrides if o.startswith(prefix)]
        yield at, _settings(StepBlock, {**block, "name": label}, at, own)


def _step(block: StepBlock, where: str, notes: list[str]) -> Step:
    try:
        method = find(block.merge_method)
        entries = [_entry(entry) for entry in block.models]
        names = [entry.model for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"model '{name}' is listed twice under 'models'; list it once")
        if method.base == "required" and block.base_model is None:
            raise UserError(f"{method.name} needs 'base_model': the model that changes are measured against")
        if method.base != "unused" and block.base_model is not None:
            for entry in entries:
                if entry.model == block.base_model and entry.parameters:
                    notes.append(f"{where}: parameters of the base model '{entry.model}' have no effect")
            entries = [entry for entry in entries if entry.model != block.base_model]
        least, most = method.branches
        if len(entries) < least or (most is not None and len(entries) > most):
            up_to = "" if most is None else f" and at most {most}"
            beside = " beside the base" if method.base == "required" else ""
            raise UserError(f"{method.name} needs at least {least}{up_to} models{beside}, found {len(entries)}")
        arguments = _arguments(method, block.parameters, entries)
        if method.check:
            method.check(arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    branches = tuple(entry.model for entry in entries)
    base = None if method.base == "unused" else block.base_model
    return Step(str(block.name), method, base, branches, block.base_model or branches[0], arguments)


def _entry(entry: Any) -> ModelEntry:
    if isinstance(entry, str) and entry:
        return ModelEntry.model_validate({"model": entry})
    if not isinstance(entry, Mapping):
        raise UserError(f"models: expected a model's name or `model: NAME`, found {entry!r}")
    return _settings(ModelEntry, entry, "models")


def _arguments(method: Method, common: Mapping[str, Any], entries: Sequence[ModelEntry]) -> dict[str, Any]:
    for name in common:
        method.parameter(name)
    for entry in entries:
        for name in entry.parameters:
            if not method.parameter(name).about.each:
                raise UserError(
                    f"parameter '{name}' of {method.name} is not a model's: move it from '{entry.model}' "
                    "to the step's own 'parameters'"
                )
    arguments: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        value = common.get(name, parameter.default)
        if parameter.about.each:
            arguments[name] = tuple(parameter.check(entry.parameters.get(name, value)) for entry in entries)
        else:
            arguments[name] = value if value is None and parameter.default is None else parameter.check(value)
    return arguments


def _check_order(steps: Sequence[Step], where: str) -> None:
    names, used = [step.name for step in steps], set()
    for i, step in enumerate(steps):
        for model in step.models:
            if model in names[i:]:
                when = "itself" if model == step.name else f"step '{model}', which is made after it"
                raise UserError(f"{where}: step '{step.name}' reads {when}; a step may read earlier ones only")
            used.add(model)
    for name in names[:-1]:
        if name not in used:
            raise UserError(f"{where}: no later step reads step '{name}'; remove it, or name it where it is meant")
