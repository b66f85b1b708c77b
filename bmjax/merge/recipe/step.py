"""One block of a recipe as a checked, frozen step: its models, its layers, its parameters from all levels."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError
from bmjax.merge.methods import Method, find
from bmjax.merge.methods.method import WITHOUT_EFFECT, Parameter
from bmjax.merge.recipe.values import Rule, Value, checked, either, parse
from bmjax.merge.recipe.yaml_blocks import LayersEntry, ModelEntry, SliceBlock, StepBlock, settings


@dataclass(frozen=True)
class Step:
    """A checked merge. Models are names: of earlier steps, aliases or directories.

    base is None for a method that measures against none; `donor` then still names the model whose config, tokenizer
    and storage types the result takes. arguments: every parameter of the method by its recipe name, per-model ones
    as tuples in branch order; a `Value` where it depends on the tensor, see `at`. slices: the layers of the result
    where they are not simply its models'; `branches` are then those of all slices, and the arguments are theirs.
    dtype, out_dtype: as written, for `compat: mergekit`.
    """

    name: str
    method: Method
    base: str | None
    branches: tuple[str, ...]
    donor: str
    arguments: Mapping[str, Any]
    slices: tuple["Slice", ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None

    @property
    def models(self) -> Iterator[str]:
        """Every model name this step mentions, the donor first."""
        yield self.donor
        yield from self.reads

    @property
    def reads(self) -> tuple[str, ...]:
        """The models whose tensors are read: the base, the branches, those that parameters name."""
        if self.slices:
            return tuple(dict.fromkeys(name for part in self.slices for name in part.step.reads))
        base = () if self.base is None else (self.base,)
        return tuple(dict.fromkeys([*base, *self.branches, *self.named.values()]))

    @property
    def named(self) -> dict[str, str]:
        """The models that parameters name, by what the method calls them: `rebase`, `importance.0`."""
        found: dict[str, str] = {}
        for p in self.method.parameters.values():
            value = self.arguments.get(p.name) if p.about.model else None
            if isinstance(value, tuple):
                found |= {f"{p.name}.{b}": name for b, name in enumerate(value)}
            elif value is not None:
                found[p.name] = value
        return found

    @property
    def values(self) -> Iterator[tuple[str | None, Value]]:
        """(branch, or None for a parameter of the whole step; value) of all that depends on the tensor."""
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                yield None, argument
            elif isinstance(argument, tuple):
                yield from ((b, a) for b, a in zip(self.branches, argument, strict=True) if isinstance(a, Value))

    def at(self, tensor: str, depth: float, names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The arguments for one tensor of the result, at a depth of 0 to 1 (see `bmjax.merge.plan.tensor_names.depth`).

        names: the tensor's name in each model where it has another there, which the filters of per-model parameters
        see. Raises UserError where no filter fits, or the method refuses the arguments.
        """
        own = names or {}
        resolved: dict[str, Any] = {}
        for name, argument in self.arguments.items():
            if isinstance(argument, tuple):
                pairs = zip(self.branches, argument, strict=True)
                resolved[name] = tuple(_resolve(a, own.get(branch, tensor), depth) for branch, a in pairs)
            else:
                resolved[name] = _resolve(argument, tensor, depth)
        if self.method.check and any(self.values):
            try:
                self.method.check(resolved)
            except UserError as error:
                raise UserError(f"step '{self.name}': tensor '{tensor}': {error}") from None
        return resolved


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of a step's result: the k-th is merged from layer `ranges[model][0] + k` of each model."""

    step: Step
    ranges: Mapping[str, tuple[int, int]]

    @property
    def layers(self) -> int:
        """How many layers it makes."""
        first, end = next(iter(self.ranges.values()))
        return end - first


def _resolve(argument: Any, tensor: str, depth: float) -> Any:
    return argument.at(tensor, depth) if isinstance(argument, Value) else argument


def build(block: StepBlock, where: str, notes: list[str]) -> Step:
    """The step of a named block. notes: gets a line for what has no effect."""
    try:
        method = find(block.merge_method)
        if (block.models is None) == (block.slices is None):
            raise UserError(
                "key 'models' is missing; it has no default"
                if block.models is None
                else "'models' and 'slices' both stand; keep one: whole models, or ranges of their layers"
            )
        builder = _Builder(block, method, notes, where)
        if block.slices is None:
            return builder.whole([_entry(entry) for entry in block.models or ()])
        return builder.sliced(block.slices)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _entry(entry: Any) -> ModelEntry:
    if isinstance(entry, str) and entry:
        return ModelEntry.model_validate({"model": entry})
    if not isinstance(entry, Mapping):
        raise UserError(f"models: expected a model's name or `model: NAME`, found {entry!r}")
    return settings(ModelEntry, entry, "models")


@dataclass(frozen=True)
class _Builder:
    """Makes the step of one block."""

    block: StepBlock
    method: Method
    notes: list[str]
    where: str

    def whole(self, entries: Sequence[ModelEntry], part: SliceBlock | None = None) -> Step:
        """The step of whole models, or of one slice."""
        method, block = self.method, self.block
        common = [part.parameters, block.parameters] if part else [block.parameters]
        base_model = (part and part.base_model) or block.base_model
        names = [entry.model for entry in entries]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"model '{twice[0]}' is listed twice; list it once")
        base = None
        if method.base == "required" and base_model is None:
            raise UserError(f"{method.name} needs 'base_model': the model that changes are measured against")
        if method.base != "unused" and base_model is not None:
            base = base_model
            for entry in entries:
                if entry.model == base and entry.parameters:
                    self.check_names(entry.parameters)
                    self.note(f"parameters of the base model '{base}' have no effect")
            entries = [entry for entry in entries if entry.model != base]
        least, most = method.branches
        if len(entries) < least or (most is not None and len(entries) > most):
            up_to = "" if most is None else f" and at most {most}"
            beside = "" if base is None else " beside the base"
            raise UserError(f"{method.name} needs at least {least}{up_to} models{beside}, found {len(entries)}")
        arguments = self.arguments(common, entries)
        branches = tuple(entry.model for entry in entries)
        step = Step(
            str(block.name), method, base, branches, base_model or branches[0], arguments,
            dtype=block.dtype, out_dtype=block.out_dtype,
        )  # fmt: skip
        if method.check and not any(step.values):
            method.check(arguments)
        return step

    def sliced(self, parts: Sequence[SliceBlock]) -> Step:
        """The step whose layers come from slices."""
        slices = []
        for i, part in enumerate(parts):
            try:
                if part.residual_weight is not None:
                    self.note("residual_weight has no effect, as in mergekit")
                step = self.whole(part.sources, part)
                slices.append(Slice(step, _ranges(step, part.sources)))
            except UserError as error:
                raise UserError(f"slices[{i}]: {error}") from None
        first, block = slices[0].step, self.block
        branches = dict.fromkeys(name for part in slices for name in part.step.branches)
        return Step(
            first.name, self.method, first.base, tuple(branches), block.base_model or first.donor, {},
            tuple(slices), block.dtype, block.out_dtype,
        )  # fmt: skip

    def arguments(self, common: Sequence[Mapping[str, Any]], entries: Sequence[ModelEntry]) -> dict[str, Any]:
        """Every parameter's value or values; the level nearest to the model goes first, the default last."""
        method = self.method
        for level in common:
            self.check_names(level)
        for entry in entries:
            self.check_names(entry.parameters)
            for name in entry.parameters:
                own = name in WITHOUT_EFFECT or method.parameter(name).about.per_model
                if not own and method.branches[1] != 1:
                    raise UserError(
                        f"parameter '{name}' of {method.name} is not a model's: move it from '{entry.model}' "
                        "to the step's own 'parameters'"
                    )
        arguments: dict[str, Any] = {}
        for name, parameter in method.parameters.items():
            rules = tuple(rule for level in common for rule in _rules(parameter, level))
            of_models = [
                either(name, (*_rules(parameter, e.parameters), *rules, *_default(parameter))) for e in entries
            ]
            if parameter.about.per_model:
                arguments[name] = tuple(of_models)
            elif method.branches[1] == 1:
                (arguments[name],) = of_models
            else:
                arguments[name] = either(name, (*rules, *_default(parameter)))
            for value, entry in zip(of_models, entries, strict=True):
                if isinstance(value, Value) and not value.rules:
                    of = f" of model '{entry.model}'" if parameter.about.per_model else ""
                    raise UserError(f"{method.name} needs parameter '{name}'{of}; it has no default")
        return arguments

    def check_names(self, parameters: Mapping[str, Any]) -> None:
        """Every key is a parameter of the method, or known to do nothing."""
        for name in parameters:
            if name in WITHOUT_EFFECT:
                _rules(WITHOUT_EFFECT[name], parameters)
                self.note(f"{name} has no effect: {WITHOUT_EFFECT[name].about.text}")
            else:
                self.method.parameter(name)

    def note(self, text: str) -> None:
        """One line for the user, once."""
        line = f"{self.where}: {text}"
        if line not in self.notes:
            self.notes.append(line)


def _default(parameter: Parameter) -> tuple[Rule, ...]:
    return () if parameter.default is inspect.Parameter.empty else (Rule((parameter.default,)),)


def _rules(parameter: Parameter, level: Mapping[str, Any]) -> tuple[Rule, ...]:
    if parameter.name not in level:
        return ()
    given = level[parameter.name]
    if given is None and parameter.default is None:
        return (Rule((None,)),)
    if parameter.about.model:
        return (Rule((checked(parameter.name, given, parameter.check),)),)
    return parse(parameter.name, given, parameter.check, line=parameter.kind is not int)


def _ranges(step: Step, entries: Sequence[LayersEntry]) -> dict[str, tuple[int, int]]:
    """Which layers of each model a slice reads; a model that is not listed is read where all others are."""
    ranges = {entry.model: entry.layer_range for entry in entries}
    for model, (first, end) in ranges.items():
        if not 0 <= first < end:
            raise UserError(f"model '{model}': layer_range [{first}, {end}]: expected [first, end], 0 <= first < end")
    leader, *others = ranges
    for other in others:
        one, more = (ranges[model][1] - ranges[model][0] for model in (leader, other))
        if one != more:
            raise UserError(f"'{leader}' gives {one} layers, '{other}' {more}; all sources of a slice give as many")
    for model in step.reads:
        if model not in ranges:
            if len(set(ranges.values())) > 1:
                raise UserError(f"list '{model}' among the sources: which of its layers are meant is not clear")
            ranges[model] = next(iter(ranges.values()))
    return {model: ranges[model] for model in step.reads}
