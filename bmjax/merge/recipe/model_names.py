"""How recipes spell models: a name, `model:NAME`, or the block that mergekit writes into its model cards.

All of them become one text, `MODEL[@REVISION][+ADAPTER[@REVISION]]`, which `bmjax.io.hub` resolves.
"""

import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from bmjax.config import nearest
from bmjax.io.hub import split_adapter
from bmjax.urls import url_of

_PAGE = re.compile(r"https?://(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)(?:/tree/(?P<revision>[\w./-]+?))?/?")
_KEYS = ("path", "revision", "model", "lora", "override_architecture")


def plain_name(value: Any) -> Any:
    """Return the name that a recipe's value means. ValueError for a block that is none; else checks are pydantic's.

    value: a text, or mergekit's block: `{model: {path, revision}, lora: {path, revision}}`, or its inner one.
    """
    if isinstance(value, str):
        # A page of the hub, as a browser shows its address.
        if page := _PAGE.fullmatch(value):
            return with_revision(page["id"], page["revision"])
        return value.removeprefix("model:")
    if isinstance(value, (bool, int, float, datetime.date)):
        raise ValueError(quoted_hint(value))
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"a model's block: unknown key '{key}'{nearest(str(key), _KEYS)}")
    name = value.get("path") or value.get("model")
    if not name:
        raise ValueError("expected a model's name, or a block with 'path'")
    name = with_revision(plain_name(name), value.get("revision"))
    return f"{name}+{plain_name(value['lora'])}" if value.get("lora") else name


def quoted_hint(value: Any) -> str:
    """Return what helps against a name that YAML takes for a number, a date, or true or false."""
    kind = "true or false" if isinstance(value, bool) else "a number" if isinstance(value, (int, float)) else "a date"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"expected a model's name, found {shown}, which YAML reads as {kind}; write the name in quotes"


def is_block(value: Any) -> bool:
    """Return whether a value is a model as mergekit writes it into its cards, and no other mapping."""
    return isinstance(value, Mapping) and bool({"path", "model"} & value.keys()) and value.keys() <= {*_KEYS}


def with_revision(name: Any, revision: Any) -> Any:
    """Return `name@revision`, or the name where there is no revision."""
    return name if revision is None else f"{name}@{revision}"


def plain_entry(entry: Any) -> Any:
    """Return an entry of `models:` or `sources:` with its model as one text, which takes up its `revision`."""
    if not isinstance(entry, Mapping) or "model" not in entry:
        return plain_name(entry) if isinstance(entry, str) else entry
    rest = {key: value for key, value in entry.items() if key != "revision"}
    return {**rest, "model": with_revision(plain_name(entry["model"]), entry.get("revision"))}


def model_key(name: str, sources: Mapping[str, str]) -> str:
    """Return what tells a model from others: the resolved path of a directory that is there, else its name.

    Of MODEL+ADAPTER, both of which may be aliases, it is that of the two.
    """
    text = sources.get(name, name)
    if url_of(text):
        return text.rstrip("/")
    try:
        model, adapter = split_adapter(text)
        parts = [text] if adapter is None else [sources.get(part, part) for part in (model, adapter)]
        paths = [Path(part).expanduser() for part in parts]
        return "+".join(os.path.realpath(p) if p.is_dir() else part for part, p in zip(parts, paths, strict=True))
    except (OSError, RuntimeError, ValueError):  # a name that is no path, for the model's own reader to refuse
        return text


ModelName = Annotated[str, BeforeValidator(plain_name), Field(min_length=1)]
