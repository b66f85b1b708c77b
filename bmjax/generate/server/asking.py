"""From a decoded request to what the engine is asked, and from its tokens back to pieces of text.

No HTTP here: app.py reads bodies and writes replies around it.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.chat.forms import read_conversation
from bmjax.chat.openai import RequestError, ServedChat, ServedCompletion, ServedRequest
from bmjax.chat.reasoning import THINKING_TAGS, ThinkSplitter, opens_thought, split_answer
from bmjax.chat.template import render_prompt
from bmjax.config import UserError
from bmjax.generate.requests import FinishReason, Request, Sampling, Token
from bmjax.generate.server.replies import Piece
from bmjax.generate.text import TextStream

COMPLETION_TOKENS = 16  # of a completion that does not say, as OpenAI has it


@dataclass(frozen=True)
class Served:
    """The model that a server answers with.

    Attributes:
        name: its name at the endpoint.
        names: all names that a request may give.
        tokenizer: transformers' fast tokenizer.
        template: the Jinja text of its chat template; None where it has none, and chats are refused.
        context: most tokens of a prompt and its answer.
        vocab_size: rows of its embedding.
        max_tokens: longest answer of a chat that does not say; None: the rest of the context.
        seed: of requests that give none; None: another one each time.
    """

    name: str
    names: frozenset[str]
    tokenizer: Any
    template: str | None
    context: int
    vocab_size: int
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens. is_open: whether it ends with <think>, so that the answer begins in a thought."""

    text: str
    tokens: tuple[int, ...]
    is_open: bool = False


def check_model(served: Served, model: str) -> None:
    """Raise RequestError, 404, unless a name is the served model's."""
    if model not in served.names:
        message = f"model: '{model[:200]}' is not served here; this is '{served.name}'"
        raise RequestError(message, "model", "model_not_found", status=404)


def chat_prompt(served: Served, chat: ServedChat) -> Prompt:
    """Render a chat with the template, up to the opening of the assistant's turn. RequestError where it cannot be."""
    if served.template is None:
        raise RequestError("messages: the model has no chat template; start bmjax serve with template=", "messages")
    turns = [message.model_dump(include={"role", "content", "reasoning_content"}) for message in chat.messages]
    try:
        messages = read_conversation({"messages": turns}, "request").messages
        text = render_prompt(served.tokenizer, messages, served.template, "messages")
    except UserError as error:
        raise RequestError(str(error), "messages") from None
    prompt = Prompt(text, _encode(served, text), opens_thought(text))
    _check_tokens(served, prompt.tokens, "messages", served.context - 1)
    return prompt


def completion_prompts(served: Served, completion: ServedCompletion) -> list[Prompt]:
    """Return the prompts of a completion, as they stand. RequestError for one that the model cannot read."""
    prompts: list[Prompt] = []
    given: Sequence[str | list[int]] = completion.prompt
    longest = served.context if _is_scoring(completion) else served.context - 1
    for index, prompt in enumerate(given):
        label = "prompt" if len(given) == 1 else f"prompt {index}"
        if isinstance(prompt, str):
            prompts.append(Prompt(prompt, _encode(served, prompt)))
            _check_tokens(served, prompts[-1].tokens, label, longest)
        else:
            _check_tokens(served, prompt, label, longest)
            prompts.append(Prompt(served.tokenizer.decode(prompt), tuple(prompt)))
    return prompts


def _is_scoring(completion: ServedCompletion) -> bool:
    """Return whether only the prompt is read, which may fill the context then."""
    return bool(completion.echo) and completion.max_tokens == 0


def _encode(served: Served, text: str) -> tuple[int, ...]:
    # The fast tokenizer itself: transformers' wrapper changes its state, and threads share it here.
    return tuple(served.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _check_tokens(served: Served, tokens: Sequence[int], label: str, longest: int) -> None:
    param = label.split()[0]
    if not tokens:
        raise RequestError(f"{label}: empty; expected at least one token", param)
    if len(tokens) > longest:
        # In words that clients look for: "context length is", "prompt has".
        answer = " with the answer" if longest < served.context else ""
        raise RequestError(
            f"{label}: the prompt has {len(tokens)} tokens, the model's context length is {served.context}{answer}; "
            "shorten it", param, "context_length_exceeded",
        )  # fmt: skip
    wrong = min(tokens) if min(tokens) < 0 else max(tokens)
    if not 0 <= wrong < served.vocab_size:
        raise RequestError(f"{label}: token id {wrong}, the vocabulary has 0..{served.vocab_size - 1}", param)


def engine_requests(served: Served, asked: ServedRequest, prompts: Sequence[Prompt]) -> list[Request]:
    """Return what the engine is asked: `n` samples of every prompt, prompt after prompt.

    An answer that would not fit the context with its prompt is cut at the context's end; it ends with 'length'.
    """
    if isinstance(asked, ServedChat):
        limit = asked.max_completion_tokens or asked.max_tokens or served.max_tokens or served.context
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        is_read = False
    else:
        assert isinstance(asked, ServedCompletion)
        limit = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        logprobs = asked.logprobs
        is_read = bool(asked.echo) and (logprobs is not None or limit == 0)
    given_seed = served.seed if asked.seed is None else asked.seed
    requests = []
    for prompt in prompts:
        # Of their own: a prompt that is there twice would else be answered twice alike.
        seed = secrets.randbits(32) if given_seed is None else given_seed
        sampling = Sampling(
            max_new_tokens=min(limit, served.context - len(prompt.tokens)),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(0, asked.top_k or 0),
            min_p=asked.min_p or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            seed=seed % 2**32,
            logprobs=logprobs,
            end_ids=tuple(asked.stop_token_ids or ()),
            ignore_end=bool(asked.ignore_eos),
        )
        requests += [Request(prompt.tokens, sampling, n, is_read) for n in range(asked.n or 1)]
    return requests


class Answer:
    """One answer while its tokens arrive: text, reasoning apart, stop strings, the echoed prompt.

    A chat that is not streamed is split once all of its text is there.

    Attributes:
        is_ended: whether nothing follows; the engine may still go on, and should then be told to stop.
        count: tokens so far.
    """

    def __init__(self, served: Served, asked: ServedRequest, prompt: Prompt) -> None:
        self.is_ended, self.count = False, 0
        is_chat = isinstance(asked, ServedChat)  # a completion's text is that of `bmjax.generate`
        self._text = TextStream(served.tokenizer, asked.stop or (), THINKING_TAGS if is_chat else ())
        self._splitter = ThinkSplitter(prompt.is_open) if is_chat and asked.stream else None
        self._unsplit: list[str] | None = [] if is_chat and not asked.stream else None
        self._is_open = prompt.is_open
        self._echo = prompt.text if isinstance(asked, ServedCompletion) and asked.echo else None

    def add(self, tokens: Sequence[Token], reason: FinishReason | None, prompt_tokens: Sequence[Token] = ()) -> Piece:
        """Take tokens and why the answer ended after them; return what they add.

        prompt_tokens: of a prompt whose log-probabilities were asked for; they go before the first token.
        """
        texts, kept, shown = [], [], list(prompt_tokens) if self._echo is not None else []
        for token in tokens:  # one by one, for none that follows a stop string counts
            texts.append(self._text.push([token.id]))
            kept.append(token)
            if self._text.stopped is not None:
                reason = "stop"
                break
        self.is_ended = reason is not None
        if self.is_ended:
            texts.append(self._text.finish())
            reason = reason if self._text.stopped is None else "stop"  # the last text may hold one, too
        self.count += len(kept)
        text, reasoning = "".join(texts), ""
        if self._splitter is not None:
            reasoning, text = self._splitter.feed(text, self.is_ended)
        elif self._unsplit is not None:
            self._unsplit.append(text)
            text = ""
            if self.is_ended:
                reasoning, text = split_answer("".join(self._unsplit), self._is_open)
        if self._echo is not None:
            text, self._echo = self._echo + text, None
        return Piece(text, reasoning, [*shown, *kept], reason)
