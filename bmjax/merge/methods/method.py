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

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np

from bmjax.config import UserError, nearest
from bmjax.merge.lazy import Array, jnp, lax


class Block(NamedTuple):
    """Some rows of one tensor in every model: what a kernel sees.

    Arrays are float32 [rows, columns] in the Hugging Face layout, whose last axis is the row (in_features of a matrix).
    A vector is one row. There may be more rows than the tensor has: they are 0 in every model, and a kernel gives 0 or
    false there.

    base: None for a method without one. branches: the other models. models: those that parameters name, as `rebase`, or
    as `name.0`, `name.1` where a parameter names one a branch. start: index of the first entry in the flattened tensor,
    uint32 [2], high and low half.
    """

    base: Any
    branches: Sequence[Array]
    models: Mapping[str, Array]
    start: Any


Masks = Sequence[Array]
Kernel = Callable[..., Any]
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
        """Return the sum over all entries of each array of the kernel: float64 [K], rows summed in float32.

        Of a bool array it is how many entries are true, exactly.
        """

    def columns(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand:
        """Return the sum over rows of each array of the kernel, float32 [K, 1, columns]."""

    def rows(self, kernel: Kernel, *operands: Any, reorder: bool = False, **static: Any) -> PerRow:
        """Return what the kernel gives for every row, [..., rows, 1].

        reorder: the kernel's sums may be taken in any order. Twice as fast where rows are long.
        """

    def whole(self, kernel: Kernel, *operands: Any, **static: Any) -> PerRow:
        """Return what the kernel gives for all rows at once, [rows, columns].

        The one pass whose memory grows with the tensor, for what cannot be computed in parts.
        """

    def masks(self, kernel: Kernel, *operands: Any, **static: Any) -> Operand:
        """Return the bool arrays that the kernel gives. Later passes see a list."""

    def row_order_statistic(self, values: Kernel, ranks: Kernel, *operands: Any) -> Operand:
        """Return, for each array of `values`, the ranks-th smallest number in its row for every entry.

        ranks: gives as many arrays as `values`, int32, 0-based. operands: of `ranks`.
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
    """One row of a method's parameter table. `argument` is the Python keyword, `kind` the type in a recipe."""

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
        choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and self.about.least <= value <= self.about.most:
            if self.kind is float:
                return float(value)
            if self.kind is int and value == int(value):
                return int(value)
        if (self.kind is bool and isinstance(value, bool)) or (choices and value in choices):
            return value
        if self.kind is str and isinstance(value, str) and value:
            return value
        hint = nearest(value, choices) if choices and isinstance(value, str) else ""
        raise UserError(f"{self.name}: expected {self.expected}, found {value!r}{hint}")


# What every method accepts because other tools' recipes have it; the text says why it has no effect.
WITHOUT_EFFECT = {
    "int8_mask": Parameter("int8_mask", "int8_mask", bool, False, About("masks are never kept in memory whole"))
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

    def merge(self, tensor: Tensor, arguments: Mapping[str, Any]) -> Merged:
        """Make the method's passes over one tensor. arguments: by recipe name, per-model ones as tuples."""
        # An input that is not finite is an error of the engine's, which names it; not a warning of the arithmetic's.
        with np.errstate(all="ignore"):
            return self.function(tensor, **{p.argument: arguments[p.name] for p in self.parameters.values()})


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


def deltas(x: Block) -> list[Array]:
    """Return the task vector of each branch: its difference from the base, or from `rebase` where a recipe has that."""
    origin = x.models.get("rebase", x.base)
    return [branch - origin for branch in x.branches]


def add(arrays: Sequence[Array]) -> Array:
    """Return the sum, taken in order."""
    return functools.reduce(lambda a, b: a + b, arrays)


def moved(x: Block, factors: Array) -> tuple[Array, None]:
    """Compute base + sum(factor * change). A kernel."""
    return x.base + add([f * d for f, d in zip(factors, deltas(x), strict=True)]), None


def magnitudes(x: Block) -> list[Array]:
    """Return |change| of every branch."""
    return [jnp.abs(delta) for delta in deltas(x)]


def random_bits(x: Block, key: Array) -> Array:
    """Return 24 random bits for each entry of a block, as a float32 in [0, 1): a hash of the key and the entry's index.

    key: uint32 [2]. Two rounds of a 32-bit mixing function over index and key: multiply and xor-shift, with constants
    that Wellons' hash prospector found to have least bias. It takes a fifteenth of the time of `jax.random`.
    """
    rows, columns = x.branches[0].shape
    local = lax.broadcasted_iota(jnp.uint32, (rows, columns), 0) * jnp.uint32(columns)
    local = local + lax.broadcasted_iota(jnp.uint32, (rows, columns), 1)
    low = x.start[1] + local
    high = x.start[0] + (low < local).astype(jnp.uint32)
    bits = _mix(_mix(low ^ key[0]) + _mix(high ^ key[1]))
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
