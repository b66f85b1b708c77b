"""Cards, the README.md files that a hub reads: their head, what cards of the inputs say, and safe Markdown.

Cards of models (bmjax.weights.card, bmjax.merge.report.card) and of data sets (bmjax.teach.selection.card) are written
by means of this. A card never names a directory of the machine that it was written on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from bmjax.config import UserError, parse_yaml_documents, read_text
from bmjax.io.hub import is_dataset_id, split_adapter, split_revision
from bmjax.urls import url_of

NAME = "README.md"
_ID = r"[\w.-]+/[\w.-]+"
_LICENSE_KEYS = ("license", "license_name", "license_link")
# Names that a run gives to every model's folder or every domain's file, which tell nothing about which one it is.
_GENERAL_NAMES = (".", "..", "hf", "train.jsonl", "backbone.jsonl")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Return the head of a card that bmjax wrote, as values, and the text below it."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def join_card(head: Mapping[str, Any], body: str) -> str:
    """Return the text of a card."""
    return f"---\n{yaml_text(head)}\n---\n{body}"


def read_head(directory: Path) -> dict[str, Any]:
    """Return what the head of a directory's card says; nothing where it has none that can be read."""
    path = directory / NAME
    try:
        text = read_text(path, 2**22) if path.is_file() else ""
        match = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
        documents = parse_yaml_documents(match[1], str(path)) if match else []
    except UserError:
        return {}
    return documents[0] if documents and isinstance(documents[0], dict) else {}


def bases(name: str, heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the hub ids that a model is made of: itself where it is one, else the bases that its card names.

    Arguments:
        name: of the model, MODEL or MODEL+ADAPTER, each a directory or a hub id with or without a revision.
        heads: of its cards, see `read_head`.
    """
    parts = [split_revision(part)[0] for part in split_adapter(name) if part]
    ids = [part for part in parts if re.fullmatch(_ID, part) and not Path(part).exists()]
    # A model on the hub is its own base, with or without an adapter from here.
    if parts[0] in ids:
        return ids
    named = [base for head in heads for base in _listed(head.get("base_model"))]
    return [*ids, *(base for base in named if isinstance(base, str) and re.fullmatch(_ID, base))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def license_fields(heads: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the license fields: those of all cards where they agree; `other` where two differ."""
    texts = {
        tuple((key, str(head[key])) for key in _LICENSE_KEYS if is_word(head.get(key)))
        for head in heads
        if is_word(head.get("license"))
    }
    if len(texts) > 1:
        return {"license": "other", "license_name": "of-the-merged-models"}
    # Of a model without a card it is not known; what its bases say still binds it.
    return dict(texts.pop()) if texts else {}


def is_word(value: Any) -> bool:
    """Return whether a value can be the name of a license."""
    return isinstance(value, str) and re.fullmatch(r"[\w.+:/#?=&%-]{1,200}", value) is not None


def dataset_ids(names: Iterable[str]) -> list[str]:
    """Return the hub ids among names of data, `org/name` of `org/name:subset:split`."""
    ids = (re.split("[@:]", name)[0] for name in names if not url_of(name) and is_dataset_id(name))
    return list(dict.fromkeys(name for name in ids if re.fullmatch(_ID, name)))


def public_name(name: str) -> str:
    """Return how a card calls a model or a file: a hub id as it is, a directory or URL by its last telling part.

    `/home/me/runs/math/hf` is called `math`: other machines have no such directory, and need not know of it.
    """
    model, adapter = split_adapter(name)
    if adapter is not None:
        return f"{public_name(model)}+{public_name(adapter)}"
    text, revision = split_revision(name)
    if not url_of(name) and re.fullmatch(_ID, text) and not Path(text).exists():
        return name if revision is None else f"{text}@{revision[:12]}"
    path = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in path.parts if part not in ("/", "~") and not part.endswith(":")]
    # The first folder under these is called as a person.
    parts = parts[2:] if path.is_absolute() and parts[:1] in (["home"], ["Users"]) else parts
    telling = [part for part in parts if part not in _GENERAL_NAMES]
    return (telling or parts or ["local"])[-1]


def public_values(value: Any) -> Any:
    """Return plain values with every text that is a path of this machine as `public_name` calls it."""
    if isinstance(value, Mapping):
        return {public_values(key): public_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_values(entry) for entry in value]
    if isinstance(value, str) and "\n" not in value:
        model, adapter = split_adapter(value)
        parts = [part for part in (model, adapter) if part is not None]
        return "+".join(public_name(part) if _is_path(part) else part for part in parts)
    return value


def _is_path(text: str) -> bool:
    if url_of(text) or text.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:\\", text):
        return True
    return "/" in text and len(text) < 1024 and "\0" not in text and Path(text).exists()


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip()


def code(value: Any) -> str:
    """Return a text or number as code that Markdown does not look into, also in a table."""
    plain = " ".join(str(value).split()).replace("|", "\\|")
    fence, space = "`" * (_longest_run(plain) + 1), " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def fenced(text: str, language: str = "yaml") -> str:
    """Return a text as a block of code that nothing in it can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def listed(names: Sequence[str]) -> str:
    """Join names as in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
