"""One block of a recipe as a checked, frozen step: its models, its layers, its parameters from all levels."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmjax.chat.columns import columns_of
from bmjax.config import UserError, nearest
from bmjax.merge.methods import METHODS, Method
from bmjax.merge.methods.method import WITHOUT_EFFECT, Parameter
from bmjax.merge.recipe import remarks
from bmjax.merge.recipe.calibration import CALIBRATED, DEFAULTS, CalibrationSettings
from bmjax.merge.recipe.model_names import plain_name
from bmjax.merge.recipe.slices import check_lengths, layer_ranges
from bmjax.merge.recipe.values import Rule, Value, checked, parse, simplify
from bmjax.merge.recipe.yaml_blocks import ModelEntry, SliceBlock, StepBlock, validate


@dataclass(frozen=True)
class Step:
    """A checked merge. Models are names: of earlier steps, aliases or directories."""

    name: str
    method: Method
    base: str | None  # None for a method that measures against none
    branches: tuple[str, ...]  # with slices, those of all slices
    donor: str  # the model whose config, tokenizer and storage types the result takes
    # Every parameter of the method by its recipe name, per-model ones as tuples in branch order; a `Value` where it
    # depends on the tensor, see `at`. Empty with slices, whose steps have them.
    arguments: Mapping[str, Any]
    slices: tuple["Slice", ...] = ()  # the layers of the result where they are not simply its models'
    keep: tuple[Rule, ...] = ()  # fit the tensors that are left as the donor has them
    dtype: str | None = None  # as written, for `compat: mergekit`
    calibration: CalibrationSettings | None = None  # of a method that looks at data
    data: tuple[str | list[str], ...] = ()  # each branch's rows, for such a method
    columns: tuple[Mapping[str, str], ...] = ()  # each branch's templates for rows of other columns, beside `data`
    held_out_data: tuple[str | list[str] | None, ...] = ()  # each branch's rows to judge by, None: some of `data`

    @property
    def models(self) -> Iterator[str]:
        """Every model that this step names, the donor first."""
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
    def files_of_rows(self) -> list[str]:
        """The names of all rows that it reads."""
        sources = [rows for rows in (*self.data, *self.held_out_data) if rows is not None]
        return [name for rows in sources for name in ([rows] if isinstance(rows, str) else rows)]

    @property
    def named(self) -> dict[str, str]:
        """The models that parameters name, by what the method calls them: `rebase`, `importance.0`."""
        models: dict[str, str] = {}
        for parameter in self.method.parameters.values():
            value = self.arguments.get(parameter.name) if parameter.about.model else None
            if isinstance(value, tuple):
                models |= {f"{parameter.name}.{i}": name for i, name in enumerate(value)}
            elif value is not None:
                models[parameter.name] = value
        return models

    @property
    def values(self) -> Iterator[tuple[str | None, Value]]:
        """(branch, or None for a parameter of the whole step; value) of all that depends on the tensor."""
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                yield None, argument
            elif isinstance(argument, tuple):
                yield from ((b, a) for b, a in zip(self.branches, argument, strict=True) if isinstance(a, Value))

    def kept(self) -> "Step":
        """Return the step that leaves a tensor as the donor has it."""
        copy = METHODS["passthrough"]
        scale = {parameter.name: (parameter.default,) for parameter in copy.parameters.values()}
        return replace(self, method=copy, base=None, branches=(self.donor,), arguments=scale)

    def keeps(self, tensor: str) -> bool:
        """Return whether the recipe leaves a tensor of the result as the donor has it."""
        return any(rule.fits(tensor) for rule in self.keep)

    def at(self, tensor: str, depth: float, names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the arguments for one tensor of the result. UserError when no filter fits, or the method refuses them.

        depth: 0 to 1, see `bmjax.merge.plan.tensor_names.depth`. names: the tensor's name in each model that has
        another one there, which the filters of per-model parameters see.
        """

        def resolve(argument: Any, name: str) -> Any:
            return argument.at(name, depth) if isinstance(argument, Value) else argument

        branch_names = [(names or {}).get(branch, tensor) for branch in self.branches]
        resolved = {
            parameter: tuple(map(resolve, argument, branch_names))
            if isinstance(argument, tuple)
            else resolve(argument, tensor)
            for parameter, argument in self.arguments.items()
        }
        if self.method.check and any(self.values):
            try:
                self.method.check(resolved)
            except UserError as error:
                weights = resolved.get("weight")
                is_idle = isinstance(weights, tuple) and not any(weights)
                hint = f"; `keep: [PART OF ITS NAME]` leaves it as '{self.donor}' has it" if is_idle else ""
                raise UserError(f"step '{self.name}': tensor '{tensor}': {error}{hint}") from None
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


def build_step(block: StepBlock, location: str, notes: list[str], compat: str | None = None) -> Step:
    """Build the step of a named block.

    location: of the block, for errors and notes. notes: gets a line for what has no effect. compat: the recipe's.
    """
    try:
        known = {**METHODS, **CALIBRATED}
        if block.merge_method not in known:
            raise UserError(
                f"unknown merge_method '{block.merge_method}'{nearest(block.merge_method.lower(), list(known))}"
            )
        builder = _StepBuilder(block, known[block.merge_method], location, notes, compat)
        if block.models is not None and block.slices is not None:
            raise UserError("'models' and 'slices' both stand; keep one: whole models, or ranges of their layers")
        if block.slices is not None:
            return builder.from_slices(block.slices)
        if block.models is None:
            raise UserError("key 'models' is missing; it has no default")
        return builder.from_models([_entry(entry) for entry in block.models])
    except UserError as error:
        raise UserError(f"{location}: {error}") from None


def _entry(entry: Any) -> ModelEntry:
    if entry is not None and not isinstance(entry, (Mapping, list)) and entry != "":
        entry = {"model": entry}
    if not isinstance(entry, Mapping):
        raise UserError(f"models: expected a model's name or `model: NAME`, found {entry!r}")
    return validate(ModelEntry, entry, "models")


# What mergekit's methods of the same names lack.
_OWN_PARAMETERS = {"karcher": ("weight",), "model_stock": ("weight",)}


@dataclass(frozen=True)
class _StepBuilder:
    block: StepBlock
    method: Method
    location: str
    notes: list[str]
    compat: str | None = None

    def from_models(self, entries: Sequence[ModelEntry], part: SliceBlock | None = None) -> Step:
        """Build the step of whole models, or of one slice."""
        method, block = self.method, self.block
        base_model = (part and part.base_model) or block.base_model
        # Which of the models listed are branches, and whether they are as many as the method takes.
        if repeated := [name for name, count in Counter(entry.model for entry in entries).items() if count > 1]:
            other_layers = "" if part is None else ", or give it a second name under 'sources' to merge its own layers"
            raise UserError(f"model '{repeated[0]}' is listed twice; list it once{other_layers}")
        if method.base == "required" and base_model is None:
            raise UserError(f"{method.name} needs 'base_model': the model that changes are measured against")
        base = None if method.base == "unused" else base_model
        if part is None and base_model is not None and base is None and method.branches[1] != 1:
            entries = self.with_base(entries, base_model)
        for entry in entries:
            if entry.data is not None and entry.model == base:
                raise UserError(f"model '{base}' is the base_model, which needs no 'data'; remove it from 'models'")
            if entry.data is not None and method.name not in CALIBRATED:
                raise UserError(
                    f"model '{entry.model}' has 'data', which {method.name} does not read; remove it, or choose "
                    f"{' or '.join(CALIBRATED)}"
                )
            if entry.model == base and entry.parameters:
                self.check_names(entry.parameters)
                self.note(f"parameters of the base model '{base}' have no effect")
        if part is not None and len(entries) == 1 and method.base != "unused":
            return self.copied(entries[0], base_model, part)
        listed, entries = len(entries), [entry for entry in entries if base is None or entry.model != base]
        least, most = method.branches
        if len(entries) < least or (most is not None and len(entries) > most):
            needed = f"{least}" if least == most else f"at least {least}" + (f" and at most {most}" if most else "")
            beside = "" if base is None else " beside the base"
            itself = f" ('{base}', which is listed, is the base itself)" if listed > len(entries) else ""
            raise UserError(
                f"{method.name} needs {needed} model{'s' * ((most or least) > 1)}{beside}, found {len(entries)}{itself}"
            )
        # What the method is told.
        branches = tuple(entry.model for entry in entries)
        keep = parse("keep", [_kept(entry) for entry in block.keep], bool) if block.keep else ()
        dtype = None if block.dtype == "auto" else block.dtype
        step = Step(block.name or "", method, base, branches, base_model or branches[0], {}, (), keep, dtype)
        if method.name in CALIBRATED:
            if keep:
                raise UserError(f"{method.name} merges all tensors: remove 'keep'")
            calibration, data = self.calibration(entries)
            columns = tuple(columns_of(entry) for entry in entries)
            held_out = tuple(entry.held_out_data for entry in entries)
            return replace(step, calibration=calibration, data=data, columns=columns, held_out_data=held_out)
        levels = [part.parameters, block.parameters] if part else [block.parameters]
        if method.name == "slerp" and not any("t" in level for level in [*levels, entries[0].parameters]):
            self.note(f"slerp has no `t`: it takes {method.parameter('t').default}, halfway between the models")
        step = replace(step, arguments=self.arguments(levels, entries))
        if method.check and not any(step.values):
            method.check(step.arguments)
        return step

    def copied(self, entry: ModelEntry, base_model: str | None, part: SliceBlock) -> Step:
        """Return the step of a slice that lists one model: its layers as they are."""
        for level in (part.parameters, self.block.parameters, entry.parameters):
            self.check_names(level)
        if base_model not in (None, entry.model):
            self.note(remarks.lone_model_remark(entry.model, base_model))
        keep = parse("keep", [_kept(part) for part in self.block.keep], bool) if self.block.keep else ()
        step = Step(self.block.name or "", self.method, None, (), base_model or entry.model, {}, (), keep)
        return replace(step.kept(), branches=(entry.model,))

    def with_base(self, entries: Sequence[ModelEntry], base: str) -> Sequence[ModelEntry]:
        """Return the models of a method without a base, and where the recipe asks for it the base, as mergekit does."""
        if any(entry.model == base for entry in entries):
            return entries
        # Of linear it wants a weight of every model, so one for all.
        is_added, name = self.method.name == "karcher" or "weight" in self.block.parameters, self.method.name
        if self.compat == "mergekit" and is_added:
            self.note(f"base_model '{base}' is merged, too, with `compat: mergekit`, though it is not among the models")
            return [ModelEntry(model=base), *entries]
        self.note(remarks.unlisted_base_remark(name, base, is_added and self.compat is None))
        return entries

    def from_slices(self, parts: Sequence[SliceBlock]) -> Step:
        """Build the step whose layers come from slices."""
        if self.method.name in CALIBRATED:
            raise UserError(f"{self.method.name} merges whole models: list them under 'models' instead of 'slices'")
        slices = []
        for i, part in enumerate(parts):
            try:
                if part.residual_weight is not None:
                    self.note("residual_weight has no effect, as in mergekit")
                step = self.from_models(part.sources, part)
                slices.append(Slice(step, layer_ranges(step.reads, part.sources)))
            except UserError as error:
                raise UserError(f"slices[{i}]: {error}") from None
        check_lengths([part.layers for part in slices])
        first = slices[0].step
        branches = tuple(dict.fromkeys(name for part in slices for name in part.step.branches))
        base = next((part.step.base for part in slices if part.step.base is not None), None)
        donor = self.block.base_model or first.donor
        whole = replace(first, method=self.method, base=base, branches=branches, donor=donor)
        return replace(whole, arguments={}, slices=tuple(slices))

    def calibration(self, entries: Sequence[ModelEntry]) -> tuple[CalibrationSettings, tuple[str | list[str], ...]]:
        """Return the settings of a method that looks at data, and the rows of every branch."""
        name, known = self.method.name, list(CalibrationSettings.model_fields)
        for parameter in [*self.block.parameters, *(p for entry in entries for p in entry.parameters)]:
            if parameter not in known and not self.has_no_effect(parameter):
                raise UserError(f"unknown parameter '{parameter}' of {name}{nearest(str(parameter), known)}")
        data = []
        for entry in entries:
            for parameter in entry.parameters:
                if parameter in known:
                    raise UserError(
                        f"parameter '{parameter}' of {name} is not a model's: move it from '{entry.model}' to the "
                        "step's own 'parameters'"
                    )
            if entry.data is None:
                raise UserError(
                    f"model '{entry.model}' has no 'data': {name} needs rows of every model's domain; "
                    f"write {{model: {entry.model}, data: FILE}}"
                )
            data.append(entry.data)
        try:
            settings = {key: value for key, value in self.block.parameters.items() if key in known}
            return CalibrationSettings.read({**DEFAULTS[name], **settings}), tuple(data)
        except UserError as error:
            raise UserError(str(error).removeprefix("settings: ")) from None

    def arguments(self, levels: Sequence[Mapping[str, Any]], entries: Sequence[ModelEntry]) -> dict[str, Any]:
        """Return every parameter's value or values; the level nearest to the model goes first, the default last."""
        method = self.method
        for level in levels:
            self.check_names(level)
        for entry in entries:
            self.check_names(entry.parameters)
            for name in entry.parameters:
                of_the_step = name in method.parameters and not method.parameter(name).about.per_model
                if of_the_step and method.branches[1] != 1:
                    self.note(
                        f"{name} of model '{entry.model}' has no effect, as in mergekit: it is not a model's; move it "
                        "to the step's own 'parameters' if it is meant"
                    )
        if idle := self.idle_as_mergekit(levels, entries):
            levels = [{key: value for key, value in level.items() if key not in idle} for level in levels]
            entries = [entry.model_copy(update={"parameters": {k: v for k, v in entry.parameters.items()
                                                               if k not in idle}}) for entry in entries]  # fmt: skip
        arguments: dict[str, Any] = {}
        for name, parameter in method.parameters.items():
            if parameter.about.per_model and len(entries) > 1:
                self.note(*filter(None, (remarks.depth_remark(name, level.get(name)) for level in levels)))
            # The rules of the step, and of each model its own; what shadows what is told.
            common: list[Rule] = []
            for level in levels:
                common += (rules := _rules(parameter, level))
                self.note(*remarks.shadow_remarks(name, rules))
            entry_rules = [_rules(parameter, entry.parameters) for entry in entries]
            is_a_models = parameter.about.per_model or method.branches[1] == 1
            for entry, rules in zip(entries, entry_rules, strict=True) if is_a_models else ():
                of_model = f"{name} of model '{entry.model}'" if rules else name
                self.note(*remarks.shadow_remarks(of_model, rules))
                if parameter.default is not inspect.Parameter.empty:
                    self.note(*remarks.remainder_remarks(of_model, (*rules, *common), parameter.default))
            if parameter.default is not inspect.Parameter.empty:
                if not is_a_models:
                    self.note(*remarks.remainder_remarks(name, common, parameter.default))
                common.append(Rule((parameter.default,)))
            per_model = [simplify(name, (*rules, *common)) for rules in entry_rules]
            if parameter.about.per_model:
                arguments[name] = tuple(per_model)
            else:
                arguments[name] = per_model[0] if method.branches[1] == 1 else simplify(name, tuple(common))
            for value, entry in zip(per_model, entries, strict=True):
                if isinstance(value, Value) and not value.rules:
                    of = f" of model '{entry.model}'" if parameter.about.per_model else ""
                    raise UserError(f"{method.name} needs parameter '{name}'{of}; it has no default")
        return arguments

    def check_names(self, parameters: Mapping[str, Any]) -> None:
        """Raise a UserError for a key that is neither a parameter of the method nor known to have no effect."""
        for name in parameters:
            if name in WITHOUT_EFFECT:
                _rules(WITHOUT_EFFECT[name], parameters)
            if not self.has_no_effect(name):
                self.method.parameter(name)

    def has_no_effect(self, name: str) -> bool:
        """Return whether other tools or other methods have a parameter that this method lacks; note it, if so."""
        if name in self.method.parameters:
            return False
        others = [other.name for other in METHODS.values() if name in other.parameters]
        if name in WITHOUT_EFFECT:
            self.note(f"{name} has no effect: {WITHOUT_EFFECT[name].about.text}")
        elif others:
            more = " and others" if len(others) > 3 else ""
            self.note(
                f"{name} has no effect: it is no parameter of {self.method.name}, but of {', '.join(others[:3])}{more}"
            )
        return name in WITHOUT_EFFECT or bool(others)

    def idle_as_mergekit(self, levels: Sequence[Mapping[str, Any]], entries: Sequence[ModelEntry]) -> set[str]:
        """Return the parameters that mergekit's method of the name would pass over, where the recipe asks for that."""
        given = {name for level in [*levels, *(entry.parameters for entry in entries)] for name in level}
        idle = given & set(_OWN_PARAMETERS.get(self.method.name, ())) if self.compat == "mergekit" else set()
        for name in sorted(idle):
            self.note(f"{name} has no effect with `compat: mergekit`: its {self.method.name} has none")
        return idle

    def note(self, *texts: str) -> None:
        for line in (f"{self.location}: {text}" for text in texts):
            if line not in self.notes:
                self.notes.append(line)


def _kept(entry: Any) -> dict[str, Any]:
    """Return an entry of `keep:`, a part of tensor names or a filter, as a filter with a value."""
    return {**(entry if isinstance(entry, Mapping) else {"filter": entry}), "value": True}


def _rules(parameter: Parameter, level: Mapping[str, Any]) -> tuple[Rule, ...]:
    if parameter.name not in level:
        return ()
    value = level[parameter.name]
    if value is None and parameter.default is None:
        return (Rule((None,)),)
    if parameter.about.model:
        return (Rule((checked(parameter.name, _model(parameter.name, value), parameter.check),)),)
    return parse(parameter.name, value, parameter.check, line=parameter.kind is not int)


def _model(parameter: str, value: Any) -> Any:
    """Return the name of the model that a parameter's value means."""
    try:
        return plain_name(value)
    except ValueError as error:
        raise UserError(f"{parameter}: {error}") from None
