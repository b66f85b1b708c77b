import pytest
from pydantic import ValidationError

from bmjax.chat.openai import ChatCompletion, ChatMessage, ChatRequest


def test_a_request_holds_what_was_set_and_extra_fields() -> None:
    turns = [ChatMessage(role="user", content="Q")]
    request = ChatRequest(model="m", messages=turns, seed=3, reasoning_effort="high")
    body = {"model": "m", "messages": [{"role": "user", "content": "Q"}], "seed": 3, "reasoning_effort": "high"}
    assert request.model_dump(exclude_unset=True) == body
    assert ChatRequest.model_validate(body) == request


@pytest.mark.parametrize("body", [
    {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "text"}]},
    {"choices": [{"message": {"content": 1}}]},
])  # fmt: skip
def test_what_is_no_completion_is_refused(body: object) -> None:
    with pytest.raises(ValidationError):
        ChatCompletion.model_validate(body)
