"""Clients that go away, a full queue, keys, metrics, and how a server ends."""

import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bmjax.generate.server.app import MAX_NAMED
from tests.generate.server.scripted import ScriptedEngine, Serving, ask, echo, letters, make_client, wait_until

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def endless(request):
    return letters("on and on " * 1000)


def start_request(serving, **fields) -> socket.socket:
    """A raw connection that has asked and reads nothing more."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Q"}]} | fields).encode()
    host, port = serving.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_free_their_slots(stream):
    engine = ScriptedEngine(endless, slots=4, seconds=0.01)
    with Serving(engine, queue=4, context=100_000) as serving:
        connections = [start_request(serving, stream=stream) for _ in range(8)]
        wait_until(lambda: len(engine.running) == 4 and len(engine.waiting) == 4, 5)
        for connection in connections:
            connection.close()
        wait_until(lambda: not engine.running and not engine.waiting and serving.worker.active == 0, 10)


def test_a_full_queue_refuses_with_429_and_goes_on_later():
    engine = ScriptedEngine(endless, slots=1, seconds=0.01)
    with Serving(engine, queue=1, context=100_000) as serving:
        client = make_client(serving)
        connections = [start_request(serving) for _ in range(2)]
        wait_until(lambda: serving.worker.active == 2, 5)
        with pytest.raises(openai.RateLimitError) as refusal:
            ask(client, "?")
        assert refusal.value.response.headers["Retry-After"] == "1" and refusal.value.code == "queue_full"
        for connection in connections:
            connection.close()
        wait_until(lambda: serving.worker.active == 0, 10)
        assert ask(client, "?", max_tokens=3).choices[0].message.content == "on "


def test_a_stop_answers_what_was_asked_and_refuses_what_is_new():
    engine = ScriptedEngine(echo, slots=2, seconds=0.01)
    with Serving(engine) as serving, concurrent.futures.ThreadPoolExecutor(8) as pool:
        client = make_client(serving)
        said = [f"number {i} " * 3 for i in range(6)]
        answers = [pool.submit(ask, client, text) for text in said]
        wait_until(lambda: serving.worker.active == 6, 5)
        serving.stop()
        assert [answer.result().choices[0].message.content for answer in answers] == said
        with pytest.raises(openai.APIConnectionError):
            ask(client, "?")


PROCESS = """
from tests.generate.server.scripted import ScriptedEngine, Serving, echo
from bmjax.generate.server.serve import listening, serve_engine
from bmjax.log import write_line

serving = Serving(ScriptedEngine(echo, slots=2, seconds=0.02))
with listening("127.0.0.1", 0) as listener:
    serve_engine(serving.engine, serving.served, serving.settings, listener, "sk-secret", write_line)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_process_answer_and_end(number):
    process = subprocess.Popen([sys.executable, "-c", PROCESS], stderr=subprocess.PIPE, text=True)
    first = process.stderr.readline()
    url = re.search(r"tiny: serving at (http://127\.0\.0\.1:\d+/v1), ", first)[1]
    client = openai.OpenAI(base_url=url, api_key="sk-secret", max_retries=0)
    stream = ask(client, "answered to the end", stream=True)
    chunks = [next(stream)]
    process.send_signal(number)
    chunks += stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "answered to the end"
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and rest == "tiny: stopped\n" and "sk-secret" not in first


def test_a_stop_that_waits_too_long_cuts_off():
    with Serving(ScriptedEngine(endless, seconds=0.01), context=100_000, drain_seconds=0) as serving:
        connection = start_request(serving, stream=True)
        wait_until(lambda: serving.worker.active == 1, 5)
        began = time.monotonic()
        serving.stop()
        assert time.monotonic() - began < 3
        connection.close()


def test_an_engine_that_fails_is_told_to_clients_and_ends_the_server():
    engine = ScriptedEngine(endless, seconds=0.01)
    with Serving(engine, context=100_000) as serving:
        connection = start_request(serving)
        wait_until(lambda: serving.worker.active == 1, 5)
        engine.token = None
        reply = connection.makefile("rb").read()
        assert b" 500 " in reply.splitlines()[0] and b'"type":"server_error"' in reply
        serving.thread.join(5)
        assert not serving.thread.is_alive() and isinstance(serving.worker.failure, TypeError)


def test_the_key_is_asked_for_and_never_shown():
    with Serving(ScriptedEngine(echo), api_key="sk-secret") as serving:
        for key in ("wrong", "sk-secre", "sk-secret2"):
            with pytest.raises(openai.AuthenticationError) as refusal:
                ask(make_client(serving, key), "?")
            assert refusal.value.code == "invalid_api_key" and "sk-" not in str(refusal.value)
        missing = httpx.get(f"{serving.url}/v1/models")
        assert missing.status_code == 401 and missing.headers["WWW-Authenticate"] == "Bearer"
        assert ask(make_client(serving, "sk-secret"), "?").choices[0].message.content == "?"
        assert httpx.get(f"{serving.url}/health").json() == {"status": "ok"}
        assert "sk-secret" not in httpx.get(f"{serving.url}/metrics").text


def test_unknown_fields_are_told_the_log_once_and_bounded():
    said = []
    with Serving(ScriptedEngine(echo), log=said.append) as serving:
        client = make_client(serving)
        for _ in range(3):
            assert ask(client, "abc", extra_body={"mirostat": 2, "user": "u"}).choices[0].message.content == "abc"
        assert len(said) == 1 and "'mirostat'" in said[0]
        for start in range(0, 300, 30):
            names = [f"{number} \ud800\x1b[2J".ljust(300, "z") for number in range(start, start + 30)]
            body = {"model": "tiny", "prompt": "a", **dict.fromkeys(names, 1)}
            reply = httpx.post(f"{serving.url}/v1/completions", content=json.dumps(body).encode(), headers=JSON)
            assert reply.json()["choices"][0]["text"] == "a"
        assert len(said) == MAX_NAMED and all(line.isprintable() and len(line) < 250 for line in said)
        body = {"model": "tiny", "prompt": "a", "max_token\ud800": 2}
        error = httpx.post(f"{serving.url}/v1/completions", content=json.dumps(body).encode(), headers=JSON).json()[
            "error"
        ]
        assert error["param"] == "max_token " and error["message"].endswith("did you mean 'max_tokens'?")


def counted(serving) -> dict[tuple[str, ...], float]:
    """The server's metrics by name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{serving.url}/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def ends(serving) -> dict[str, float]:
    """How many answers ended by which reason."""
    return {key[1]: value for key, value in counted(serving).items() if key[0] == "bmjax_answers_total"}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_counted_by_the_end_that_clients_are_told(stream):
    engine = ScriptedEngine(lambda request: echo(request) * 1000, slots=4, seconds=0.01)
    with Serving(engine, context=100_000) as serving:
        client = make_client(serving)
        for fields in ({"stop": "d", "n": 2}, {"max_tokens": 3}, {"stop": "c", "max_tokens": 3}):
            reply = ask(client, "abcd", stream=stream, **fields)
            list(reply) if stream else None
        wait_until(lambda: serving.worker.active == 0, 10)
        assert ends(serving) == {"stop": 3, "length": 1}
        connection = start_request(serving, stream=stream, n=2)
        wait_until(lambda: serving.worker.active == 2, 5)
        connection.close()
        wait_until(lambda: serving.worker.active == 0, 10)
        assert ends(serving) == {"stop": 3, "length": 1, "cancelled": 2}


def test_metrics_count_what_happened():
    with Serving(ScriptedEngine(echo)) as serving:
        client = make_client(serving)
        ask(client, "abc")
        list(ask(client, "abc", stream=True))
        httpx.post(f"{serving.url}{CHAT}", content=b"{", headers=JSON)
        samples = counted(serving)
        assert samples["bmjax_answer_tokens_total",] == 6 and samples["bmjax_prompt_tokens_total",] > 6
        assert samples["bmjax_requests_total", CHAT, "200"] == 2 and samples["bmjax_requests_total", CHAT, "400"] == 1
        assert samples["bmjax_answers_total", "stop"] == 2 and samples["bmjax_answers_under_way",] == 0
        assert samples["bmjax_first_token_seconds_count",] == 2 and samples["bmjax_slots",] == 4
        assert samples["process_resident_memory_bytes",] > 1e6
