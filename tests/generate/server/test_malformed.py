"""Malformed requests of every kind, to one server: each is refused with a message that names the field."""

import json

import httpx
import pytest

from tests.generate.server.scripted import ask, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURN = {"role": "user", "content": "Q"}
NAN, INFINITY = float("nan"), float("inf")
BASES = {CHAT: {"model": "tiny", "messages": [TURN]}, TEXT: {"model": "tiny", "prompt": "Q"}}

# Bodies that are no object, or no JSON at all, and what the refusal names.
BODIES = [
    (b"", "JSON"), (b"{", "JSON"), (b"[" * 100_000, "JSON"), (b"\x00\x01", "JSON"), (b"{'model': 1}", "JSON"),
    (b'{"model": "t\xff"}', "UTF-8"), (b"null", "object"), (b"[]", "object"), (b'"text"', "object"), (b"3", "object"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content"),
]  # fmt: skip

# Wrong values by field; MISSING takes the field away.
MISSING = Ellipsis  # a value that no JSON has, and every worker prints alike
FIELDS = {
    CHAT: {
        "model": [MISSING, None, 3, "other"],
        "messages": [MISSING, None, [], "Q", ["Q"], [TURN, {"role": "wizard", "content": "Q"}],
                     [{"role": "tool", "content": "Q"}], [{"content": "Q"}], [{"role": "user"}],
                     [{"role": "user", "content": None}], [{"role": "user", "content": 3}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                     [{"role": "user", "content": ["Q"]}], [TURN | {"reasoning_content": "hm"}],
                     [{"role": "assistant", "content": "Q", "tool_calls": [{}]}], [TURN | {"content": "x" * 300}]],
        "n": [0, -1, 128, 10**9, "two", 1.5, True],
        "max_tokens": [-1, 0, "9", 10**30, 2.5], "max_completion_tokens": [-5, "9"],
        "temperature": [-0.1, 3, "hot", NAN, INFINITY, [1], True], "top_p": [0, 1.1, NAN, "1"], "top_k": [-2, 0.5],
        "min_p": [2, -1], "repetition_penalty": [0, -1, "1"], "seed": ["x", 2**80, 0.5],
        "stop": [3, [""], "", ["x"] * 99, [None], {}], "stop_token_ids": [[-1], ["a"], 3], "ignore_eos": ["yes", 1],
        "stream": ["yes", 1], "stream_options": [{"include_usage": True}, [], "usage"],
        "logprobs": [3, "yes"], "top_logprobs": [50, -1, 2, True],
        "tools": [[{"type": "function"}]], "logit_bias": [{"5": 1}], "response_format": [{"type": "json_object"}],
        "temprature": [0], "max_token": [2],
        "frequency_penalty": [0.5], "presence_penalty": [1, NAN], "reasoning_effort": ["high"],
    },
    TEXT: {
        "prompt": [MISSING, None, "", [], [[]], 3, {"a": 1}, [1, "a"], ["a", [1]], [1.5], [True], [300], [-1], [10**30],
                   ["a"] * 200, [[1] * 256], "x " * 10**5, [[1, None]], [None]],
        "max_tokens": [-1, 0], "logprobs": [-1, 21, True], "echo": ["yes"], "suffix": ["x"], "best_of": [4],
    },
}  # fmt: skip
WRONG = [
    (path, field, value) for path, fields in FIELDS.items() for field, values in fields.items() for value in values
]


@pytest.fixture(scope="module")
def http(serving):
    with httpx.Client(base_url=serving.url, timeout=30, headers={"Content-Type": "application/json"}) as http:
        yield http


def refusal(reply, status: int) -> dict:
    """The error object of a reply."""
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) <= 1010
    return error


@pytest.mark.parametrize(("body", "named"), BODIES)
def test_a_body_that_is_no_request_is_refused(http, body, named):
    assert named in refusal(http.post(CHAT, content=body), 400)["message"]


@pytest.mark.parametrize(("path", "field", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_value_is_refused_by_name(http, path, field, value):
    body = {key: entry for key, entry in (BASES[path] | {field: value}).items() if entry is not MISSING}
    error = refusal(http.post(path, content=json.dumps(body).encode()), 404 if value == "other" else 400)
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, BASES[CHAT] | {"messages": [TURN | {"content": "x" * 10**7}]}),
    (TEXT, BASES[TEXT] | {"prompt": "x" * 10**7}), (CHAT, BASES[CHAT] | {"ignored": ["x" * 10**7]}),
])  # fmt: skip
def test_a_body_of_10_megabytes_is_refused_while_it_is_read(http, path, body):
    assert "bytes" in refusal(http.post(path, json=body), 413)["message"]


@pytest.mark.parametrize(("headers", "named"), [
    ({"Content-Type": "text/plain"}, "text/plain"), ({"Content-Type": "application/x-www-form-urlencoded"}, "form"),
    ({"Content-Type": "multipart/form-data; boundary=x"}, "multipart"), ({"Content-Type": ""}, "no Content-Type"),
    ({"Content-Encoding": "gzip"}, "gzip"),
])  # fmt: skip
def test_a_pages_body_that_is_not_said_to_be_json_is_refused(http, headers, named):
    """As browsers send it for any page, without asking the server first. Other clients may leave the type out."""
    body, page = json.dumps(BASES[CHAT]).encode(), {"Origin": "https://example.org"}
    assert named in refusal(http.post(CHAT, content=body, headers=headers | page), 415)["message"]
    if "Content-Type" in headers:
        assert http.post(CHAT, content=body, headers=headers).status_code == 200
    for said in ("application/json; charset=utf-8", "Application/JSON"):
        assert http.post(CHAT, content=body, headers={"Content-Type": said} | page).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
def test_other_methods_are_refused_and_told_the_right_one(http, method):
    reply = http.request(method, CHAT)
    assert (reply.status_code, reply.headers["Allow"]) == (405, "POST")
    assert not any(name.lower().startswith("access-control") for name in reply.headers)


def test_a_prompt_that_the_engine_refuses(http):
    assert "299" in refusal(http.post(TEXT, json={"model": "tiny", "prompt": [299]}), 400)["message"]


@pytest.mark.parametrize(("path", "method", "status"), [
    ("/v1/embeddings", "POST", 404), ("/", "GET", 404), ("/v1/models", "POST", 405), (CHAT, "GET", 405),
    ("/v1/models/other", "GET", 404),
])  # fmt: skip
def test_a_path_that_is_not_there(http, path, method, status):
    assert path in refusal(http.request(method, path), status)["message"] or path.endswith("other")


def test_there_are_50_kinds_and_the_server_lives(client, serving):
    assert len(BODIES) + len(WRONG) >= 50
    assert ask(client, "still here").choices[0].message.content == "still here"
    wait_until(lambda: serving.worker.active == 0, 10)
