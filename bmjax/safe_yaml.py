"""Reads text, YAML and JSON objects of any origin safely: size limits, no objects, no double keys, no alias bombs.

Settings and recipes are read through this module. It knows nothing of their keys.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bmjax.errors import UserError, first_line, maker_hint

MAX_NODES = 100_000
MAX_CHARACTERS = 256 * 1024  # a second or two of parsing; what is larger is not a config
MAX_NUMBER = 400  # characters; no digits in an error message or a sum take seconds


def is_text(value: str) -> bool:
    """Return whether `value` is Unicode text.

    Escapes in YAML and JSON and bytes in file names can make halves of characters, which no file takes.
    """
    return not any("\ud800" <= c <= "\udfff" for c in value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads `1e-5` as the number it is, and knows what aliases stand for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliased: set[int] = set()  # ids of the nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias:
            self.aliased.add(id(node))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
# Programs that dump a recipe from Python write layer ranges as tuples: these are read as lists, and nothing is run.
# A set would be taken for a list, in an order that changes from run to run.
_Loader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:python/tuple": yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:seq"],
}
_Loader.yaml_constructors.pop("tag:yaml.org,2002:set")


def _check(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Refuse what must not be built, and return how many nodes there are once every alias is written out.

    An alias bomb has few nodes but an enormous size. sizes: the counts so far by id, 0 while a node is being counted.
    """
    line = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        if not is_text(node.value):
            raise UserError(f"{line}: {ascii(node.value)[:60]} is no text: half a character")
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > MAX_NUMBER:
            raise UserError(f"{line}: a number of {len(node.value)} characters; refused")
        return 1
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError("an anchor contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    line = f"line {key.start_mark.line + 1}"
                    raise UserError(f"{line}: key '{key.value}' stands twice in the same block; remove one")
                keys.add(key.value)
        children = [child for pair in node.value for child in pair]
    sizes[id(node)] = 1 + sum(_check(child, sizes) for child in children)
    return sizes[id(node)]


def parse_yaml_documents(text: str, name: str) -> list[Any]:
    """Return all YAML documents of `text` as plain Python values.

    name: of the text, in errors. Raises UserError for what is not YAML or is refused.
    """
    documents: list[Any] = []
    try:
        loader = _Loader(text)
        while loader.check_node() and (node := loader.get_node()):
            if _check(node, {}) > MAX_NODES:
                raise UserError(f"more than {MAX_NODES} values once aliases are written out; refused")
            documents.append(loader.construct_document(node))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{name}: {line}not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{name}: not valid YAML: nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's constructors raise whatever int(), date() and their like do.
        raise UserError(f"{name}: not valid YAML: a value is not what its tag or form says: {error}") from None
    return documents


def read_text(path: str | Path, limit: int | None = None) -> str:
    """Return the UTF-8 text of a file, at most `limit` characters, without the mark that editors on Windows begin with.

    Raises UserError for a file that is missing, larger, no regular file or not UTF-8.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory, expected a file")
        if not path.exists():
            if path.is_symlink():
                raise UserError(f"{path}: no such file, only a link that leads nowhere")
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
            hint = maker_hint(path) or (f"; did you mean {path.parent / near[0]}?" if near else "")
            raise UserError(f"{path}: no such file{hint}")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if limit is None or path.stat().st_size <= 4 * limit:  # UTF-8 has up to four bytes a character
            text = path.read_text(encoding="utf-8-sig")
            if limit is None or len(text) <= limit:
                return text
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    raise UserError(f"{path}: more than {limit} characters; refused, is it the right file?")


def read_yaml_documents(path: str | Path) -> list[Any]:
    """Return all YAML documents of a file as plain Python values."""
    return parse_yaml_documents(read_text(path, MAX_CHARACTERS), str(path))


def aliased_keys(path: str | Path) -> list[set[str]]:
    """Return of each YAML document of a valid file the keys at its top whose value holds what an alias stands for."""
    loader, keys = _Loader(read_text(path, MAX_CHARACTERS)), list[set[str]]()
    while loader.check_node() and (node := loader.get_node()):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys.append({key.value for key, value in pairs if any(id(n) in loader.aliased for n in _nodes(value))})
    return keys


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield a node and those in it, each once for every alias."""
    yield node
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _nodes(part)


def read_yaml(path: str | Path) -> Any:
    """Return the single YAML document of a file; an empty file reads as {}."""
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        raise UserError(f"{path}: {len(documents)} YAML documents, expected one")
    return documents[0] if documents and documents[0] is not None else {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError where it holds none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {first_line(error)}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
