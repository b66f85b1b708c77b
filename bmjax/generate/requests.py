"""What the engine is asked and what it answers: requests, tokens and why a generation ends. Token ids only, no text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]  # an end token; max_new_tokens or the context; `cancel`


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most tokens that are drawn, an end token among them, as transformers counts. 0 only with
            `Request.prompt_logprobs`, for scoring.
        temperature: 0 takes the likeliest token; logits are divided by it otherwise.
        top_p: only the least set of tokens with this probability is sampled from (arXiv 1904.09751).
        top_k: only so many of the likeliest tokens are sampled from; 0: all.
        min_p: only tokens with at least this share of the likeliest one's probability (arXiv 2407.01082).
        repetition_penalty: divides positive logits, multiplies negative ones, of tokens in prompt and answer
            (arXiv 1909.05858).
        seed: of the random numbers; with `Request.sample` it makes them, whoever shares the batch.
        logprobs: report each token's log-probability and those of so many of the likeliest tokens, at most 20; None:
            none.
        end_ids: tokens that end the answer besides the model's.
        ignore_end: go on after the model's end tokens, as benchmarks of speed do.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    end_ids: tuple[int, ...] = ()
    ignore_end: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        tokens: the prompt's token ids.
        sampling: how its answer's tokens are chosen.
        sample: the number of the sample, where a prompt is answered several times.
        prompt_logprobs: also report the log-probability of every prompt token after the first.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    sample: int = 0
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer or a prompt.

    Attributes:
        id: the token.
        logprob: its log-probability under the model, before temperature, filters and penalty; None if not asked for.
        likeliest: (token id, log-probability) of the `logprobs` likeliest tokens in its place, best first.
    """

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


# Called with the next tokens of an answer (an end token is not among them) and why it ended, None while it goes on.
OnTokens = Callable[[Sequence[Token], FinishReason | None], None]


class Running(Protocol):
    """A request that the engine works on, as `submit` returns it.

    Attributes:
        request: the request.
        prompt_tokens: with `prompt_logprobs`, the prompt's tokens, once they have been read; the first has no logprob.
        finish_reason: why it ended; None while it goes on.
    """

    request: Request
    prompt_tokens: Sequence[Token]
    finish_reason: FinishReason | None


class Generator(Protocol):
    """An engine: takes requests at any time and continues all of them together."""

    def submit(self, request: Request, on_tokens: OnTokens) -> Running:
        """Queue a request; `on_tokens` is called from `step`. UserError for one that the model cannot answer."""

    def cancel(self, running: Any) -> None:
        """End a request, as `submit` returned it, with 'cancelled' at the next step; its slot goes to another."""

    def step(self) -> bool:
        """Admit waiting requests, decode some tokens of each; return whether work is left."""
