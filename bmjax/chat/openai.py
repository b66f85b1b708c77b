"""Requests of the OpenAI API: as bmjax's client sends them, and as its server reads them.

The client's types take any field, for endpoints differ. The server's are strict: a wrong type, a value out of its
range, a field that would change the answer but is not supported, and a misspelt one are refused by name. Fields that
change nothing, such as `user`, are accepted, and so are vendors' own, which `unknown_fields` lists. How replies are
read is in replies.py.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from bmjax.config import UserError, first_problem

MAX_SAMPLES = 128  # `n`, and prompts of one request
MAX_STOPS = 16
MAX_TOKENS = 2**24  # beyond any context: more is a slip of the pen


class ChatMessage(BaseModel):
    """A turn."""

    role: str = "assistant"
    content: str | None = None


class ChatRequest(BaseModel):
    """The body of POST /chat/completions, as the client sends it."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stream: bool | None = None


# What would change an answer and bmjax does not do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "best_of": (1,), "suffix": ("",), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "reasoning_effort": (), "reasoning": (), "verbosity": (), "thinking": (), "enable_thinking": (),
    "thinking_token_budget": (), "include_reasoning": (True,), "moderation": (), "documents": ([],),
    "chat_template": (), "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (), "grammar": (), "json_schema": (), "min_tokens": (0,),
    "bad_words": ([],), "allowed_token_ids": (), "logits_processors": ([],), "typical_p": (1,), "top_a": (0,),
    "length_penalty": (1,), "use_beam_search": (False,), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "truncate_prompt_tokens": (), "prompt_logprobs": (),
    "add_special_tokens": (False,), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "prompt_embeds": (), "lora": (), "priority": (0,), "max_repetition_pattern_size": (0,),
    "min_repetition_pattern_size": (0,), "repetition_min_count": (0,),
}  # fmt: skip

# What OpenAI's and vLLM's clients send and no answer of bmjax depends on.
NO_EFFECT = {
    "user", "user_id", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "request_id", "cache_salt",
    "spaces_between_special_tokens", "guided_decoding_backend", "guided_whitespace_pattern", "mm_processor_kwargs",
    "kv_transfer_params", "vllm_xargs",
}  # fmt: skip
_MESSAGE_NO_EFFECT = {
    "name", "id", "refusal", "annotations", "audio", "tool_calls", "function_call", "tool_call_id",
}  # fmt: skip
_STREAM_NO_EFFECT = {"include_obfuscation"}
_CLOSE = 0.8  # how alike a field and a known one are that was meant, by difflib
MAX_UNKNOWN = 32  # unknown fields of one body: each is compared with all known ones


def _written(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate), which no text has") from None
    return text


Text = Annotated[str, AfterValidator(_written)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None  # vLLM's: usage with every chunk


class ServedRequest(BaseModel):
    """What chats and completions have in common, as the server reads them. None: the server's default."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)  # 0 and -1: all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Stop] | None = Field(None, max_length=MAX_STOPS)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ServedMessage(BaseModel):
    """A turn as the server reads it. Its content is a text, or a list of parts of type text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    reasoning_content: Text | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of type {str(kind)[:40]!r}; expected parts {{type: text, text: ...}}")
        return "".join(part["text"] for part in value) if isinstance(value, list) else value

    @field_validator("reasoning_content")
    @classmethod
    def _thinks_alone(cls, value: str | None, info: Any) -> str | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only the assistant's turns have reasoning")
        return value


class ServedChat(ServedRequest):
    """The body of POST /v1/chat/completions. max_completion_tokens goes before max_tokens."""

    messages: list[ServedMessage]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("messages")
    @classmethod
    def _asks(cls, value: list[ServedMessage]) -> list[ServedMessage]:
        if not value:
            raise ValueError("empty; expected at least one turn")
        return value


class ServedCompletion(ServedRequest):
    """The body of POST /v1/completions. prompt: texts or lists of token ids; max_tokens 0 only reads the prompt."""

    prompt: list[Text | list[int]]
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        """Make a list of prompts of one prompt; ValueError for what is none, with the index of the wrong one."""
        if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
            value = [value]
        if not isinstance(value, list):
            raise ValueError("expected a text, a list of token ids, or a list of either")
        if not value or len(value) > MAX_SAMPLES:
            raise ValueError(f"{len(value)} prompts; expected 1 to {MAX_SAMPLES}")
        for index, prompt in enumerate(value):
            is_tokens = isinstance(prompt, list) and all(type(token) is int for token in prompt)
            if not is_tokens and not isinstance(prompt, str):
                raise ValueError(f"prompt {index} is neither a text nor a list of token ids")
            if type(prompt) is not type(value[0]):
                raise ValueError(f"prompt {index} is of another kind than prompt 0; expected one kind")
        return value


class RequestError(Exception):
    """A request that the server refuses. param: the field that is wrong, None where it is none."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(UserError(message).args[0])
        self.param = None if param is None else UserError(param).args[0]
        self.code, self.status = code, status

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def read_request(kind: type[ServedChat] | type[ServedCompletion], values: Any) -> Any:
    """Return the request of this kind in a decoded body.

    Raises:
        RequestError: for a body that is no object, a missing field, a wrong type, a value out of its range, a field of
            UNSUPPORTED or of the other kind that asks for something, and one that is misspelt. It names the field.
    """
    if not isinstance(values, dict):
        raise RequestError(f"expected a JSON object, found {type(values).__name__}")
    unknown = _unknown(kind, values)
    if len(unknown) > MAX_UNKNOWN:
        raise RequestError(f"more than {MAX_UNKNOWN} unknown fields, the first is '{''.join(unknown[0][:2])[:100]}'")
    for path, name, known in unknown:
        if (meant := _meant(name, known)) is not None:
            param = path.partition(".")[0] or name[:100]
            raise RequestError(f"unknown field '{path}{name[:100]}'; did you mean '{meant}'?", param)
    for name in sorted(_fields_of_other(kind)):
        if values.get(name) not in (None, False):
            path = "/v1/completions" if kind is ServedChat else "/v1/chat/completions"
            raise RequestError(f"{name}: a field of {path}; leave it out", name, "unsupported_parameter")
    for name, neutral in UNSUPPORTED.items():
        if values.get(name) is not None and values[name] not in neutral:
            raise RequestError(f"{name}: bmjax does not support it; leave it out", name, "unsupported_parameter")
    messages = values.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("tool_calls", "function_call", "audio"):
            if isinstance(message, dict) and message.get(name):
                path = f"messages.{index}.{name}"
                raise RequestError(f"{path}: bmjax does not support it", "messages", "unsupported_parameter")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        param = str(error.errors(include_url=False)[0]["loc"][0])
        raise RequestError(first_problem(values, error), param) from None
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: only with stream: true", "stream_options")
    if isinstance(request, ServedChat) and request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs: only with logprobs: true", "top_logprobs")
    if isinstance(request, ServedCompletion) and request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens: 0 only with echo: true; expected at least 1", "max_tokens")
    return request


def unknown_fields(kind: type[ServedChat] | type[ServedCompletion], values: Mapping[str, Any]) -> list[str]:
    """Return the fields of a body that bmjax does not know, which have no effect; `messages.NAME` is a turn's."""
    return [f"{path}{name}" for path, name, _ in _unknown(kind, values)]


def _unknown(
    kind: type[ServedChat] | type[ServedCompletion], values: Mapping[str, Any]
) -> list[tuple[str, str, set[str]]]:
    """Return (path to its object, name, known names that it may be a slip of) of each unknown field.

    What all turns have is there once, what is null not at all, and no more than MAX_UNKNOWN and one. A field that an
    object must have is not what another one of it was meant to be. Nor is one without effect: a vendor's own
    field may be like it.
    """
    of_request = {*kind.model_fields, *_fields_of_other(kind), *UNSUPPORTED, *NO_EFFECT}
    of_stream = {*StreamOptions.model_fields, *_STREAM_NO_EFFECT}
    of_message = {*ServedMessage.model_fields, *_MESSAGE_NO_EFFECT}
    messages = values.get("messages") if kind is ServedChat else None
    parts: list[tuple[str, type[BaseModel], Any, set[str]]] = [
        ("", kind, values, of_request), ("stream_options.", StreamOptions, values.get("stream_options"), of_stream),
        *(("messages.", ServedMessage, m, of_message) for m in (messages if isinstance(messages, list) else ())),
    ]  # fmt: skip
    unknown: dict[tuple[str, str], set[str]] = {}
    for path, model, part, known in parts:
        for name, value in part.items() if isinstance(part, dict) else ():
            if name in known or value is None or (path, name) in unknown or len(unknown) > MAX_UNKNOWN:
                continue
            there = {key for key, field in model.model_fields.items() if field.is_required() and key in part}
            unknown[path, name] = known - there - NO_EFFECT
    return [(path, name, known) for (path, name), known in unknown.items()]


def _fields_of_other(kind: type[ServedChat] | type[ServedCompletion]) -> set[str]:
    other = ServedCompletion if kind is ServedChat else ServedChat
    return {*other.model_fields}.difference(kind.model_fields)


def _meant(name: str, known: Collection[str]) -> str | None:
    """Return the known field that a name seems to mean: maxTokens, max_token."""
    plain = {field.replace("_", ""): field for field in known}
    word = "".join(character for character in name.lower() if character.isalnum())
    near = difflib.get_close_matches(word, plain, n=1, cutoff=_CLOSE) if len(word) <= 40 else []
    return plain[near[0]] if near else None
