"""The tokenizer keys of a recipe: which tokenizer the result gets, rules of single tokens, and its chat template."""

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bmjax.chat.template import TEMPLATE_NAMES, named_template
from bmjax.config import Settings, UserError, nearest
from bmjax.merge.recipe.model_names import ModelName, is_block, plain_name
from bmjax.safe_yaml import read_object

WORDS = ("base", "union")  # sources that are no model's name
FURTHER_TEMPLATES = "additional_chat_templates"  # the folder of named ones, as transformers saves them
_KINDS = ("zero", "model_token")


def _source(value: Any) -> Any:
    """Return the source of a result's tokenizer: one of WORDS, or a model's name, however it is spelt."""
    name = plain_name(value)
    if name in WORDS and name != value:
        raise ValueError(f"'{name}' means no model here; write ./{name}, or an alias of `sources`")
    return name


TokenizerSource = Annotated[str, BeforeValidator(_source), Field(min_length=1)]


class TokenSource(Settings):
    """The row that a token gets: zeros, or that of a model's token, named by text or by id."""

    kind: str
    model: ModelName | None = None
    token: str | None = None
    token_id: int | None = Field(None, ge=0)


class TokenRule(Settings):
    """Where a token's row comes from in models that lack the token, or with `force` in all models.

    Without a source the usual rule holds, see `bmjax.merge.plan.vocabulary`. A source that is text names a model,
    whose row of the same token is taken.
    """

    source: Annotated[
        str | TokenSource | None, BeforeValidator(lambda v: plain_name(v) if isinstance(v, str) or is_block(v) else v)
    ] = None
    force: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        source = self.source
        if source is None and self.force:
            raise ValueError("force needs a source: a model, or `kind: zero` or `kind: model_token`")
        if not isinstance(source, TokenSource):
            return self
        if source.kind not in _KINDS:
            hint = nearest(source.kind, _KINDS)
            raise ValueError(f"source: kind: expected zero or model_token, found {source.kind!r}{hint}")
        extra = sorted(source.model_fields_set - {"kind"})
        if source.kind == "zero":
            if extra:
                raise ValueError(f"source: kind zero takes no '{extra[0]}'")
        elif source.model is None:
            raise ValueError("source: key 'model' is missing; it has no default")
        elif (source.token is None) == (source.token_id is None):
            raise ValueError("source: expected one of 'token' and 'token_id'")
        return self

    @property
    def is_zero(self) -> bool:
        return isinstance(self.source, TokenSource) and self.source.kind == "zero"

    @property
    def model(self) -> str | None:
        return self.source.model if isinstance(self.source, TokenSource) else self.source

    def token_of(self, token: str) -> str | int:
        """Return what names the row of `model` that `token` takes: a token's text, or its id."""
        if not isinstance(self.source, TokenSource):
            return token
        return self.source.token or (token if self.source.token_id is None else self.source.token_id)


class TokenizerSettings(Settings):
    """The `tokenizer:` of a recipe."""

    source: TokenizerSource = Field("union", description="base, union (every token of every model), or a model")
    tokens: dict[str, TokenRule | None] | None = Field(
        None, description="rules of single tokens, which are added where the tokenizer lacks them"
    )
    pad_to_multiple_of: int | None = Field(None, ge=1, description="rows of tokens are padded to a multiple of it")

    @field_validator("tokens")
    @classmethod
    def _have_text(cls, tokens: dict[str, Any] | None) -> dict[str, Any] | None:
        if "" in (tokens or {}):
            raise ValueError("a token is empty text")
        return tokens

    @property
    def is_the_bases(self) -> bool:
        """Whether the result has the base's tokens, in its rows, and no others."""
        return self.source == "base" and not self.tokens and self.pad_to_multiple_of is None

    @property
    def rules(self) -> dict[str, TokenRule]:
        """The rule of every token that the recipe names."""
        return {token: rule or TokenRule() for token, rule in (self.tokens or {}).items()}


def chat_template(text: str | None) -> str | None:
    """Return the Jinja text of a recipe's `chat_template`: a name, or Jinja itself. `auto` and None stay."""
    if text is None or text == "auto":
        return text
    if text in TEMPLATE_NAMES:
        return named_template(text)
    if "{%" not in text and "{{" not in text:
        raise UserError(
            f"chat_template: '{text[:60]}' is neither jinja nor a name{nearest(text, ['auto', *TEMPLATE_NAMES])}"
        )
    from jinja2 import Environment, TemplateSyntaxError

    try:
        # transformers' own tag marks what the assistant says.
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise UserError(f"chat_template: line {error.lineno}: not valid jinja: {error.message}") from None
    return text


def write_chat_template(folder: Path, template: str) -> None:
    """Make `template` the one chat template of the tokenizer in `folder`, in place of all that it has.

    One for tools would be chosen whenever tools are given, and ends turns as the old template does.
    """
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / FURTHER_TEMPLATES, ignore_errors=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for path in (folder / "tokenizer_config.json", folder / "processor_config.json"):
        if path.is_file() and (config := read_object(path)).pop("chat_template", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
