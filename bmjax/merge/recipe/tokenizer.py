"""Which tokenizer a merge's result gets, where the rows of its tokens come from, and its chat template."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from bmjax.config import Settings, UserError, nearest, read_text

_TEMPLATES = Path(__file__).parents[2] / "chat/templates"
_NAMED = {path.stem: path for path in sorted(_TEMPLATES.glob("*.jinja"))}


@dataclass(frozen=True)
class TokenRow:
    """Where a token's row comes from, in models that lack the token, or with `force` in all.

    model None and not zero: the usual rule (see `bmjax.merge.plan.vocabulary`). token, token_id: that of the model
    which is taken; both None: the same token.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class TokenizerPlan:
    """The result's tokenizer. source: 'base', 'union' (every token of every model) or a model.

    tokens: rules of single tokens, which are added where the tokenizer lacks them.
    """

    source: str
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the tokens' rules name."""
        return tuple(dict.fromkeys(row.model for row in self.tokens.values() if row.model is not None))


class _TokenizerBlock(Settings):
    source: str = Field("union", min_length=1)
    tokens: dict[str, dict[str, Any] | None] | None = None
    pad_to_multiple_of: int | None = Field(None, ge=1)


class _TokenBlock(Settings):
    source: str | dict[str, Any] | None = None
    force: bool = False


class _ModelToken(Settings):
    kind: str
    model: str = Field(min_length=1)
    token: str | None = None
    token_id: int | None = Field(None, ge=0)


def tokenizer_plan(source: str | None, block: Mapping[str, Any] | None) -> TokenizerPlan | None:
    """The plan of a recipe's `tokenizer_source` or `tokenizer`; None without them: the donor's files are copied."""
    if source is not None and block is not None:
        raise UserError("'tokenizer_source' and 'tokenizer' both stand; keep 'tokenizer', with its `source:`")
    if block is None:
        return None if source is None else TokenizerPlan(source)
    settings = _read(_TokenizerBlock, block, "tokenizer")
    tokens = {token: _row(token, entry or {}) for token, entry in (settings.tokens or {}).items()}
    return TokenizerPlan(settings.source, tokens, settings.pad_to_multiple_of)


def _row(token: str, entry: Mapping[str, Any]) -> TokenRow:
    where = f"tokenizer.tokens.{token}"
    if not token:
        raise UserError("tokenizer.tokens: a token is empty text")
    settings = _read(_TokenBlock, entry, where)
    source, force = settings.source, settings.force
    if source is None or isinstance(source, str):
        if force and source is None:
            raise UserError(f"{where}: force needs a source: a model, or `kind: zero` or `kind: model_token`")
        return TokenRow(model=source, force=force)
    kind = source.get("kind")
    if kind == "zero":
        extra = sorted(source.keys() - {"kind"})
        if extra:
            raise UserError(f"{where}.source: kind zero takes no '{extra[0]}'")
        return TokenRow(zero=True, force=force)
    if kind != "model_token":
        hint = nearest(str(kind), ["zero", "model_token"])
        raise UserError(f"{where}.source: kind: expected zero or model_token, found {kind!r}{hint}")
    named = _read(_ModelToken, source, f"{where}.source")
    if (named.token is None) == (named.token_id is None):
        raise UserError(f"{where}.source: expected one of 'token' and 'token_id'")
    return TokenRow(named.model, named.token, named.token_id, force=force)


def _read(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind.read(values)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('settings: ')}") from None


def chat_template(text: str | None) -> str | None:
    """The jinja of a recipe's `chat_template`, a known name or jinja itself; None for the donor's own (`auto`)."""
    if text is None or text == "auto":
        return None
    if "{%" in text or "{{" in text:
        from jinja2 import Environment, TemplateSyntaxError

        try:
            # transformers' own tag marks what the assistant says.
            plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        except TemplateSyntaxError as error:
            raise UserError(f"chat_template: line {error.lineno}: not valid jinja: {error.message}") from None
        return text
    if text not in _NAMED:
        raise UserError(f"chat_template: '{text[:60]}' is neither jinja nor a name{nearest(text, ['auto', *_NAMED])}")
    return _NAMED[text].read_text(encoding="utf-8").rstrip("\n")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a tokenizer's file, or a UserError."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    return found


def write_chat_template(folder: Path, template: str) -> None:
    """Makes `template` the chat template of the tokenizer in `folder`, in place of whatever it has."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_object(path)
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
