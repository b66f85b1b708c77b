import pytest

from bmjax.chat.openai import (
    UNSUPPORTED,
    ChatMessage,
    ChatRequest,
    RequestError,
    ServedChat,
    ServedCompletion,
    read_request,
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
