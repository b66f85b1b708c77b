"""Refusals for the context's length, in the words of public servers and providers, and what only looks like one."""

import pytest

from bmjax.chat.context_length import Excess, context_excess
from bmjax.chat.replies import ReplyError, read_completion, read_error


@pytest.mark.parametrize("words, prompt, context", [
    # OpenAI
    ("This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens. Please "
     "reduce the length of the messages.", 5000, 4096),
    ("Your input exceeds the context window of this model. Please adjust your input and try again.", None, None),
    # vLLM, from old to new
    ("This model's maximum context length is 4096 tokens. However, you requested 5021 tokens (4509 in the messages, "
     "512 in the completion). Please reduce the length of the messages or completion.", 4509, 4096),
    ("The decoder prompt (length 12324) is longer than the maximum model length of 8192.", 12324, 8192),
    ("'max_tokens' or 'max_completion_tokens' is too large: 1000. This model's maximum context length is 1000 tokens "
     "and your request has 203 input tokens (1000 > 1000 - 203).", 203, 1000),
    ("This model's maximum context length is 200 tokens. However, your request has 203 input tokens. Please reduce the "
     "length of the input messages.", 203, 200),
    ("This model's maximum context length is 8192 tokens. However, you requested 4096 output tokens and your prompt "
     "contains at least 4097 input tokens, for a total of at least 8193 tokens.", 4097, 8192),
    ("You passed 147421 input tokens and requested 16384 output tokens. However, the model's context length is only "
     "163804 tokens, resulting in a maximum input length of 147420 tokens.", 147421, 163804),
    # SGLang
    ("Requested token count exceeds the model's maximum context length of 131072 tokens. You requested a total of "
     "140000 tokens: 12000 tokens from the input messages and 128000 tokens for the completion.", 12000, 131072),
    ("The input (516368 tokens) is longer than the model's context length (262144 tokens).", 516368, 262144),
    ("Input length (265330) exceeds model's maximum context length (262144).", 265330, 262144),
    # llama.cpp, LM Studio, Ollama
    ("request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it", 9412, 8192),
    ("Trying to keep the first 5210 tokens when context the overflows. However, the model is loaded with context "
     "length of only 4096 tokens, which is not enough.", None, 4096),
    ("prompt too long; exceeded max context length by 10 tokens", None, None),
    # TGI and Together
    ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193. Given: 9000 `inputs` tokens and 512 "
     "`max_new_tokens`", 9000, 8193),
    ("Input validation error: `inputs` must have less than 4096 tokens. Given: 5000", 5000, 4096),
    # DeepSeek, Anthropic, Bedrock, OpenRouter, Poolside, Mistral, xAI, Gemini, Kimi, DashScope, Groq
    ("This model's maximum context length is 65536 tokens. However, you requested 70123 tokens (70123 in the messages, "
     "0 in the completion). Please reduce the length of the messages or completion.", 70123, 65536),
    ("prompt is too long: 213462 tokens > 200000 maximum", 213462, 200000),
    ("Input is too long for requested model.", None, None),
    ("This endpoint's maximum context length is 204800 tokens. However, you requested about 309977 tokens (303247 of "
     "text input, 6730 of tool input).", 303247, 204800),
    ("Input length 131393 exceeds the maximum allowed input length of 131040 tokens.", 131393, 131040),
    ("Prompt contains 40960 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
     40960, 32768),
    ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.", 537812, 131072),
    ("The input token count (1205432) exceeds the maximum number of tokens allowed (1048576).", 1205432, 1048576),
    ("Invalid request: Your request exceeded model token limit: 262144 (requested: 274613)", None, None),
    ("InternalError.Algo.InvalidParameter: Range of input length should be [1, 202745]", None, None),
    ("Please reduce the length of the messages or completion.", None, None),
    ("Prompt has 5,958,968 tokens, but the configured context size is 256,000 tokens.", 5958968, 256000),
    # bmjax
    ("messages: 818 tokens, the context holds 256 with the answer; shorten it", 818, 256),
])  # fmt: skip
def test_words_of_many_servers(words, prompt, context):
    names = ["context_length_exceeded"] if "the context holds" in words else []
    excess = context_excess(words, names, 400)
    assert excess == Excess(prompt, context, is_least="at least" in words)
    assert excess.room is None or excess.room == context - prompt
    assert excess.is_of_prompt == (prompt is not None and context is not None and prompt >= context)
    # An engine that failed says so, too, whatever it says of the context.
    assert names or context_excess(words, (), 500) is None


@pytest.mark.parametrize("name", ["context_length_exceeded", "exceed_context_size_error", "ContextWindowExceededError"])
def test_a_name_is_enough(name):
    assert context_excess("No.", [name], 400) == context_excess("No.", [name], 500) == Excess()
    assert context_excess(f"litellm.{name}: No.", [], 400) == Excess()
    assert context_excess("No.", [name], 429) is None


@pytest.mark.parametrize("words, names, status", [
    ("Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 9512", ["tokens"], 413),
    ("Rate limit reached: the prompt exceeds your limit of tokens per min", [], 400),
    ("Requested tokens exceed the context window", ["rate_limit_exceeded"], 400),
    ("Your prompt exceeds the tokens of your quota", [], 400),
    ("This model's maximum context length is 4096 tokens", [], 429),
    ("max_tokens is too large: 32768. This model supports at most 16384 completion tokens, whereas you provided 32768.",
     ["invalid_request_error"], 400),
    ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", [], 400),
    ("Request Entity Too Large", [], 413),
    ("Unrecognized request argument supplied: top_k", [], 400),
    ("The model `m` does not exist", ["model_not_found"], 404),
])  # fmt: skip
def test_other_errors_are_none(words, names, status):
    assert context_excess(words, names, status) is None


def test_an_error_within_an_answer_says_so_and_stands_for_a_bad_request():
    raw = '{"error": {"message": "prompt is too long: 300 tokens > 200 maximum"}}'
    values = {"error": {"message": "Provider returned error", "metadata": {"raw": raw}}}
    with pytest.raises(ReplyError) as caught:
        read_completion(values)
    assert (caught.value.status, caught.value.excess) == (400, Excess(300, 200))


def test_words_of_the_request_in_an_error_are_none_of_the_errors():
    body = {"messages": [{"role": "user", "content": "What is the maximum context length? The prompt is too long."}]}
    detail = [{"type": "missing", "loc": ["body", "model"], "msg": "Field required", "input": body}]
    assert read_error({"detail": detail}, 422) == ("body.model: Field required", None, None)
