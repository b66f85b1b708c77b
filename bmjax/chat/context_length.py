"""Tells whether an endpoint refused a request because it is longer than the model's context, and what is too long.

OpenAI's code of such a refusal is `context_length_exceeded`. Many servers have no code but words of their own, which
differ from version to version. replies.py asks here for every error object that it reads.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Names of the fields `code` and `type`: OpenAI's and bmjax's, llama.cpp's, Z.ai's, LiteLLM's, Copilot's.
_NAME = re.compile(
    r"context_?(?:length|window)_?exceeded|exceed_context_size|model_max_prompt_tokens_exceeded", re.IGNORECASE
)
_STATUSES = (None, 200, 400, 413, 422)  # of refusals that only their words tell; None and 200: within an answer
# A limit of tokens a minute is no limit of the model's, though "the request is too large" for it.
_OF_A_RATE = re.compile(
    r"per[ _-]?(?:min|second|hour|day)|\b[TR]P[MDS]\b|rate[ _-]?limit|too many requests|throttl|quota|credit|balance",
    re.IGNORECASE,
)
_WORDS = re.compile(
    r"|".join(
        (
            # OpenAI, vLLM, SGLang, DeepSeek, OpenRouter, Mistral, llama.cpp, LM Studio, Ollama, MiniMax
            r"context (?:length|window|size)",
            # Anthropic, Bedrock, Gemini, Poolside, vLLM before 0.10, Kimi
            r"\b(?:prompt|input (?:is|length|tokens?))\b[^.]{0,80}\b(?:too long|longer than|exceed(?:s|ed)?)\b",
            r"exceeded model token limit|too many tokens in (?:the )?prompt",  # Kimi
            r"maximum (?:prompt|input) length",  # xAI
            r"`inputs`[^.]{0,40} must (?:be <=|have less than)",  # TGI, Together
            r"range of input length",  # DashScope
            r"reduce the length of (?:the|your) (?:messages|input|prompt)",  # Groq, Cerebras
        )
    ),
    re.IGNORECASE,
)


def _count_in(*forms: str) -> re.Pattern[str]:
    """Return the pattern of a number in one of some forms of words, where N stands for it."""
    return re.compile("|".join(form.replace("N", r"(\d[\d,]*)") for form in forms), re.IGNORECASE)


_PROMPT = _count_in(
    r"\(N (?:in the messages|of text input|tokens\) (?:is longer|exceeds))",
    r"N (?:tokens from the input|`inputs` tokens|input tokens)",
    r"(?:prompt|request) (?:contains|has) (?:at least )?N",
    r"(?:resulted in|must have less than \d+ tokens\. Given:) N",
    r"(?:input length|input token count|prompt) \(?(?:length )?N",
    r"(?:prompt is too long|messages|prompt): N tokens",
)
_LIMIT = _count_in(
    r"> N maximum",
    r"N maximum context length",
    r"(?:context|maximum prompt|maximum model) (?:length|window|size|holds)(?: is| of| only)* \(?N",
    r"(?:must be <=|less than|tokens allowed|allowed input length of) \(?N",
)


@dataclass(frozen=True)
class Excess:
    """A refusal for the context's length.

    Attributes:
        prompt, context: their tokens; None where the words do not tell them.
        is_least: whether the prompt has that many tokens at the least.
    """

    prompt: int | None = None
    context: int | None = None
    is_least: bool = False

    @property
    def room(self) -> int | None:
        """The tokens that the context has beside the prompt; None where the words do not tell them."""
        if self.prompt is None or self.context is None or self.is_least or self.prompt >= self.context:
            return None
        return self.context - self.prompt

    @property
    def is_of_prompt(self) -> bool:
        """Whether the prompt alone is known to fill the context; else prompt and answer may be too long together."""
        return self.prompt is not None and self.context is not None and self.prompt >= self.context


def context_excess(message: str, names: Iterable[str] = (), status: int | None = None) -> Excess | None:
    """Return what an error says of the context's length; None where it speaks of something else.

    Arguments:
        message: its words.
        names: of its fields `code`, `type` and the like.
        status: of the reply; None for an error within an answer.
    """
    names = " ".join(names)
    is_named = _NAME.search(f"{names} {message}") is not None
    is_of_a_rate = status == 429 or "rate_limit" in names or (not is_named and _OF_A_RATE.search(message))
    if is_of_a_rate or not (is_named or (status in _STATUSES and _WORDS.search(message))):
        return None
    prompt = _PROMPT.search(message)
    is_least = prompt is not None and "at least" in prompt[0].lower()
    return Excess(_count(prompt), _count(_LIMIT.search(message)), is_least)


def _count(match: re.Match[str] | None) -> int | None:
    """Return the number in whichever group of a match has one."""
    return None if match is None else int(next(filter(None, match.groups())).replace(",", ""))
