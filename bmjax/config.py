"""The base of all settings: frozen pydantic models read from YAML plus `key.sub=value` overrides.

Every phase declares its settings next to the code that reads them. This module reads them, words what a user got wrong
and lists all keys for `--help`. It is also the door to errors.py and safe_yaml.py.
"""

import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticUndefined

from bmjax.errors import MAX_WORD, UserError, first_line, nearest, shortened
from bmjax.safe_yaml import aliased_keys, is_text, parse_yaml_documents, read_text, read_yaml, read_yaml_documents
from bmjax.urls import url_problem

__all__ = [
    "Settings", "UserError", "aliased_keys", "describe", "first_line", "first_problem", "is_text",
    "nearest", "parse_yaml_documents", "read_text", "read_yaml", "read_yaml_documents", "shortened",
    "type_name", "with_overrides",
]  # fmt: skip


# Keys that hold paths of files that bmjax reads or writes itself, on this machine or in a bucket.
_PATH_KEYS = {
    "output", "student", "data", "model", "traces", "problems", "questions", "held_out", "held_out_data", "sources",
    "train",
}  # fmt: skip


class Settings(BaseModel):
    """Frozen settings: an unknown key is refused with the nearest known one, a wrong type with the key's name."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=False, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        aliases = [field.validation_alias for field in cls.model_fields.values()]
        synonyms = [alias.choices for alias in aliases if isinstance(alias, AliasChoices)]
        known = {*cls.model_fields, *itertools.chain(*synonyms)}
        for key in values if isinstance(values, Mapping) else ():
            if isinstance(key, str) and key not in known:
                hint = nearest(key, list(cls.model_fields))
                raise PydanticCustomError("unknown_key", "unknown key", {"key": key, "hint": hint})
        for names in synonyms:
            both = [str(name) for name in names if isinstance(values, Mapping) and name in values]
            if len(both) > 1:
                raise ValueError(f"{' and '.join(both)} are names of one key; give one of them")
        return values

    @model_validator(mode="after")
    def _schemes_are_known(self) -> Self:
        for key in _PATH_KEYS & {*type(self).model_fields}:
            value = getattr(self, key)
            for path in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(path, str) and (problem := url_problem(path)):
                    raise ValueError(f"{key}: '{path}': {problem}")
        return self

    @field_validator("*", mode="wrap")
    @classmethod
    def _true_is_no_number(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        """Refuse `steps: true`, which pydantic would read as 1."""
        result = validate(value)
        if isinstance(value, bool) and not isinstance(result, bool):
            raise PydanticCustomError("int_type" if isinstance(result, int) else "float_type", "not a number")
        return result

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Return the settings in a YAML file or a mapping, after the `key.sub=value` overrides in order.

        Raises UserError, one line, for a missing file, bad YAML, an unknown key or a value of the wrong type.
        """
        name, values = ("settings", source) if isinstance(source, Mapping) else (str(source), read_yaml(source))
        if not isinstance(values, Mapping):
            raise UserError(f"{name}: expected `key: value` lines at the top, found {_value_text(values)}")
        values = with_overrides(cls, values, overrides)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{name}: {first_problem(values, error)}") from None


def with_overrides(cls: type[Settings], values: Any, overrides: Sequence[str]) -> Any:
    """Return the values of a config after the `key.sub=value` overrides in order; UserError for another form.

    `key.0.sub=value` is of the first entry of a list.
    """
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip() or not is_text(key):
            raise UserError(f"'{override[:MAX_WORD]}': expected key=value or key.sub=value")
        keys = key.strip().split(".")
        if text.startswith("{") and _takes_text(cls, keys):
            parsed: list[Any] = [text]  # a template, which YAML would take for a block
        else:
            parsed = parse_yaml_documents(text, f"override '{override[:MAX_WORD]}'") or [None]
        values = _changed(values, keys, parsed[0], override)
    return values


def _takes_text(cls: type[Settings], keys: Sequence[str]) -> bool:
    """Return whether the setting at a path of keys is text and nothing else but null."""
    for key in keys[:-1]:
        field = cls.model_fields.get(key)
        block = None if field is None else _block_type(field.annotation)
        if block is None:
            return False
        cls = block
    field = cls.model_fields.get(keys[-1])
    return field is not None and field.annotation in (str, str | None)


def _changed(values: Any, keys: Sequence[str], value: Any, override: str) -> Any:
    """Return a copy of a block with one value set; blocks on the way to it are made where there are none.

    An entry of a list is named by its number, from 0 on. UserError, with the override, for one that is not there.
    """
    if not keys:
        return value
    if isinstance(values, list):
        if keys[0] not in map(str, range(len(values))):
            numbers = f"; name an entry by its number, 0 to {len(values) - 1}" if values else ""
            raise UserError(
                f"override '{override[:MAX_WORD]}': '{keys[0]}' is no entry of a list of {len(values)}{numbers}"
            )
        i = int(keys[0])
        return [*values[:i], _changed(values[i], keys[1:], value, override), *values[i + 1 :]]
    block = values if isinstance(values, Mapping) else {}
    return {**block, keys[0]: _changed(block.get(keys[0]), keys[1:], value, override)}


_KINDS = {
    dict: "a block of keys", list: "a list", str: "text", bool: "true/false", int: "a whole number", float: "a number",
}  # fmt: skip
_EXPECTED = {  # by the beginning of pydantic's name of a problem
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "tuple": "a list", "dict": "a block of keys", "model": "a block of keys",
}  # fmt: skip


def _value_text(value: Any) -> str:
    """Return a user's value in words: its kind and its beginning."""
    if value is None:
        return "nothing"
    return f"{_KINDS.get(type(value), type(value).__name__)} {str(value)[:60]!r}"


def first_problem(values: Any, error: ValidationError) -> str:
    """Return the most telling of pydantic's problems with `values` as one line.

    An unknown key goes first: a missing key is often that one, misspelt. In a union, the alternative that went deepest
    speaks; where all fail at the same key, the line says all that is allowed there.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "unknown_key"]
    same_root = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    problem = max(unknown or same_root, key=lambda p: len(p["loc"]))
    keys = _keys(problem, values)
    dotted, kind = ".".join(keys), problem["type"]
    if kind == "unknown_key":
        return f"unknown key '{'.'.join([*keys, problem['ctx']['key']])}'{problem['ctx']['hint']}"
    if kind == "missing" and isinstance(problem["loc"][-1], str):
        return f"key '{dotted}' is missing; it has no default"
    if kind == "missing":
        return f"{'.'.join(keys[:-1])}: too few values: the one with index {keys[-1]} is missing"
    if kind == "value_error":
        return f"{dotted}: {problem['ctx']['error']}" if dotted else str(problem["ctx"]["error"])
    wrong = _value_text(problem["input"])
    if kind == "invalid_key" or problem["loc"][-1:] == ("[key]",):
        quotes = "" if isinstance(problem["input"], str) else "; write it in quotes"
        return f"{dotted}: expected a name as key, found {wrong}{quotes}"
    space = "; write a space after the colon" if problem["input"] is None and ":" in keys[-1] else ""
    *most, last = dict.fromkeys(_expected(p) for p in same_root if _keys(p, values) == keys)
    return f"{dotted}: expected {', '.join(most)}{' or ' * bool(most)}{last}, found {wrong}{space}"


def _expected(problem: Any) -> str:
    kind, _, fault = problem["type"].partition("_")
    if problem["type"] in ("too_short", "string_too_short") and problem["ctx"]["min_length"] == 1:
        return "text that is not empty" if isinstance(problem["input"], str) else "at least one entry"
    if problem["type"] in ("too_long", "string_too_long"):
        unit = "characters" if isinstance(problem["input"], str) else "entries"
        return f"at most {problem['ctx']['max_length']} {unit}"
    if kind in _EXPECTED and fault in ("type", "attributes_type", "parsing", "from_float"):
        return _EXPECTED[kind]
    text = (problem["msg"][0].lower() + problem["msg"][1:]).removeprefix("input should be ")
    return f"a number {text}" if text.startswith(("greater", "less")) else text


def _keys(problem: Any, values: Any) -> list[str]:
    """Return the keys on pydantic's path to a problem, as they stand in `values`.

    Pydantic's names of a union's alternatives are no keys; they are left out.
    """
    path = [part for part in problem["loc"] if part != "[key]"]
    last_is_key = problem["type"] in ("missing", "invalid_key") or len(path) < len(problem["loc"])
    keys = []
    for depth, part in enumerate(path, 1):
        entries = dict(enumerate(values)) if isinstance(values, (list, tuple)) else values
        entries = entries if isinstance(entries, Mapping) else {}
        if part in entries or (last_is_key and depth == len(path)):
            keys.append(str(part))
            values = entries.get(part)
    return keys


_TYPE_NAMES = {
    type(None): "null", str: "text", int: "whole number", float: "number", bool: "true|false", list: "list",
    tuple: "list", dict: "block",
}  # fmt: skip


def type_name(annotation: Any) -> str:
    """Return what a type annotation accepts, in words."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if isinstance(origin, type) and issubclass(origin, Settings):
        return "block"
    return type_name(arguments[0]) if origin is typing.Annotated else _TYPE_NAMES.get(origin) or origin.__name__


def _block_type(annotation: Any) -> type[Settings] | None:
    """Return the Settings class inside a type annotation: `X`, `X | None`, `list[X]`, `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(filter(None, map(_block_type, typing.get_args(annotation))), None)


def describe(cls: type[Settings], prefix: str = "") -> list[str]:
    """Return one line a key for `--help`: the key, its default, its type and what it is for."""
    lines = []
    for name, field in cls.model_fields.items():
        default = field.default
        if default is PydanticUndefined:
            text = "(required)"
        elif default is None or isinstance(default, bool):
            text = "null" if default is None else str(default).lower()
        else:
            text = "" if isinstance(default, Settings) else str(default)
        key = f"{prefix}{name}: {text}".rstrip()
        lines.append(f"  {key:<44} {type_name(field.annotation)}. {field.description or ''}")
        if block := _block_type(field.annotation):
            infix = f"{name}.NAME." if typing.get_origin(field.annotation) is dict else f"{name}."
            lines += describe(block, prefix + infix)
    return lines
