"""The endpoint as OpenAI's client sees it: answers whole and streamed, reasoning, log-probabilities, many at once."""

import concurrent.futures
import threading

import openai
import pytest

from bmjax.weights.tokenizer import load_tokenizer
from tests.conftest import byte_tokenizer
from tests.generate.server.scripted import (
    TOKENIZER,
    ScriptedEngine,
    Serving,
    ask,
    echo,
    encode,
    letters,
    make_client,
    wait_until,
)


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "bmjax")
    assert client.models.retrieve("models/tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_a_chat_with_finish_reason_and_usage(client):
    reply = ask(client, "What is 1 + 2?")
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        "What is 1 + 2?",
        "assistant",
        "stop",
    )
    assert getattr(choice.message, "reasoning_content", None) is None and choice.logprobs is None
    prompt = "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert reply.usage.prompt_tokens == len(encode(prompt))
    assert reply.usage.completion_tokens == len("What is 1 + 2?")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    cut = ask(client, "What is 1 + 2?", max_completion_tokens=4, max_tokens=100)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("What", "length")


THOUGHT = "[think]\n two and\n\ntwo\n[/think]\n\nf\u00fcr \u2603!\n"


def test_reasoning_is_apart(client):
    message = ask(client, THOUGHT).choices[0].message
    assert (message.reasoning_content, message.content) == ("two and\n\ntwo", "f\u00fcr \u2603!")


def test_a_thought_without_its_opening_tag_is_apart_in_a_whole_reply(client):
    reply = ask(client, "two[/think]4", n=2)
    for choice in reply.choices:
        assert (choice.message.reasoning_content, choice.message.content) == ("two", "4")
    # A stream has told the thought before its end says what it was; the tag stays, so that the client can split it.
    deltas = [chunk.choices[0].delta for chunk in ask(client, "two[/think]4", stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "two</think>4"


def test_reasoning_is_apart_where_the_template_opens_the_thought():
    template = TOKENIZER.chat_template.replace("assistant\\n", "assistant\\n<think>\\n")
    assert template != TOKENIZER.chat_template
    with Serving(ScriptedEngine(echo), template=template) as serving:
        client = make_client(serving)
        for text, expected in (("a[/think]b", ("a", "b")), ("[think]a[/think]b", ("a", "b")), ("ab", ("ab", ""))):
            message = ask(client, text).choices[0].message
            assert (message.reasoning_content, message.content) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_the_template_refuses_is_a_400_with_its_words(stream):
    template = (
        "{% for message in messages %}{{ raise_exception('no system turns') if message.role == 'system' }}"
        "{{ message.content }}{% endfor %}{{ messages[0].content.missing.deeper if messages[0].content == 'x' }}"
    )
    with Serving(ScriptedEngine(echo), template=template) as serving:
        client = make_client(serving)
        for turn, words in (({"role": "system", "content": "a"}, "no system turns"),
                            ({"role": "developer", "content": "a"}, "no system turns"),
                            ({"role": "user", "content": "x"}, "has no attribute"),
                            ({"role": "user", "content": []}, "empty")):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match=words) as refusal:
                client.chat.completions.create(model="tiny", messages=[turn], stream=stream)
            assert refusal.value.param == "messages"
        assert ask(client, "still here").choices[0].message.content == "still here"


@pytest.mark.parametrize(("opening", "answer"), [("", "<think>two</think>4"), ("<think>\\n", "two</think>4")])
def test_thinking_tags_that_are_special_tokens_are_split_off(opening, answer):
    template = TOKENIZER.chat_template.replace("assistant\\n", f"assistant\\n{opening}")
    tokens = encode(answer)
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == "two4"  # the tags are special
    with Serving(ScriptedEngine(lambda request: tokens), template=template) as serving:
        client = make_client(serving)
        message = ask(client, "?").choices[0].message
        assert (message.reasoning_content, message.content) == ("two", "4")
        deltas = [chunk.choices[0].delta for chunk in ask(client, "?", stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "two"
        assert "".join(delta.content or "" for delta in deltas) == "4"
        assert ask(client, "?", stop="</think>").choices[0].message.reasoning_content == "two"
        # A completion's text is that of bmjax.generate.
        assert client.completions.create(model="tiny", prompt="?").choices[0].text == "two4"


@pytest.mark.parametrize("text", ["plain text\n", THOUGHT, "\u2603" * 5])
def test_a_stream_holds_what_the_whole_reply_does(client, text):
    whole = ask(client, text).choices[0]
    chunks = list(ask(client, text, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and len(deltas) > 5
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == (getattr(whole.message, "reasoning_content", None) or "")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)


def test_n_answers_by_their_index_whole_and_streamed(client, serving, monkeypatch):
    monkeypatch.setattr(serving.engine, "answer", lambda request: letters(f"sample {request.sample}"))
    reply = ask(client, "?", n=3, seed=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == [f"sample {i}" for i in range(3)]
    texts = ["", "", ""]
    for chunk in ask(client, "?", n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [f"sample {i}" for i in range(3)]


def test_what_the_engine_is_asked(client, serving, monkeypatch):
    seen = []
    monkeypatch.setattr(serving.engine, "answer", lambda request: seen.append(request) or letters("x"))
    sampling = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "stop_token_ids": [7], "ignore_eos": True}
    ask(
        client,
        "?",
        temperature=0.3,
        top_p=0.9,
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        max_tokens=9,
        extra_body=sampling,
    )
    ask(client, "?")
    ask(client, "?")
    first, second, third = (request.sampling for request in seen)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.repetition_penalty) == (
        0.3,
        0.9,
        5,
        0.1,
        1.5,
    )
    assert (first.seed, first.logprobs, first.max_new_tokens) == (2**32 - 1, 3, 9)
    assert first.end_ids == (7,) and first.ignore_end
    assert (second.temperature, second.top_p, second.logprobs) == (1.0, 1.0, None)
    assert second.max_new_tokens == 256 - len(seen[1].tokens) and second.seed != third.seed


def test_prompts_without_a_seed_draw_numbers_of_their_own(client, serving, monkeypatch):
    seen = []
    monkeypatch.setattr(serving.engine, "answer", lambda request: seen.append(request) or letters("x"))
    client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    client.completions.create(model="tiny", prompt=["a", "a"], n=2, seed=5)
    first, again, other, _ = ((request.sampling.seed, request.sample) for request in seen[:4])
    assert first[0] == again[0] != other[0] and (first[1], again[1], other[1]) == (0, 1, 0)
    assert {request.sampling.seed for request in seen[4:]} == {5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "expected"), [("b c", "a "), (["zz", "c", "d"], "a b "), ("a", ""), ("?", "a b c d")])
def test_a_stop_string_ends_the_answer_and_frees_the_slot(client, serving, stop, expected, stream):
    tail = "" if stop == "?" else " and much more" * 10
    reply = ask(client, "a b c d" + tail, stop=stop, stream=stream)
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")
    wait_until(lambda: serving.worker.active == 0, 10)


def test_logprobs_of_a_chat(client):
    (choice,) = ask(client, "a\u2603", logprobs=True, top_logprobs=2).choices
    tokens = letters("a\u2603")
    assert [entry.logprob for entry in choice.logprobs.content] == [-token / 100 for token in tokens]
    assert choice.logprobs.content[0].token == "a" and choice.logprobs.content[1].token.startswith("bytes:\\xe2")
    assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes).decode() == "a\u2603"
    assert [top.logprob for top in choice.logprobs.content[0].top_logprobs] == [-0.30, -0.31]
    assert len(ask(client, "ab", logprobs=True).choices[0].logprobs.content[0].top_logprobs) == 0
    streamed = [c.choices[0].logprobs for c in ask(client, "a\u2603", logprobs=True, top_logprobs=2, stream=True)]
    assert [e.logprob for part in streamed if part for e in part.content] == [-token / 100 for token in tokens]


def test_completions_of_texts_and_of_token_ids(client):
    for prompt in ("1 + 2", encode("1 + 2")):
        reply = client.completions.create(model="tiny", prompt=prompt)
        assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.object) == (
            "1 + 2",
            "stop",
            "text_completion",
        )
        assert reply.usage.prompt_tokens == len(encode("1 + 2"))
    for prompts in (["a b", "c"], [encode("a b"), encode("c")]):
        reply = client.completions.create(model="tiny", prompt=prompts, n=2)
        assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "a b"), (1, "a b"), (2, "c"), (3, "c")]
    assert client.completions.create(model="tiny", prompt="x" * 30).usage.completion_tokens == 16
    streamed = client.completions.create(model="tiny", prompt="abc", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abc"


def test_prompts_are_read_whole_whatever_the_tokenizer_was_saved_with(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    with Serving(ScriptedEngine(echo), tokenizer=load_tokenizer(tmp_path)) as serving:
        for text in ("What is 12 + 34 + 56?", "1"):
            reply = make_client(serving).completions.create(model="tiny", prompt=text, max_tokens=99)
            assert (reply.choices[0].text, reply.usage.prompt_tokens) == (text, len(encode(text)))


def test_echo_with_logprobs_tells_those_of_the_prompt(client):
    prompt = "a\u2603b"
    tokens = encode(prompt)
    reply = client.completions.create(model="tiny", prompt=tokens, echo=True, logprobs=1, max_tokens=1, temperature=0)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == (prompt + "a", "length")
    assert choice.logprobs.token_logprobs == [None, *(-token / 100 for token in tokens[1:]), -tokens[0] / 100]
    assert choice.logprobs.tokens[0] == "a" and choice.logprobs.tokens[-2:] == ["b", "a"]
    assert choice.logprobs.text_offset == [0, *[1] * (len(tokens) - 2), 2, 3]
    assert choice.logprobs.top_logprobs[0] is None
    for top, logprob in list(zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True))[1:]:
        assert -0.3 in top.values() and logprob in top.values()
    reply = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    assert reply.choices[0].text == prompt and len(reply.choices[0].logprobs.tokens) == len(tokens)
    assert reply.usage.completion_tokens == 0
    assert client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=2).choices[0].text[:3] == prompt


def test_every_client_gets_its_own_answer(serving):
    """Streams of 40 clients at once, each with a text of its own, some whole, some as completions."""

    def converse(number: int) -> bool:
        client = make_client(serving)
        said = f"client {number}: " + "abcdefgh"[number % 8] * (number % 23)
        if number % 3 == 0:
            return ask(client, said).choices[0].message.content == said
        if number % 3 == 1:
            return client.completions.create(model="tiny", prompt=said, max_tokens=200).choices[0].text == said
        chunks = ask(client, said, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert all(pool.map(converse, range(40)))


def test_all_of_the_engine_happens_in_one_thread(serving):
    assert len(serving.engine.threads) == 1 and threading.get_ident() not in serving.engine.threads
