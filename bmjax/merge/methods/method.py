"""What a merge method is: a pure leaf function whose signature is its parameter table.

    @method("scaled", base="required", branches=(1, 1))
    def scaled(base, branches, *, lambda_: Annotated[float, About("factor of the change")] = 1.0) -> Merged: ...

`base` and every branch arrive as float32 arrays of one shape, at least one dimension, in the Hugging Face layout: the
last axis is the row (in_features of a matrix). With `jit=False` they come as they are stored: for a method of several
jitted parts, one compiled part serving all its forms, which casts them there and saves copies. A trailing underscore
of a parameter is not part of its recipe name (`lambda_` is `lambda`).
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bmjax.config import UserError, nearest


class Merged(NamedTuple):
    """A merged tensor, float32, and per branch the share of the tensor's entries its change went into, [branches]."""

    leaf: jax.Array
    kept: jax.Array


@dataclass(frozen=True)
class About:
    """What `--help` says of a parameter. each: one number a model. model: names a model, the method gets its tensor."""

    text: str
    each: bool = False
    model: bool = False


@dataclass(frozen=True)
class Parameter:
    """One row of a method's parameter table. `argument` is the Python keyword, `kind` the type in a recipe."""

    name: str
    argument: str
    kind: Any
    default: Any
    about: About

    @property
    def traced(self) -> bool:
        """Numbers are run-time inputs of the compiled merge; switches and choices are compiled in."""
        return self.kind is float

    @property
    def expected(self) -> str:
        if typing.get_origin(self.kind) is Literal:
            return " or ".join(typing.get_args(self.kind))
        return "a model" if self.about.model else {float: "a number", bool: "true or false"}[self.kind]

    def check(self, value: Any) -> Any:
        """`value` as this parameter's type, or a UserError that says what was expected."""
        choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if self.kind is float and number:
            return float(value)
        if (self.kind is bool and isinstance(value, bool)) or (choices and value in choices):
            return value
        if self.kind is str and isinstance(value, str) and value:
            return value
        hint = nearest(value, choices) if choices and isinstance(value, str) else ""
        raise UserError(f"{self.name}: expected {self.expected}, found {value!r}{hint}")


@dataclass(frozen=True)
class Method:
    """A registered method.

    base: 'required': branches are scored against it; 'unused': base_model only gives config, tokenizer and types,
    and is merged like any other model where it is listed. branches: least and most models beside a required base.
    """

    name: str
    leaf: Callable[..., Merged]
    base: Literal["required", "unused"]
    branches: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    summary: str
    check: Callable[[Mapping[str, Any]], None] | None

    def parameter(self, name: str) -> Parameter:
        if name not in self.parameters:
            hint = nearest(name, list(self.parameters))
            raise UserError(f"unknown parameter '{name}' of {self.name}{hint}")
        return self.parameters[name]


METHODS: dict[str, Method] = {}


def find(name: str) -> Method:
    """The method called `name`, or a UserError with the nearest name."""
    if name not in METHODS:
        raise UserError(f"unknown merge_method '{name}'{nearest(name, list(METHODS))}")
    return METHODS[name]


def method(
    name: str,
    *,
    base: Literal["required", "unused"],
    branches: tuple[int, int | None],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    jit: bool = True,
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Registers a leaf function and returns it jitted, with its array arguments cast to float32.

    `check` sees the parameters of a recipe by name (numbers of `each` parameters as a tuple) and raises UserError.
    """

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        table = _table(function)
        cast = float32 if jit else jnp.atleast_1d
        static = [p.argument for p in table.values() if not p.traced and not p.about.model]

        @functools.wraps(function)
        def leaf(base: jax.Array | None, branches: Sequence[jax.Array], **arguments: Any) -> Merged:
            shape = jnp.shape(branches[0])
            for p in table.values():
                if p.about.each:
                    value = arguments.get(p.argument, p.default)
                    arguments[p.argument] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), (len(branches),))
                elif p.about.model and arguments.get(p.argument) is not None:
                    arguments[p.argument] = cast(arguments[p.argument])
            merged = function(None if base is None else cast(base), [cast(b) for b in branches], **arguments)
            return Merged(merged.leaf.reshape(shape), merged.kept)

        compiled = jax.jit(leaf, static_argnames=static) if jit else leaf
        summary = inspect.cleandoc(function.__doc__ or "")
        METHODS[name] = Method(name, compiled, base, branches, table, summary, check)
        return compiled

    return register


def float32(x: jax.Array) -> jax.Array:
    """`x` as a method computes with it."""
    return jnp.atleast_1d(jnp.asarray(x).astype(jnp.float32))


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
        kind = float if about.each else str if about.model else kind
        name = argument.rstrip("_")
        rows[name] = Parameter(name, argument, kind, given.default, about)
    return rows


def changes(base: jax.Array, branches: Sequence[jax.Array], rebase: jax.Array | None) -> list[jax.Array]:
    """The task vector of each branch: its difference from the base, or from `rebase` where that is given."""
    origin = float32(base if rebase is None else rebase)
    return [float32(branch) - origin for branch in branches]


def dense(leaf: jax.Array, branches: Sequence[jax.Array]) -> Merged:
    """The result of a method that takes every entry of every branch."""
    return Merged(leaf, jnp.ones(len(branches), jnp.float32))
