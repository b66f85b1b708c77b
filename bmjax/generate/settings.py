"""The settings of `bmjax serve` and `bmjax chat`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bmjax.config import Settings


class EngineSettings(Settings):
    """A model that generates, and how it is computed."""

    template: str | None = Field(
        None, description="chat template: null for the model's own, a name that bmjax train lists, or FILE.jinja"
    )
    context: int | None = Field(None, ge=2, description="most tokens of prompt and answer; null: the model's context")
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of weights and activations")
    quantized_cache: bool = Field(
        False, description="keep keys and values as int8: room for about twice (of float32 four times) as many tokens"
    )
    mesh: dict[str, int] = Field(
        {}, description="devices along data, fsdp, context, tensor; -1: the rest; without any, one device"
    )


class ServeSettings(EngineSettings):
    """`bmjax serve MODEL`: a model behind an OpenAI-compatible endpoint."""

    model: str = Field(description="Hugging Face directory or hub id")
    name: str | None = Field(None, description="the model's name at the endpoint; null: its hub id or directory's name")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine's")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0: a free one")
    slots: int = Field(32, ge=1, description="answers that are generated at once")
    queue: int = Field(256, ge=0, description="answers that may wait for a slot; more are refused with 429")
    compile_ahead: bool = Field(
        True, description="compile every size of the batch before listening; false: when requests first need it"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="longest answer of chats that do not say; null: the rest of the context"
    )
    seed: int | None = Field(None, description="of requests without one; null: another one each time")
    api_key_env: str | None = Field(None, description="environment variable with the key that clients must send")
    drain_seconds: float = Field(60.0, ge=0, description="how long a stop waits for the answers that are under way")


class ChatSettings(EngineSettings):
    """`bmjax chat MODEL`: talk to a model in the terminal, computed here or behind an endpoint."""

    model: str | None = Field(None, description="Hugging Face directory or hub id, or the model's name at base_url")
    base_url: str | None = Field(None, description="an OpenAI-compatible endpoint up to /v1, in place of a model here")
    api_key_env: str | None = Field(None, description="environment variable holding the endpoint's API key")
    system: str | None = Field(None, description="a system turn before the conversation")
    temperature: float = Field(0.6, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling")
    max_tokens: int | None = Field(None, ge=1, description="longest answer; null: the rest of the context")
    seed: int = Field(0, description="of the sampling; +1 an answer")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.model is None and self.base_url is None:
            raise ValueError("model: missing; give a Hugging Face directory, a hub id or an endpoint's URL")
        return self
