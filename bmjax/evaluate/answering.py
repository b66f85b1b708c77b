"""Who answers: a model in this process, or one behind an endpoint. Both hand back answers one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bmjax.evaluate.questions import Asked
from bmjax.evaluate.settings import EvalSettings


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        text: with its thought between <think> and </think>.
        finish_reason: stop or length, an endpoint's own word, or over_context where the prompt could not be read.
        tokens, prompt_tokens: their numbers; None where an endpoint does not tell.
        seed: what the sampling was seeded with.
    """

    text: str
    finish_reason: str
    tokens: int | None = None
    prompt_tokens: int | None = None
    seed: int | None = None


# Called with every answer as it ends, maybe by several threads.
Receive = Callable[[Asked, Generated], None]


class Answerer(Protocol):
    """A model that answers samples.

    Attributes:
        identity: what of the model decides an answer, part of the samples' ids.
    """

    identity: str

    def check(self, name: str, asked: Sequence[Asked]) -> None:
        """Find what is wrong with prompts before anything is asked. UserError names the row."""

    def answer(self, name: str, asked: Sequence[Asked], receive: Receive) -> list[str]:
        """Answer the samples of a task, in any order; return why some got no answer, a line for each.

        Raises:
            UserError: for what ends the evaluation, such as an endpoint that cannot be reached.
            KeyboardInterrupt: once what had arrived was handed to `receive`.
        """


def sampling_of(settings: EvalSettings, name: str) -> dict[str, Any]:
    """Return what decides an answer of a task beside model and prompt; part of the samples' ids."""
    values: dict[str, Any] = {
        key: settings.of_task(name, key) for key in ("temperature", "top_p", "max_new_tokens", "seed")
    }
    optional: Mapping[str, Any] = {"system": settings.of_task(name, "system"), "template": settings.template}
    values |= {key: value for key, value in optional.items() if value is not None}
    return values | ({"extra": settings.extra} if settings.extra else {})


def turns(settings: EvalSettings, name: str, prompt: str) -> list[dict[str, str]]:
    """Return the turns of a chat that asks a prompt."""
    system = settings.of_task(name, "system")
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
