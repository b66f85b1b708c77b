"""The base of all settings: frozen pydantic models read from YAML plus `key.sub=value` overrides.

Every phase declares its own settings next to the code that reads them; this module only knows how to read
them, and how to turn what a user got wrong into one line that names the key, what was found and the fix.
"""

import difflib
import errno
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticUndefined

MAX_YAML_NODES = 100_000
MAX_YAML_CHARACTERS = 256 * 1024  # a second or two of parsing; what is larger is not a config
MAX_LINE = 1000  # characters of an error
MAX_NUMBER = 400  # characters; no digits in an error message or a sum take seconds
MAX_WORD = 200  # characters of a word that is looked for among others: more take minutes


class UserError(Exception):
    """A mistake its user can mend. The message is one line; commands print it and exit with code 2.

    Line breaks and control characters, which names in files and configs may bring in, become spaces.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}...")


# What the machine says no to, and its user can mend: a full or failing disk, rights, too long or wrong a path.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EMFILE,
)  # fmt: skip


def disk_error(error: OSError) -> str:
    """One of DISK_ERRORS in words."""
    return f"{error.filename or 'writing'}: {error.strerror}"


def first_line(error: BaseException) -> str:
    """The first line that an error says, for a message of ours; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


class Settings(BaseModel):
    """Frozen settings: unknown keys are refused with the nearest known one, wrong types by name of the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=False, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `steps: true` as 1."""
        kinds = _branches(cls.model_fields[info.field_name].annotation) if info.field_name else []
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise PydanticCustomError("int_type" if int in kinds else "float_type", "not a number")
        return value

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Settings from a YAML file or a mapping, then `key.sub=value` overrides in order.

        Raises UserError, one line, for a missing file, bad YAML, an unknown key or a value of the wrong type.
        """
        if isinstance(source, Mapping):
            where, values = "settings", _plain_copy(source)
        else:
            where, values = str(source), read_yaml(source)
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected `key: value` lines at the top, found {_kind(values)}")
        for override in overrides:
            _apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(cls, error)}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with duplicate keys refused and `1e-5` read as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            line = key.start_mark.line + 1
            raise UserError(f"line {line}: key '{key.value}' stands twice in the same block; remove one")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > MAX_NUMBER:
        raise UserError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters; refused")
    whole = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if not is_text(node.value):
        raise UserError(f"line {node.start_mark.line + 1}: {ascii(node.value)[:60]} is no text: half a character")
    return node.value


def _refused(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        None, None, f"could not determine a constructor for the tag {node.tag!r}", node.start_mark
    )


def is_text(value: str) -> bool:
    """Whether `value` is Unicode text: escapes of YAML and JSON, and bytes of file names, can make halves of
    characters, which no file takes."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
# A set would be taken for a list, in an order that changes from run to run.
_Loader.add_constructor("tag:yaml.org,2002:set", _refused)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes under `node` once every alias is written out (an alias bomb has few nodes but an enormous size)."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError("an anchor contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def parse_yaml_documents(text: str, where: str) -> list[Any]:
    """All YAML documents of `text` as plain Python values; `where` names the source in errors."""
    documents: list[Any] = []
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                documents.append(None)
                continue
            if _expanded_size(node, {}) > MAX_YAML_NODES:
                raise UserError(f"more than {MAX_YAML_NODES} values once aliases are written out; refused")
            documents.append(loader.construct_document(node))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: {line}not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's constructors raise whatever int(), date() and their like do.
        raise UserError(f"{where}: not valid YAML: a value is not what its tag or form says: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return documents


def read_text(path: str | Path, limit: int | None = None) -> str:
    """The text of a file of at most `limit` characters, or a UserError that says what is wrong with it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory, expected a file")
        if not path.exists():
            if path.is_symlink():
                raise UserError(f"{path}: no such file, only a link that leads nowhere")
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
            hint = f"; did you mean {path.parent / near[0]}?" if near else ""
            raise UserError(f"{path}: no such file{hint}")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if limit is not None and path.stat().st_size > 4 * limit:
            raise UserError(f"{path}: more than {limit} characters; refused, is it the right file?")
        with open(path, encoding="utf-8") as file:
            text = file.read() if limit is None else file.read(limit + 1)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if limit is not None and len(text) > limit:
        raise UserError(f"{path}: more than {limit} characters; refused, is it the right file?")
    return text


def read_yaml_documents(path: str | Path) -> list[Any]:
    """All YAML documents of a file."""
    return parse_yaml_documents(read_text(path, MAX_YAML_CHARACTERS), str(path))


def read_yaml(path: str | Path) -> Any:
    """The single YAML document of a file; an empty file reads as {}."""
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        raise UserError(f"{path}: {len(documents)} YAML documents, expected one")
    return documents[0] if documents and documents[0] is not None else {}


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


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{_KINDS.get(type(value), type(value).__name__)} {str(value)[:60]!r}"


_KINDS = {
    dict: "a block of keys", list: "a list", str: "text", bool: "true/false", int: "a whole number", float: "a number",
}  # fmt: skip
_EXPECTED = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_parsing": "a number", "float_type": "a number", "bool_parsing": "true or false",
    "bool_type": "true or false", "string_type": "text", "list_type": "a list", "dict_type": "a block of keys",
    "model_type": "a block of keys", "model_attributes_type": "a block of keys", "tuple_type": "a list",
}  # fmt: skip


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint: `; did you mean 'x'?`, or the known words when none is near."""
    short = [name for name in known if len(name) <= MAX_WORD]
    near = difflib.get_close_matches(word, short, n=1, cutoff=0.6) if len(word) <= MAX_WORD else []
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


@dataclass(frozen=True)
class _Place:
    """Where a problem lies: the keys as the user wrote them, and the Settings that should know the last one."""

    keys: tuple[str, ...]
    owner: type[BaseModel] | None
    in_key: bool

    @property
    def dotted(self) -> str:
        return ".".join(self.keys)


def first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    """The most telling of pydantic's problems as one line.

    An unknown key goes first: what is missing is often that key, misspelt. In a union, the branch that went deepest
    speaks; where all fail at the same place, the line says all that is allowed there.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    same_root = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    problem = max(unknown or same_root, key=lambda p: len(p["loc"]))
    place = _place(cls, problem["loc"])
    dotted, kind, found = place.dotted, problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = list(place.owner.model_fields) if place.owner else []
        return f"unknown key '{dotted}'{nearest(place.keys[-1], known)}"
    if kind == "missing" and place.owner is not None:
        return f"key '{dotted}' is missing; it has no default"
    if kind == "missing":
        return f"{'.'.join(place.keys[:-1])}: too few values: the one with index {place.keys[-1]} is missing"
    if kind == "invalid_key" or place.in_key:
        return f"{dotted}: expected a name as key, found {_kind(found)}"
    if kind == "value_error":
        message = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
        return f"{dotted}: {message}" if dotted else message
    *most, last = dict.fromkeys(_expected(p) for p in same_root if _place(cls, p["loc"]).keys == place.keys)
    allowed = f"{', '.join(most)} or {last}" if most else last
    return f"{dotted}: expected {allowed}, found {_kind(found)}"


def _expected(problem: Any) -> str:
    if problem["type"] in _EXPECTED:
        return _EXPECTED[problem["type"]]
    text = (problem["msg"][0].lower() + problem["msg"][1:]).removeprefix("input should be ")
    return f"a number {text}" if text.startswith(("greater", "less")) else text


def _place(cls: type[BaseModel], location: Sequence[Any]) -> _Place:
    """Follow pydantic's location through the annotations, leaving out its names of union branches."""
    annotation: Any = cls
    keys: list[str] = []
    owner: type[BaseModel] | None = None
    parts = list(location)
    in_key = bool(parts) and parts[-1] == "[key]"
    for part in parts[:-1] if in_key else parts:
        branches = _branches(annotation)
        tags = {_tag(branch): branch for branch in branches}
        if len(branches) > 1 and part in tags:
            annotation = tags[part]
            continue
        annotation = branches[0]
        keys.append(str(part))
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if owner is not None:
            annotation = owner.model_fields[part].annotation if part in owner.model_fields else Any
        else:
            annotation = next(iter(typing.get_args(annotation)[-1:]), Any)
    return _Place(tuple(keys), owner, in_key)


def _branches(annotation: Any) -> list[Any]:
    """The alternatives of a union besides None; of anything else, itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _branches(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [b for a in typing.get_args(annotation) if a is not type(None) for b in _branches(a)]
    return [annotation]


def _tag(branch: Any) -> str:
    return branch.__name__ if isinstance(branch, type) and not typing.get_args(branch) else str(branch)


def settings_types(annotation: Any) -> Iterator[type[Settings]]:
    """Every Settings class inside a type annotation: `X`, `X | None`, `list[X]`, `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from settings_types(argument)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {"NoneType": "null", "str": "text", "int": "whole number", "float": "number", "bool": "true|false"}.get(
            annotation.__name__, annotation.__name__
        )
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (list, tuple):
        return "list"
    return "block" if origin is dict else str(annotation).replace("typing.", "")


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "(required)"
    if isinstance(default, Settings):
        return ""
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def describe(cls: type[Settings], prefix: str = "") -> list[str]:
    """One line a key for `--help`: the key, its default, its type and what it is for."""
    lines = []
    for name, field in cls.model_fields.items():
        nested = next(settings_types(field.annotation), None)
        key = f"{prefix}{name}: {_default_text(field.default)}".rstrip()
        lines.append(f"  {key:<44} {_type_name(field.annotation)}. {field.description or ''}")
        if nested is not None:
            infix = f"{name}.NAME." if typing.get_origin(field.annotation) is dict else f"{name}."
            lines += describe(nested, prefix + infix)
    return lines
