"""Log-likelihoods and texts of many prompts through an engine, as harnesses ask for them. lm_eval_model.py is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError
from bmjax.generate.requests import FinishReason, Generator, OnTokens, Request, Sampling, Token
from bmjax.generate.text import TextStream


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation, in nats, and whether greedy decoding would write it."""

    logprob: float
    is_greedy: bool


def loglikelihoods(
    engine: Generator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], context: int
) -> tuple[list[Likelihood], int]:
    """Score continuations of contexts, all as token ids.

    Arguments:
        engine: computes the log-probabilities.
        pairs: (context, continuation) each; a context has at least one token.
        context: tokens that the engine reads at most. Longer pairs lose the beginning of their context.

    Returns: the likelihoods in order, and how many contexts were cut.
    Raises: UserError for a pair without a context, and a continuation that does not fit by itself.
    """
    results: list[Likelihood | None] = [None] * len(pairs)
    running: list[Any] = []

    def noting(number: int) -> OnTokens:
        """Keep the sum of a pair that has been read, and let go of its tokens: tasks have millions."""

        def note(_: Sequence[Token], reason: FinishReason | None) -> None:
            if reason is None:
                return
            scored, running[number] = running[number], None
            tokens = scored.prompt_tokens[len(scored.prompt_tokens) - len(pairs[number][1]) :]
            logprob = math.fsum(token.logprob for token in tokens)
            results[number] = Likelihood(logprob, all(token.likeliest[0][0] == token.id for token in tokens))

        return note

    cut = 0
    sampling = Sampling(max_new_tokens=0, logprobs=1)
    for number, (before, after) in enumerate(pairs):
        if not before:
            raise UserError(f"loglikelihood: pair {number} has no context; put the prefix token there")
        if len(after) >= context:
            raise UserError(
                f"loglikelihood: continuation {number} has {len(after)} tokens, the context holds {context} with one "
                "token before it; it cannot be scored at once"
            )
        tokens = (*before, *after)
        cut += len(tokens) > context
        request = Request(tokens[-context:], sampling, prompt_logprobs=True)
        running.append(engine.submit(request, noting(number)))
    while engine.step():
        pass
    assert all(result is not None for result in results)
    return [result for result in results if result is not None], cut


def continue_texts(
    engine: Generator, tokenizer: Any, prompts: Sequence[tuple[Sequence[int], Sampling, Sequence[str]]]
) -> list[str]:
    """Continue prompts; return the texts in order.

    Arguments:
        engine: generates.
        tokenizer: turns tokens into text.
        prompts: (token ids, sampling, stop strings) each; a text ends before its first stop string. Random numbers come
            from the seed and the prompt's number.
    """
    texts = [TextStream(tokenizer, stop) for _, _, stop in prompts]
    running: list[Any] = []

    def taking(number: int) -> OnTokens:
        def take(tokens: Sequence[Token], _: FinishReason | None) -> None:
            texts[number].push([token.id for token in tokens])
            if texts[number].stopped is not None:
                engine.cancel(running[number])

        return take

    for number, (tokens, sampling, _) in enumerate(prompts):
        request = Request(tuple(tokens), sampling, sample=number)
        running.append(engine.submit(request, taking(number)))
    while engine.step():
        pass
    for text in texts:
        text.finish()
    return [text.text for text in texts]
