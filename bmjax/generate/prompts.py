"""Continues a list of prompts through the engine; token ids only. The Python interface and evaluation call it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from bmjax.generate.answer import check_prompt
from bmjax.generate.engine import Engine
from bmjax.generate.requests import FinishReason, OnTokens, Request, Sampling, Token
from bmjax.model.config import ModelConfig


@dataclass(frozen=True)
class Generation:
    """A prompt's new token ids without the end token, and why they end: 'stop' (end token, `is_over`) or 'length'."""

    tokens: tuple[int, ...]
    finish_reason: str


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch: int = 64,
    dtype: Any = jnp.float32,
    is_over: Callable[[int, Sequence[int]], bool] | None = None,
) -> list[Generation]:
    """Continue every prompt (token ids), on the mesh in scope; return the generations in order.

    Where prompt and new tokens together reach the model's context, a generation ends there with 'length'. A prompt's
    random numbers come from the seed and its number. eos_ids: the tokens that end a generation. batch: the most rows at
    a time. dtype: of the computation. is_over: called with a prompt's number and its next tokens; True ends it, with
    'stop'. UserError for an empty prompt, one that fills the model's context, or a token id
    that the model lacks.
    """
    for number, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {number}")
    if not len(prompts):
        return []
    context = min(config.max_length, max(map(len, prompts)) + sampling.max_new_tokens)
    engine = Engine(config, params, eos_ids, dtype=dtype, slots=batch, context=context)
    answers: list[list[int]] = [[] for _ in prompts]

    def collect(number: int) -> OnTokens:
        def on_tokens(tokens: Sequence[Token], reason: FinishReason | None) -> None:
            ids = [token.id for token in tokens]
            answers[number] += ids
            if is_over is not None and is_over(number, ids) and reason is None:
                engine.cancel(running[number])

        return on_tokens

    running = [
        engine.submit(Request(tuple(prompt), sampling, sample=number), collect(number))
        for number, prompt in enumerate(prompts)
    ]
    engine.run()
    reasons = ["stop" if answer.finish_reason == "cancelled" else str(answer.finish_reason) for answer in running]
    return [Generation(tuple(tokens), reason) for tokens, reason in zip(answers, reasons, strict=True)]
