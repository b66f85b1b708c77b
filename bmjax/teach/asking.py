"""What a request of a model holds beside the prompt, from the settings, and the client that sends it."""

from typing import Any

from bmjax.config import UserError
from bmjax.teach.client import ChatClient, Limits
from bmjax.teach.endpoint import api_key
from bmjax.teach.settings import ConnectionSettings, EndpointSettings, TeacherSettings
from bmjax.urls import Address


def request_parameters(teacher: TeacherSettings, index: int) -> dict[str, Any]:
    """Return the parameters of a request for a sample; every sample of a problem has a seed of its own."""
    request = sampling_parameters(teacher)
    if teacher.seed is not None:
        request["seed"] = teacher.seed + index
    if teacher.system is not None:
        del request["system"]  # a turn, see `system_turn`
    if teacher.logprobs is not None:
        request |= {"logprobs": True, "top_logprobs": teacher.logprobs}
    return request


def system_turn(model: EndpointSettings) -> list[dict[str, str]]:
    """Return the turn before a prompt, in a list; none without the key `system`."""
    return [] if model.system is None else [{"role": "system", "content": model.system}]


def make_client(model: ConnectionSettings, concurrency: int, takes_empty: bool = False) -> ChatClient:
    """Return a client of a model. UserError for a key, an address or an environment that cannot be used.

    takes_empty: as of `ChatClient`.
    """
    base_url, name = endpoint(model)
    limits = Limits(model.requests_per_second, model.requests_per_minute, model.tokens_per_minute)
    return ChatClient(
        base_url, name, api_key(model.api_key_env), concurrency, model.retries, model.timeout, model.stream, limits,
        model.patience, takes_empty,
    )  # fmt: skip


def sampling_parameters(model: EndpointSettings) -> dict[str, Any]:
    """Return what decides an answer besides the prompt and the sample. It is part of the record's id."""
    names = ["temperature", "top_p", "max_tokens"]
    parameters = {name: getattr(model, name) for name in names}
    if isinstance(model, TeacherSettings):
        parameters["seed"] = model.seed
        # Keys that were not there when the first traces were collected are part of an id only where they are set.
        parameters |= {k: v for k, v in (("system", model.system), ("logprobs", model.logprobs)) if v is not None}
    return parameters | model.extra


def endpoint(model: ConnectionSettings, key: str = "teacher") -> tuple[str, str]:
    """Return (base_url, model) of a model; UserError naming the key that is missing."""
    if not model.base_url:
        raise UserError(f"key '{key}.base_url' is missing; give the endpoint, e.g. http://localhost:8000/v1")
    if not model.model:
        raise UserError(f"key '{key}.model' is missing; name the model as the endpoint knows it")
    Address.parse(model.base_url)
    return model.base_url, model.model
