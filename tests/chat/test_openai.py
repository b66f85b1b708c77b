import pytest
from openai.types import chat, completion_create_params

from bmjax.chat.openai import (
    MAX_UNKNOWN,
    NO_EFFECT,
    UNSUPPORTED,
    ChatMessage,
    ChatRequest,
    RequestError,
    ServedChat,
    ServedCompletion,
    read_request,
    unknown_fields,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Q"}]}


def test_a_request_holds_what_was_set_and_extra_fields() -> None:
    turns = [ChatMessage(role="user", content="Q")]
    request = ChatRequest(model="m", messages=turns, seed=3, reasoning_effort="high")
    body = {"model": "m", "messages": [{"role": "user", "content": "Q"}], "seed": 3, "reasoning_effort": "high"}
    assert request.model_dump(exclude_unset=True) == body
    assert ChatRequest.model_validate(body) == request


def test_what_a_client_sends_is_what_the_server_reads() -> None:
    sent = ChatRequest(
        model="m", messages=[ChatMessage(role="user", content="Q")], temperature=0, max_tokens=9, user="u"
    )
    served = read_request(ServedChat, sent.model_dump(exclude_unset=True))
    assert (served.messages[0].content, served.temperature, served.max_tokens) == ("Q", 0, 9)


@pytest.mark.parametrize(("prompt", "expected"), [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
])  # fmt: skip
def test_one_prompt_or_several_as_texts_or_token_ids(prompt, expected) -> None:
    assert read_request(ServedCompletion, {"model": "m", "prompt": prompt}).prompt == expected


def test_parts_of_text_are_joined_and_one_stop_is_a_list() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read_request(ServedChat, CHAT | {"messages": [{"role": "user", "content": parts}], "stop": "x"})
    assert request.messages[0].content == "ab" and request.stop == ["x"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_answer_is_refused_by_name_and_its_neutral_values_are_not(name) -> None:
    for value in (None, *UNSUPPORTED[name]):
        read_request(ServedChat, CHAT | {name: value})
    with pytest.raises(RequestError, match=f"^{name}: ") as error:
        read_request(ServedChat, CHAT | {name: "something"})
    assert error.value.body()["error"]["param"] == name


TEXT = {"model": "m", "prompt": "Q"}


@pytest.mark.parametrize(("name", "meant"), [
    ("max_token", "max_tokens"), ("temprature", "temperature"), ("maxTokens", "max_tokens"), ("top-p", "top_p"),
    ("max_new_tokens", "max_tokens"), ("stops", "stop"), ("Seed", "seed"), ("streaming", "stream"),
    ("repeat_penalty", "repetition_penalty"), ("logprob", "logprobs"), ("guided_jsn", "guided_json"),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "body"), [(ServedChat, CHAT), (ServedCompletion, TEXT)])
def test_a_field_that_is_close_to_a_known_one_is_refused_with_that(kind, body, name, meant) -> None:
    with pytest.raises(RequestError) as error:
        read_request(kind, body | {name: 1})
    assert str(error.value) == f"unknown field '{name}'; did you mean '{meant}'?" and error.value.param == name
    assert read_request(kind, body | {name: None})  # it asks for nothing


@pytest.mark.parametrize(("body", "field", "meant", "param"), [
    (CHAT | {"messages": [{"role": "user", "contnt": "Q"}]}, "messages.contnt", "content", "messages"),
    (CHAT | {"messages": [*CHAT["messages"], {"role": "assistant", "content": "A", "reasoning_contents": "B"}]},
     "messages.reasoning_contents", "reasoning_content", "messages"),
    (CHAT | {"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages",
     "include_usage", "stream_options"),
    ({"model": "m", "message": CHAT["messages"]}, "message", "messages", "message"),
])  # fmt: skip
def test_misspelt_fields_of_turns_and_blocks_are_refused_too(body, field, meant, param) -> None:
    with pytest.raises(RequestError) as error:
        read_request(ServedChat, body)
    assert str(error.value) == f"unknown field '{field}'; did you mean '{meant}'?" and error.value.param == param


def test_what_clients_send_without_effect_is_known() -> None:
    """Every field of the openai client, and those of vLLM's API that it sends as extra_body."""
    openai_fields = {
        *completion_create_params.CompletionCreateParamsBase.__annotations__,
        *chat.completion_create_params.CompletionCreateParamsBase.__annotations__,
    }
    vllm_fields = {"top_k", "min_p", "ignore_eos", "chat_template_kwargs", "min_tokens", "cache_salt", "request_id"}
    for kind in (ServedChat, ServedCompletion):
        assert unknown_fields(kind, dict.fromkeys(openai_fields | vllm_fields | NO_EFFECT | {*UNSUPPORTED}, 1)) == []
    for kind, body in ((ServedChat, CHAT), (ServedCompletion, TEXT)):
        read_request(kind, body | dict.fromkeys(NO_EFFECT, "any"))
        # A vendor's own field is no slip of one without effect.
        read_request(kind, body | dict.fromkeys(("user_ids", "meta_data_2", "stored"), "any"))


def test_vendors_fields_are_accepted_and_listed_once() -> None:
    turn = {"role": "user", "content": "Q", "cache_control": {"type": "ephemeral"}}
    body = CHAT | {"models": ["m"], "mirostat_tau": 5, "provider": {}, "messages": [turn, turn]}
    assert read_request(ServedChat, body).messages[1].content == "Q"
    assert unknown_fields(ServedChat, body) == ["models", "mirostat_tau", "provider", "messages.cache_control"]


def test_a_body_of_thousands_of_unknown_fields_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match=f"more than {MAX_UNKNOWN} unknown fields, the first is 'x0'"):
        read_request(ServedChat, CHAT | {f"x{number}": 1 for number in range(100_000)})


@pytest.mark.parametrize(("kind", "body", "name", "value"), [
    (ServedCompletion, TEXT, "max_completion_tokens", 5), (ServedCompletion, TEXT, "top_logprobs", 2),
    (ServedCompletion, TEXT, "messages", CHAT["messages"]), (ServedChat, CHAT, "prompt", "Q"),
    (ServedChat, CHAT, "echo", True),
])  # fmt: skip
def test_a_field_of_the_other_path_is_refused(kind, body, name, value) -> None:
    with pytest.raises(RequestError, match=f"^{name}: a field of /v1/") as error:
        read_request(kind, body | {name: value})
    assert error.value.param == name and read_request(kind, body | {"echo": False, name: None})


@pytest.mark.parametrize(("stop", "words"), [
    (["x"] * 17, "stop: expected at most 16 entries, found a list"),
    (["x" * 1001], "stop.0: expected at most 1000 characters, found text"),
])  # fmt: skip
def test_long_stop_lists_are_refused_in_words(stop, words) -> None:
    for kind, body in ((ServedChat, CHAT), (ServedCompletion, TEXT)):
        with pytest.raises(RequestError, match=f"^{words}"):
            read_request(kind, body | {"stop": stop})
        assert read_request(kind, body | {"stop": ["x" * 1000] * 16}).stop


def test_no_alternatives_may_be_asked_for_without_logprobs() -> None:
    assert read_request(ServedChat, CHAT | {"top_logprobs": 0}).logprobs is None
    with pytest.raises(RequestError, match=r"^top_logprobs: only with logprobs: true"):
        read_request(ServedChat, CHAT | {"top_logprobs": 1})
