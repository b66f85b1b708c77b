"""Requests and replies of the OpenAI chat API, as clients send and servers answer them.

A field that is not listed is sent along in a request and ignored in a reply.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ChatMessage(BaseModel):
    """A turn. Reasoning comes as `reasoning_content` (DeepSeek's API), `reasoning` (vLLM), or inside `content`."""

    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatRequest(BaseModel):
    """The body of POST /chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


class ChatChoice(BaseModel):
    """One of the answers to a request; `finish_reason` is `length` where it was cut off at max_tokens."""

    message: ChatMessage
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """The body of an answer; `usage` counts tokens, where the endpoint does."""

    choices: list[ChatChoice] = Field(min_length=1)
    usage: Any = None
