"""The base of all settings: frozen pydantic models read from YAML plus `key.sub=value` overrides.

Every phase declares its settings next to the code that reads them. This module reads them, turns what a user got wrong
into one line that names the key, the value and what was expected, and lists all keys for `--help`. It is also the door
to errors.py and safe_yaml.py, the ground floor that all parts stand on.
"""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticUndefined

from bmjax.errors import MAX_WORD, UserError, first_line, nearest
from bmjax.safe_yaml import is_text, parse_yaml_documents, read_text, read_yaml, read_yaml_documents

__all__ = [
    "Settings", "UserError", "describe", "first_line", "first_problem", "is_text", "nearest", "parse_yaml_documents",
    "read_text", "read_yaml", "read_yaml_documents", "settings_types",
]  # fmt: skip


class Settings(BaseModel):
    """Frozen settings: an unknown key is refused with the nearest known one, a wrong type with the key's name."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=False, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `steps: true`, which pydantic would read as 1."""
        kinds = _alternatives(cls.model_fields[info.field_name].annotation) if info.field_name else []
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise PydanticCustomError("int_type" if int in kinds else "float_type", "not a number")
        return value

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Return the settings in a YAML file or a mapping, after the `key.sub=value` overrides in order.

        Raises UserError, one line, for a missing file, bad YAML, an unknown key or a value of the wrong type.
        """
        if isinstance(source, Mapping):
            name, values = "settings", _plain_copy(source)
        else:
            name, values = str(source), read_yaml(source)
        if not isinstance(values, dict):
            raise UserError(f"{name}: expected `key: value` lines at the top, found {_value_text(values)}")
        for override in overrides:
            _apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{name}: {first_problem(cls, error)}") from None


def _plain_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_copy(item) for key, item in value.items()}
    return [_plain_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip() or not is_text(key):
        raise UserError(f"'{override[:MAX_WORD]}': expected key=value or key.sub=value")
    parsed = parse_yaml_documents(text, f"override '{override[:MAX_WORD]}'") or [None]
    *parents, last = key.strip().split(".")
    block: Any = values
    for parent in parents:
        if not isinstance(block.get(parent), dict):
            block[parent] = {}
        block = block[parent]
    block[last] = parsed[0]


_KINDS = {
    dict: "a block of keys", list: "a list", str: "text", bool: "true/false", int: "a whole number", float: "a number",
}  # fmt: skip
_EXPECTED = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_parsing": "a number", "float_type": "a number", "bool_parsing": "true or false",
    "bool_type": "true or false", "string_type": "text", "list_type": "a list", "dict_type": "a block of keys",
    "model_type": "a block of keys", "model_attributes_type": "a block of keys", "tuple_type": "a list",
}  # fmt: skip


def _value_text(value: Any) -> str:
    """Return a user's value in words: its kind and its beginning."""
    if value is None:
        return "nothing"
    return f"{_KINDS.get(type(value), type(value).__name__)} {str(value)[:60]!r}"


def first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    """Return the most telling of pydantic's problems as one line.

    An unknown key goes first: a missing key is often that one, misspelt. In a union, the alternative that went deepest
    speaks; where all fail at the same key, the line says all that is allowed there.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    same_root = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    problem = max(unknown or same_root, key=lambda p: len(p["loc"]))
    keys, owner = _locate(cls, problem["loc"])
    dotted, kind, value = ".".join(keys), problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}'{nearest(keys[-1], list(owner.model_fields) if owner else [])}"
    if kind == "missing" and owner is not None:
        return f"key '{dotted}' is missing; it has no default"
    if kind == "missing":
        return f"{'.'.join(keys[:-1])}: too few values: the one with index {keys[-1]} is missing"
    if kind == "invalid_key" or problem["loc"][-1:] == ("[key]",):
        return f"{dotted}: expected a name as key, found {_value_text(value)}"
    if kind == "value_error":
        message = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
        return f"{dotted}: {message}" if dotted else message
    same_keys = [p for p in same_root if _locate(cls, p["loc"])[0] == keys]
    *most, last = dict.fromkeys(_expected(p) for p in same_keys)
    return f"{dotted}: expected {', '.join(most)}{' or ' * bool(most)}{last}, found {_value_text(value)}"


def _expected(problem: Any) -> str:
    if problem["type"] in _EXPECTED:
        return _EXPECTED[problem["type"]]
    text = (problem["msg"][0].lower() + problem["msg"][1:]).removeprefix("input should be ")
    return f"a number {text}" if text.startswith(("greater", "less")) else text


def _locate(cls: type[BaseModel], path: Sequence[Any]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the keys on pydantic's path to a problem as the user wrote them, and the Settings that know the last one.

    The path goes through the annotations; its names of a union's alternatives are left out.
    """
    annotation: Any = cls
    keys: list[str] = []
    owner: type[BaseModel] | None = None
    for part in path[:-1] if path[-1:] == ("[key]",) else path:
        alternatives = _alternatives(annotation)
        # Pydantic's names of alternatives: a class is called by its name, anything else as it is written.
        by_name = {a.__name__ if isinstance(a, type) and not typing.get_args(a) else str(a): a for a in alternatives}
        if len(alternatives) > 1 and part in by_name:
            annotation = by_name[part]
            continue
        keys.append(str(part))
        annotation = alternatives[0]
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if owner is not None:
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else Any
        else:
            annotation = next(iter(typing.get_args(annotation)[-1:]), Any)
    return keys, owner


def _alternatives(annotation: Any) -> list[Any]:
    """Return the alternatives of a union besides None; of any other annotation, itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return [alternative for kind in kinds for alternative in _alternatives(kind)]
    return [annotation]


def settings_types(annotation: Any) -> Iterator[type[Settings]]:
    """Yield every Settings class inside a type annotation: `X`, `X | None`, `list[X]`, `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from settings_types(argument)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and not arguments:
        names = {"NoneType": "null", "str": "text", "int": "whole number", "float": "number", "bool": "true|false"}
        return names.get(annotation.__name__, annotation.__name__)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    return {list: "list", tuple: "list", dict: "block"}.get(origin) or str(annotation).replace("typing.", "")


def describe(cls: type[Settings], prefix: str = "") -> list[str]:
    """Return one line a key for `--help`: the key, its default, its type and what it is for."""
    lines = []
    for name, field in cls.model_fields.items():
        default = field.default
        if default is PydanticUndefined:
            text = "(required)"
        elif default is None or isinstance(default, bool):
            text = {None: "null", True: "true", False: "false"}[default]
        else:
            text = "" if isinstance(default, Settings) else str(default)
        key = f"{prefix}{name}: {text}".rstrip()
        lines.append(f"  {key:<44} {_type_name(field.annotation)}. {field.description or ''}")
        nested = next(settings_types(field.annotation), None)
        if nested is not None:
            infix = f"{name}.NAME." if typing.get_origin(field.annotation) is dict else f"{name}."
            lines += describe(nested, prefix + infix)
    return lines
