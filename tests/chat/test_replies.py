import json
from typing import Any

import pytest

from bmjax.chat.replies import UNREADABLE, Completion, NoCompletion, ReplyError, ReplyReader, read_completion


def body(message: Any, finish_reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], **fields}


@pytest.mark.parametrize("message", [
    {"content": "<think>\nhm\n</think>\n\n7"},
    {"content": "hm\n</think>\n7"},
    {"content": "7", "reasoning_content": "hm"},
    {"content": "7", "reasoning": "hm"},
    {"content": "7", "reasoning_content": "hm", "reasoning": "hm"},
    {"content": "\n\n7\n", "reasoning_content": "\nhm\n"},
    {"content": "<think>hm</think>7", "reasoning_content": "hm"},
    {"content": "</think>\n7", "reasoning_content": "<think>\nhm"},
    {"content": "7", "reasoning_content": "hm\n</think>"},
    {"content": "<think>\n\n</think>\n7", "reasoning": "hm"},
    {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "7"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"text": "m"}]}, "7"]},
    {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                 {"type": "output_text", "text": "7"}]},
    {"content": [{"type": "text", "text": "<think>hm</think>"}, {"type": "text", "text": "7"}]},
    {"content": "7", "reasoning": {"content": "hm"}},
    {"content": "7", "reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "hm"},
                                                              {"type": "reasoning.encrypted", "data": "x"}]},
])  # fmt: skip
def test_reasoning_leaves_apart_and_nothing_of_it_stays_in_the_answer(message: dict[str, Any]) -> None:
    usage = {"completion_tokens": 3}
    assert read_completion(body(message, usage=usage)) == Completion("hm", "7", "stop", usage)


@pytest.mark.parametrize(
    ("message", "finish_reason", "expected"),
    [
        ({"content": None, "reasoning_content": "hm"}, "length", ("hm", "", "length")),
        ({"content": "<think>hm 3"}, "length", ("hm 3", "", "length")),
        ({"content": "<think>a</think>b<think>c</think>d"}, "stop", ("", "<think>a</think>b<think>c</think>d", "stop")),
        ({"content": None, "refusal": "I cannot."}, "stop", ("", "I cannot.", "refusal")),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "stop", ("", "I cannot.", "refusal")),
        ({"content": "7"}, None, ("", "7", None)),
        ({"content": "7"}, {"type": "stop", "matched": 3}, ("", "7", "stop")),
        ({"content": "7"}, "insufficient_system_resource", ("", "7", "insufficient_system_resource")),
        ("7", "stop", ("", "7", "stop")),
        ({"content": {"text": "7"}}, "stop", ("", "7", "stop")),
    ],
)
def test_how_an_answer_ended_is_kept(message: Any, finish_reason: Any, expected: tuple[str, str, str | None]) -> None:
    completion = read_completion(body(message, finish_reason))
    assert (completion.reasoning, completion.response, completion.finish_reason) == expected


@pytest.mark.parametrize("values", [
    body({"content": 7}), body({"content": [{"type": "image_url", "image_url": "x"}]}), body(["x"]),
    {"choices": [], "usage": {"completion_tokens": 9}}, {"choices": [{}], "usage": {"completion_tokens": 9}},
    {"choices": "x", "usage": {"completion_tokens": 9}},
])  # fmt: skip
def test_what_was_paid_for_and_cannot_be_read_is_kept_as_it_is(values: dict[str, Any]) -> None:
    completion = read_completion(values)
    assert completion.finish_reason == UNREADABLE and completion.usage == values.get("usage", {})
    assert json.loads(completion.response) is not None


@pytest.mark.parametrize("values", [
    [], "x", None, {}, {"choices": []}, {"choices": None}, {"choices": [{}]}, {"choices": [{"message": {}}]},
    {"choices": ["x"]}, body({"content": ""}, usage={"completion_tokens": 0}), {"object": "list", "data": []},
])  # fmt: skip
def test_what_is_no_answer_is_told(values: Any) -> None:
    with pytest.raises(NoCompletion):
        read_completion(values)


@pytest.mark.parametrize(
    ("values", "words", "status"),
    [
        ({"error": {"message": "busy", "code": 502}}, "busy", 502),
        ({"error": {"message": "busy", "code": "429"}}, "busy", 429),
        ({"error": {"message": "no", "type": "invalid_request_error"}, "choices": []}, "no", 400),
        ({"error": "plain words"}, "plain words", None),
        ({"error": True, "message": "words"}, "words", None),
        ({"error": {"message": "x", "code": "insufficient_quota"}}, "x", 402),
        ({"error": {"message": "x", "type": "overloaded_error"}}, "x", 503),
        ({"error": {"message": "Provider", "code": 502, "metadata": {"raw": "theirs"}}}, "Provider: theirs", 502),
        (
            {"choices": [{"error": {"message": "down", "code": 503}, "finish_reason": "error", "message": {}}]},
            "down",
            503,
        ),
    ],
)
def test_an_error_object_is_an_error_with_its_words(values: dict[str, Any], words: str, status: int | None) -> None:
    with pytest.raises(ReplyError, match=f"^{words}$") as caught:
        read_completion(values)
    assert caught.value.status == status


def read_bytes(data: bytes, step: int) -> Completion:
    reader = ReplyReader(10**6)
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
    return reader.finish()


def events(*chunks: Any, end: bytes = b"data: [DONE]\n\n", gap: bytes = b"\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + gap for chunk in chunks) + end


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


STREAM = [
    delta(role="assistant", content=""), delta(reasoning_content="h"), delta(reasoning_content="m"),
    delta(content="7\u2028é"), {"choices": [{"index": 1, "delta": {"content": "other"}}]}, delta("stop"),
    {"choices": [], "usage": {"completion_tokens": 3}},
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("data", [
    events(*STREAM), events(*STREAM, gap=b"\n"), events(*STREAM, gap=b"\r\n\r\n"), events(*STREAM, end=b""),
    b": OPENROUTER PROCESSING\n\n" + events(*STREAM), b"\n\n\n" + events(*STREAM),
    b"event: message\n" + events(*STREAM),
    events(*STREAM) + b"data: {\"choices\": 3}\n\n",
])  # fmt: skip
def test_a_stream_becomes_one_answer(data: bytes, step: int) -> None:
    assert read_bytes(data, step) == Completion("hm", "7\u2028é", "stop", {"completion_tokens": 3})


def test_a_stream_of_parts_and_one_answer_in_place_of_a_stream() -> None:
    parts = [
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}]),
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "m"}]}]),
        delta("stop", content="7"),
    ]
    assert read_bytes(events(*parts), 9) == Completion("hm", "7", "stop", {})
    assert read_bytes(events(delta(content="<think>h"), delta("stop", content="m</think>7")), 9).reasoning == "hm"
    whole = b" \n\n " + json.dumps(body({"content": "7"})).encode()
    assert read_bytes(whole, 3).response == "7"


@pytest.mark.parametrize("data", [
    events(*STREAM[:4], end=b""), events(*STREAM[:3], end=b"data: {\"choices\": [{\"del"),
    b"data: [DONE]\n\n", b"", b"<html>",
    b"data: {half\n\ndata: [DONE]\n\n", b"{\"choices\": [{\"message\": {\"content\": \"7\"}}", b"[" * 100_000,
])  # fmt: skip
def test_a_body_that_broke_off_is_no_answer(data: bytes) -> None:
    with pytest.raises(NoCompletion):
        read_bytes(data, 11)


def test_an_error_within_a_stream_is_an_error() -> None:
    for tail in (events({"error": {"message": "lost", "code": 502}}), b'event: error\ndata: {"message": "lost"}\n\n'):
        with pytest.raises(ReplyError, match="lost"):
            read_bytes(events(*STREAM[:3], end=b"") + tail, 5)


def test_log_probabilities_are_kept_without_what_their_text_tells() -> None:
    def entry(token: str, bytes_: list[int] | None) -> dict[str, Any]:
        top = [{"token": token, "logprob": -0.5, "bytes": bytes_}]
        return {"token": token, "logprob": -0.5, "bytes": bytes_, "top_logprobs": top}

    whole = body({"content": "7é"})
    whole["choices"][0]["logprobs"] = {"content": [entry("7", [55]), entry("\ufffd", [0xC3])]}
    first, second = read_completion(whole).logprobs["content"]
    assert first == {"token": "7", "logprob": -0.5, "top_logprobs": [{"token": "7", "logprob": -0.5}]}
    assert second["bytes"] == [0xC3] and second["top_logprobs"][0]["bytes"] == [0xC3]
    chunks = [delta(content="7"), delta("stop", content="é")]
    for chunk, got in zip(chunks, whole["choices"][0]["logprobs"]["content"], strict=True):
        chunk["choices"][0]["logprobs"] = {"content": [got]}
    assert read_bytes(events(*chunks), 50).logprobs == read_completion(whole).logprobs


def test_a_body_without_end_is_refused() -> None:
    reader = ReplyReader(100)
    with pytest.raises(NoCompletion, match="more bytes"):
        for _ in range(20):
            reader.feed(b"{" * 10)
