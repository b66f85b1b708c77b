"""What a merge method is: a function of one tensor of every model, whose signature is its parameter table.

    @method("scaled", base="required", branches=(1, 1))
    def scaled(t: Tensor, *, lambda_: Annotated[float, About("factor of the change")] = 1.0) -> Merged:
        return t.map(_scaled, lambda_)

    def _scaled(x: Block, lambda_):
        return x.base + lambda_ * deltas(x)[0], None

A method says which passes it makes over the tensor: `rows` and `sums` gather what has to be known beforehand, `map`
gives the result. What a pass computes is a kernel, a pure function of some rows of the tensor, compiled once a
shape; so the same method serves a sharded array (all rows at once) and a file (rows in chunks). A trailing underscore
of a parameter is not part of its recipe name (`lambda_` is `lambda`).
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
    """Some rows of one tensor: what a kernel sees. Arrays are float32 [rows, columns] in the Hugging Face layout (the
    last axis is the row, in_features of a matrix; a vector is one row).

    base: None for a method without one. branches: the other models. models: those that parameters name (`rebase`; of a
    parameter with one for each branch, `name.0`, `name.1`, ...).
    start: uint32 [2], high and low half of the first entry's index in the flattened tensor.

    There may be more rows than the tensor has, 0 in every model: a kernel gives 0 or false there.
    """

    base: Any
    branches: Sequence[Array]
    models: Mapping[str, Array]
    start: Any


Masks = Sequence[Array]
Kernel = Callable[..., Any]


class Merged(NamedTuple):
    """A result in the making: `kernel(block, *numbers, **static)` gives (leaf, kept masks or None if all is kept)."""

    kernel: Kernel
    numbers: Sequence[Any]
    static: Mapping[str, Any]


class Ranked(NamedTuple):
    """As an argument of a pass: `values` gives arrays whose rows are sorted, `places` for each a place in its row for
    every entry (int32), and the pass gets what stands there. numbers: for `places`."""

    values: Kernel
    places: Kernel
    numbers: Sequence[Any] = ()


class Tensor(Protocol):
    """One tensor of every model. A pass takes a kernel, numbers (run-time inputs of the compiled kernel: scalars,
    sequences of them, what `rows`, `masks` and `order_statistics` gave) and keywords (compiled in).

    size: entries. vector: whether it has one dimension at most. branches: how many models beside the base. has_base:
    whether there is one. keys: uint32 [branches, 2] for `random_bits`, fixed by seed, tensor and model. compat:
    'mergekit' where the recipe asks for that tool's arithmetic; rounded_to: the type it then computes in.
    """

    size: int
    vector: bool
    branches: int
    has_base: bool
    keys: np.ndarray
    compat: str | None
    rounded_to: str | None

    def sums(self, kernel: Kernel, *numbers: Any, **static: Any) -> np.ndarray:
        """The sum over all entries of each array that the kernel gives: float64 [K], rows summed in float32."""

    def counts(self, kernel: Kernel, *numbers: Any, **static: Any) -> list[int]:
        """How many entries of each bool array that the kernel gives are true, exactly."""

    def columns(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        """The sum over rows of each array: a number for later passes, float32 [K, 1, columns]."""

    def rows(self, kernel: Kernel, *numbers: Any, reorder: bool = False, **static: Any) -> Any:
        """What the kernel gives for every row, an array [..., rows, 1]: a number for later passes. reorder: its sums
        may be taken in any order, as in all passes that only sum; twice as fast where rows are long."""

    def highest(self, rows: Any, index: int) -> float:
        """The largest of what `rows` gave at `index` of its first axis."""

    def whole(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        """What the kernel gives for all rows at once, [rows, columns]: a number for later passes, which see their rows
        of it. The one pass whose memory grows with the tensor, for what cannot be had in parts."""

    def masks(self, kernel: Kernel, *numbers: Any, **static: Any) -> Any:
        """The bool arrays that the kernel gives: a number for later passes, which see a list."""

    def order_statistics(
        self, kernel: Kernel, ranks: Sequence[Sequence[int]], *numbers: Any, **static: Any
    ) -> list[np.ndarray]:
        """For each array that the kernel gives, its sorted values at `ranks` (0-based), float32, exactly. The kernel
        must not look beyond an entry (use `rows` for that)."""

    def map(self, kernel: Kernel, *numbers: Any, **static: Any) -> Merged:
        """The result: the kernel gives (leaf, kept): for each branch a bool array of the entries it went into."""


@dataclass(frozen=True)
class About:
    """What `--help` says of a parameter. each: one number a model. model: names a model, which `Block.models` holds."""

    text: str
    each: bool = False
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
        """What a recipe may give, in words."""
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
        """`value` as this parameter's type, or a UserError that says what was expected."""
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


@dataclass(frozen=True)
class Method:
    """A registered method.

    base: 'required': branches are scored against it; 'optional': so, where the recipe names one; 'unused': base_model
    only gives config, tokenizer and types, and is merged like any other model where it is listed. branches: least and
    most models beside a base. by_row: a kernel looks at whole rows, so they must not be cut.
    """

    name: str
    passes: Callable[..., Merged]
    base: Literal["required", "optional", "unused"]
    branches: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    summary: str
    check: Callable[[Mapping[str, Any]], None] | None
    by_row: bool

    def parameter(self, name: str) -> Parameter:
        if name not in self.parameters:
            hint = nearest(name, list(self.parameters))
            raise UserError(f"unknown parameter '{name}' of {self.name}{hint}")
        return self.parameters[name]

    def merge(self, tensor: Tensor, arguments: Mapping[str, Any]) -> Merged:
        """The method on one tensor; arguments by recipe name, numbers of `each` parameters as a tuple."""
        # An input that is not finite is an error of the engine's, which names it; not a warning of the arithmetic's.
        with np.errstate(all="ignore"):
            return self.passes(tensor, **{p.argument: arguments[p.name] for p in self.parameters.values()})


METHODS: dict[str, Method] = {}


def find(name: str) -> Method:
    """The method called `name`, or a UserError with the nearest name."""
    if name not in METHODS:
        raise UserError(f"unknown merge_method '{name}'{nearest(name, list(METHODS))}")
    return METHODS[name]


def method(
    name: str,
    *,
    base: Literal["required", "optional", "unused"],
    branches: tuple[int, int | None],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    by_row: bool = False,
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Registers a method.

    `check` sees the parameters of a recipe by name (numbers of `each` parameters as a tuple) and raises UserError.
    """

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        summary = inspect.cleandoc(function.__doc__ or "")
        METHODS[name] = Method(name, function, base, branches, _table(function), summary, check, by_row)
        return function

    return register


def _table(function: Callable[..., Merged]) -> dict[str, Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    rows: dict[str, Parameter] = {}
    for argument, given in inspect.signature(function).parameters.items():
        if given.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[argument]
        if typing.get_origin(hint) is not Annotated:
            raise TypeError(f"{function.__name__}: parameter {argument} needs Annotated[type, About(...)]")
        kind, about = typing.get_args(hint)
        kind = str if about.model else float if about.each else kind
        name = argument.rstrip("_")
        rows[name] = Parameter(name, argument, kind, given.default, about)
    return rows


Numbers = tuple[float, ...]
Weight = Annotated[Numbers, About("factor of the model's change", each=True)]
Scale = Annotated[float, About("factor of the summed change")]
Rebase = Annotated[str | None, About("take each model's change from this model instead of the base", model=True)]


def deltas(x: Block) -> list[Array]:
    """The task vector of each branch: its difference from the base, or from `rebase` where that is given."""
    origin = x.models.get("rebase", x.base)
    return [branch - origin for branch in x.branches]


def add(arrays: Sequence[Array]) -> Array:
    """The sum, in order."""
    return functools.reduce(lambda a, b: a + b, arrays)


def moved(x: Block, factors: Array) -> tuple[Array, None]:
    """The kernel of base + sum(factor * change)."""
    return x.base + add([f * d for f, d in zip(factors, deltas(x), strict=True)]), None


def magnitudes(x: Block) -> list[Array]:
    """|change| of every branch."""
    return [jnp.abs(delta) for delta in deltas(x)]


def random_bits(x: Block, key: Array) -> Array:
    """24 random bits for each entry of a block, as a float32 in [0, 1): a function of the key and the entry's index.

    key: uint32 [2]. Two rounds of a 32-bit mixing function (multiply and xor-shift, constants found by Wellons' hash
    prospector for least bias) over index and key; a fifteenth of the time of the generators of `jax.random`.
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
