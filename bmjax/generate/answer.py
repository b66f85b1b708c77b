"""A request while the engine works on it, and what is checked before it does. The engine's parts share `Answer`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bmjax.config import UserError
from bmjax.generate.requests import FinishReason, OnTokens, Request, Token
from bmjax.model.config import ModelConfig


@dataclass(eq=False)
class Answer:
    """A request that the engine works on; `requests.Running`."""

    request: Request
    on_tokens: OnTokens = field(repr=False)
    prompt: np.ndarray = field(repr=False)  # int32 [P]
    room: int  # tokens that the answer may have
    end_ids: frozenset[int]
    prompt_tokens: Sequence[Token] = ()
    finish_reason: FinishReason | None = None
    slot: int = -1
    read: int = 0  # tokens of the prompt in the cache
    drawn: list[int] = field(default_factory=list)
    leader: "Answer | None" = None  # whose prompt, the same one, is being read for both

    @property
    def ready(self) -> bool:
        """Whether the prompt has been read."""
        return self.read == len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.read + len(self.drawn)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + self.room


def check_prompt(
    config: ModelConfig, prompt: Sequence[int], name: str, context: int | None = None, scoring: bool = False
) -> None:
    """Raise UserError, naming the prompt, unless the model can read it and has room for an answer.

    context: tokens of prompt and answer, None: the model's. scoring: no answer is needed.
    """
    if not len(prompt):
        raise UserError(f"{name}: empty; expected at least one token")
    context = context or config.max_length
    if len(prompt) >= context + scoring:
        answer = "" if scoring else " with the answer"
        raise UserError(f"{name}: {len(prompt)} tokens, the model's context holds {context}{answer}; shorten it")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
        raise UserError(
            f"{name}: token id {low if low < 0 else high}, the model's vocabulary has 0..{config.vocab_size - 1}; "
            "tokenizer and model do not belong together"
        )


def with_logprobs(ids: Iterable[int], parts: Sequence[np.ndarray], count: int) -> list[Token]:
    """Return tokens with their log-probabilities [T] and those of the likeliest [T, M], of which `count` are kept."""
    logprobs, likeliest, likeliest_logprobs = parts
    return [
        Token(
            int(token),
            float(logprobs[i]),
            tuple(zip(likeliest[i, :count].tolist(), likeliest_logprobs[i, :count].tolist(), strict=True)),
        )
        for i, token in enumerate(ids)
    ]
