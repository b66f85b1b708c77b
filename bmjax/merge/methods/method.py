"""What a merge method is: a function of one tensor of every model, whose signature is its parameter table.

    @method("scaled", base="required", branches=(1, 1))
    def scaled(t: Tensor, *, lambda_: Annotated[float, About("factor of the change")] = 1.0) -> Merged:
        return t.map(_scaled, lambda_)

    def _scaled(x: Block, lambda_):
        return x.base + lambda_ * deltas(x)[0], None

A method says which passes it makes over the tensor: `rows` and `sums` gather what has to be known beforehand, `map`
gives the result. What a pass computes is a kernel, a pure function of some rows of the tensor, compiled once a
shape. So the same method serves a sharded array (all rows at once) and a file (rows in chunks). A method must not read
files or hold arrays of its own: engines do.

A trailing underscore of a parameter is not part of its recipe name: `lambda_` is `lambda`. The default of a per-model
parameter is a tuple of one, the value for every model: `weight: Weight = (1.0,)`.
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np

from bmjax.config import UserError, nearest
from bmjax.merge.methods.kernels import Block, Kernel

# A run-time input of kernels that is more than numbers: passes of a `Tensor` return it, later passes take it. Called
# with a block and the rows of the tensor that the block holds, it gives what a kernel gets.
Operand = Callable[[Block, Any], Any]


@dataclass(frozen=True)
class PerRow:
    """An operand: an array [..., rows of the tensor, n], of which a kernel gets the rows of its block."""

    array: Any

    def __call__(self, x: Block, rows: Any) -> Any:
        return rows.of(self.array)


class Merged(NamedTuple):
    """A result still to be computed: `kernel(block, *operands, **static)` gives (leaf, masks).

    A mask says, for each branch, into which entries it went; None in their stead means all.
    """

    kernel: Kernel
    operands: Sequence[Any]
    static: Mapping[str, Any]


class Tensor(Protocol):
    """One tensor of every model, as a method sees it.

    A pass takes a kernel, operands (numbers, sequences of numbers, `Operand`s) and keywords. Operands are inputs of the
    compiled kernel, keywords are compiled in.

    size: entries. vector: whether it has one dimension at most. branches: how many models beside the base. has_base:
    whether there is one. keys: for `random_bits`, uint32 [branches, 2], fixed by seed, tensor and model. compat:
    'mergekit' where the recipe asks for that tool's arithmetic. rounded_to: the type it then computes in.
    """

    size: int
    vector: bool
    branches: int
    has_base: bool
    keys: Operand
    compat: str | None
    rounded_to: str | None

    def sums(self, kernel: Kernel, *operands: Any, **static: Any) -> np.ndarray:
        """Return the sum of each array of the kernel: float64 [K], rows summed in float32. Bools are counted."""

    def columns(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand:
        """Return the sum over rows of each array of the kernel, float32 [K, 1, columns]."""

    def rows(self, kernel: Kernel, *operands: Any, quick: Kernel | None = None, **static: Any) -> PerRow:
        """Return what the kernel gives for every row, [K, rows, 1].

        quick: a kernel without keywords that gives the same, and one array more. Rows at which that is 0 get the quick
        kernel's values, and the kernel is called for the others alone. Its sums may be taken in any order.
        """

    def whole(self, kernel: Kernel, *operands: Any, **static: Any) -> PerRow:
        """Return what the kernel gives for all rows at once, [rows, columns]. Memory grows with the tensor."""

    def masks_by_rank(self, values: Kernel, ranks: Kernel, *operands: Any) -> Operand:
        """Return for each array of `values` the mask of entries whose rank in their row is at least what `ranks` gives.

        An entry's rank is how many of its row are smaller. Entries that are 0 are never kept. Later passes see a list.

        values: numbers of at least 0. ranks: gives as many arrays, int32, from 0 to the row's length, which no entry
        reaches. operands: of `ranks`.
        """

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *operands: Any, **static: Any
    ) -> list[np.ndarray]:
        """Return, for each array of the kernel, its sorted values at `ranks` (0-based), float32, exactly.

        The kernel must not look beyond an entry: use `rows` for that.
        """

    def map(self, kernel: Kernel, *operands: Any, **static: Any) -> Merged:
        """Return the result, see `Merged`."""


@dataclass(frozen=True)
class About:
    """What `--help` says of a parameter. per_model: one value a model. model: names a model, see `Block.models`."""

    text: str
    per_model: bool = False
    model: bool = False
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Parameter:
    """A row of a method's parameter table. `argument` is the Python keyword, `kind` the type in a recipe."""

    name: str
    argument: str
    kind: Any
    default: Any
    about: About

    @property
    def expected(self) -> str:
        """Say in words what a recipe may give."""
        if typing.get_origin(self.kind) is Literal:
            return " or ".join(typing.get_args(self.kind))
        if self.about.model:
            return "a model"
        words = {float: "a number", int: "a whole number", bool: "true or false"}[self.kind]
        least, most = self.about.least, self.about.most
        if math.isfinite(least) and math.isfinite(most):
            return f"{words} from {least:g} to {most:g}"
        return words if math.isinf(least) else f"{words}, at least {least:g}"

    def check(self, value: Any) -> Any:
        """Return `value` as this parameter's type. Raises UserError that says what was expected."""
        if self.kind is bool and isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)  # as mergekit, whose parameters are all numbers
        choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        if self.kind in (float, int) and isinstance(value, (int, float)) and not isinstance(value, bool):
            in_range = math.isfinite(value) and self.about.least <= value <= self.about.most
            if in_range and (self.kind is float or value == int(value)):
                return self.kind(value)
        elif value in choices or (self.kind in (bool, str) and isinstance(value, self.kind) and value != ""):
            return value
        hint = nearest(value, choices) if choices and isinstance(value, str) else ""
        raise UserError(f"{self.name}: expected {self.expected}, found {value!r}{hint}")


# What every method accepts because other tools' recipes have it; the text says why it has no effect.
WITHOUT_EFFECT = {
    name: Parameter(name, name, bool, False, About(reason))
    for name, reason in {
        "int8_mask": "masks are never kept in memory whole",
        "embed_slerp": "embeddings are merged like all other tensors",
    }.items()
}


@dataclass(frozen=True)
class Method:
    """A registered method.

    base: 'required': branches are scored against it. 'optional': so, where the recipe names one. 'unused': base_model
    only gives config, tokenizer and types, and is merged like any other model where it is listed. branches: least and
    most models beside a base. check: gets the parameters of a recipe by name, per-model ones as tuples, and raises
    UserError where they do not fit together. by_row: a kernel looks at whole rows, so they must not be cut.
    """

    name: str
    function: Callable[..., Merged]
    base: Literal["required", "optional", "unused"]
    branches: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    summary: str
    check: Callable[[Mapping[str, Any]], None] | None
    by_row: bool

    def parameter(self, name: str) -> Parameter:
        """Return a parameter by its recipe name. Raises UserError with the nearest name."""
        if name not in self.parameters:
            hint = nearest(name, [*self.parameters, *WITHOUT_EFFECT])
            raise UserError(f"unknown parameter '{name}' of {self.name}{hint}")
        return self.parameters[name]


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    base: Literal["required", "optional", "unused"],
    branches: tuple[int, int | None],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    by_row: bool = False,
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Register the decorated function as a method. Arguments: see `Method`."""

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        summary = inspect.cleandoc(function.__doc__ or "")
        METHODS[name] = Method(name, function, base, branches, parameters_of(function), summary, check, by_row)
        return function

    return register


def parameters_of(function: Callable[..., Merged]) -> dict[str, Parameter]:
    """Return the parameter table that a function's keyword-only arguments declare, by recipe name."""
    hints = typing.get_type_hints(function, include_extras=True)
    table: dict[str, Parameter] = {}
    for argument, declared in inspect.signature(function).parameters.items():
        if declared.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, default = hints[argument], declared.default
        if typing.get_origin(hint) is not Annotated:
            raise TypeError(f"{function.__name__}: parameter {argument} needs Annotated[type, About(...)]")
        kind, about = typing.get_args(hint)
        if about.per_model and default is not inspect.Parameter.empty:
            (default,) = default
        kind = str if about.model else float if about.per_model else kind
        name = argument.rstrip("_")
        table[name] = Parameter(name, argument, kind, default, about)
    return table


PerModel = tuple[float, ...]
Weight = Annotated[PerModel, About("factor of the model's change", per_model=True)]
Scale = Annotated[float, About("factor of the summed change")]
Rebase = Annotated[str | None, About("take each model's change from this model instead of the base", model=True)]
