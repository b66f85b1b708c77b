"""The server with the real engine: what the model itself says, collect against it, the command from start to signal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import openai
import pytest

import bmjax
from bmjax.chat.replies import read_error
from bmjax.generate.load import load_engine, open_model
from bmjax.generate.server.serve import address_line, listening, read_key, serve, served_name
from bmjax.generate.settings import ServeSettings
from bmjax.teach.collect import collect
from bmjax.teach.settings import CollectSettings
from tests.conftest import sums, write_rows
from tests.generate.server.scripted import Serving, ask


@pytest.fixture(scope="module")
def serving(student):
    settings = ServeSettings.read({"model": str(student)})
    engine = load_engine(open_model(str(student), None), settings, 8)
    with Serving(engine) as serving:
        yield serving


@pytest.fixture(scope="module")
def model(student):
    return bmjax.load(student)


def test_greedy_text_is_that_of_generate(client, model):
    prompt = "12 + 34 + 5"
    (expected,) = bmjax.generate(model, [prompt], max_new_tokens=12)
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
    assert reply.choices[0].text == expected


def test_echoed_logprobs_are_the_models(client, model):
    tokens = model.tokenizer("What is 12 + 34?", add_special_tokens=False)["input_ids"]
    logits = np.asarray(model.logits([tokens]))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    reply = client.completions.create(model="tiny", prompt=tokens, max_tokens=1, echo=True, logprobs=1, temperature=0)
    got = reply.choices[0].logprobs
    assert got.token_logprobs[0] is None and len(got.token_logprobs) == len(tokens) + 1
    wanted = [expected[i, token] for i, token in enumerate(tokens[1:])] + [expected[-1].max()]
    np.testing.assert_allclose(got.token_logprobs[1:], wanted, atol=1e-5)
    np.testing.assert_allclose([max(top.values()) for top in got.top_logprobs[1:]], expected.max(-1), atol=1e-5)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_prompt_that_is_only_read_may_fill_the_context(client, logprobs):
    tokens = [20 + number % 200 for number in range(257)]
    asked = {"model": "tiny", "echo": True, "logprobs": logprobs}
    reply = client.completions.create(prompt=tokens[:256], max_tokens=0, **asked)
    assert reply.usage.prompt_tokens == 256 and reply.usage.completion_tokens == 0
    assert logprobs is None or len(reply.choices[0].logprobs.token_logprobs) == 256
    for prompt, max_tokens in ((tokens, 0), (tokens[:256], 1)):
        with pytest.raises(openai.BadRequestError, match="context length is 256") as refusal:
            client.completions.create(prompt=prompt, max_tokens=max_tokens, **asked)
        assert refusal.value.code == "context_length_exceeded" and refusal.value.param == "prompt"


def test_a_prompt_over_the_context_is_known_as_such_by_eval(serving):
    for path, body in (("completions", {"prompt": "x" * 300}), ("chat/completions", {"messages": [
        {"role": "user", "content": "x" * 300}]})):  # fmt: skip
        refusal = httpx.post(f"{serving.url}/v1/{path}", json={"model": "tiny"} | body)
        excess = read_error(refusal.json(), refusal.status_code)[2]
        assert excess is not None and excess.is_of_prompt, refusal.text


def test_a_seed_gives_the_same_answer_alone_and_among_others(client):
    sampled = {"max_tokens": 16, "temperature": 1.5}
    alone = ask(client, "Q", seed=7, **sampled).choices[0].message.content
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        seed = 7 if number == 3 else number + 100
        texts[number] = ask(client, "Q", seed=seed, **sampled).choices[0].message.content

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts[3] == alone and len(set(texts.values())) == 8
    again = ask(client, "Q", seed=7, n=3, **sampled)
    assert again.choices[0].message.content == alone and len({c.message.content for c in again.choices}) == 3


def test_collect_gets_traces(serving, tmp_path):
    problems = write_rows(tmp_path / "problems.jsonl", sums(6))
    settings = CollectSettings.read(
        {
            "problems": str(problems), "domain": "sums", "output": str(tmp_path / "traces"), "judge": "math",
            "prompt": "{prompt}", "reference": "{reference}",
            "teacher": {"base_url": f"{serving.url}/v1", "model": "tiny", "samples": 2, "max_tokens": 16384,
                        "logprobs": 3, "stream": True},
        }
    )  # fmt: skip
    counts = collect(settings)
    assert (counts["collected"], counts["failed"]) == (12, 0)
    rows = [json.loads(line) for line in (tmp_path / "traces" / "traces.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 12
    assert all(row["logprobs"] and row["usage"]["completion_tokens"] > 0 for row in rows)
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


@pytest.mark.slow
def test_the_command_serves_and_ends_at_a_signal(student, tmp_path):
    environment = os.environ | {"BMJAX_KEY": "sk-secret"}
    command = [sys.executable, "-m", "bmjax", "serve", str(student), "--port", "0", "--api-key-env", "BMJAX_KEY",
               "slots=2", "name=small"]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"serving at (http://127\.0\.0\.1:\d+/v1)", line):
            break
    client = openai.OpenAI(base_url=match[1], api_key="sk-secret", max_retries=0)
    stream = client.completions.create(model="small", prompt="1 + 1", max_tokens=200, stream=True,
                                       extra_body={"ignore_eos": True})  # fmt: skip
    chunks = [next(stream)]
    process.send_signal(signal.SIGTERM)
    chunks += stream  # what was asked is answered to its end
    assert chunks[-1].choices[0].finish_reason == "length"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines.append(err)
    assert out == "" and lines[-1] == "small: stopped\n" and "sk-secret" not in "".join(lines)


@pytest.mark.parametrize(("host", "key", "said"), [
    ("127.0.0.1", None, ""), ("0.0.0.0", None, "anyone who reaches it may ask"),
    ("0.0.0.0", "k", "clients need the key"),
])  # fmt: skip
def test_the_line_says_who_can_reach_the_server(host, key, said):
    settings = ServeSettings.read({"model": "m", "host": host, "port": 0})
    with listening(host, 0) as listener:
        line = address_line("m", settings, listener, key)
    assert line.startswith("m: serving at http://127.0.0.1:") and said in line and (";" in line) == bool(said)


def test_an_address_that_is_taken_and_a_key_that_is_not_set_are_said(monkeypatch):
    with listening("127.0.0.1", 0) as listener, pytest.raises(bmjax.UserError, match="in use"):
        listening("127.0.0.1", listener.getsockname()[1]).__enter__()
    monkeypatch.delenv("BMJAX_NO_KEY", raising=False)
    with pytest.raises(bmjax.UserError, match="BMJAX_NO_KEY is not set"):
        read_key("BMJAX_NO_KEY")
    with pytest.raises(bmjax.UserError, match="--api-key: empty"):
        serve(ServeSettings.read({"model": "m", "port": 0}), "")


def test_idle_connections_are_kept_longer_than_clients_keep_them(serving):
    longest = max(httpx.Limits().keepalive_expiry, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry)
    assert serving.server._server.config.timeout_keep_alive > longest


def test_a_model_is_called_by_its_hub_id_or_its_directorys_name(student):
    assert served_name(str(student)) == "student" and served_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
