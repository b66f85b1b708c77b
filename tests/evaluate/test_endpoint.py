"""Evaluation through an endpoint: hand-computed scores, killed and resumed, judged anew, and what goes wrong."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from bmjax.config import UserError
from bmjax.evaluate import judging
from bmjax.evaluate import run as running
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.score import bootstrap, pass_at_k
from bmjax.evaluate.settings import EvalSettings
from bmjax.io.jsonl import JsonLines
from tests.conftest import SHARED, write_rows
from tests.generate.server.scripted import ScriptedEngine, Serving, echo, question
from tests.pipeline.endpoint import Endpoint


def aime(folder):
    """30 problems of AIME 2024; where they are not here, 30 of the same form."""
    real = SHARED / "data" / "aime" / "aime24.jsonl"
    if real.exists():
        return real
    rows = [{"prompt": f"Find the remainder of {37 * n} when divided by 1000.", "answer": 37 * n} for n in range(30)]
    return write_rows(folder / "aime24.jsonl", [row | {"answer": row["answer"] % 1000} for row in rows])


def settings(server, output, tasks, **changes) -> EvalSettings:
    values = {"base_url": server.base_url, "model": "served", "output": str(output), "tasks": tasks, "concurrency": 8}
    return EvalSettings.read(values | changes)


def samples(output, task) -> list[dict]:
    return [json.loads(line) for line in (output / "samples" / f"{task}.jsonl").read_text().splitlines()]


def is_right(number: int, seed: int) -> bool:
    """Problem n is right in n % 17 of its 16 samples, at most: 0, 1, ... 16, 0, 1, ..."""
    return seed < number % 17


def test_thirty_aime_problems_killed_and_resumed_give_the_number_computed_by_hand(tmp_path):
    file = aime(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    numbers = {row["prompt"].split("\n")[0]: n for n, row in enumerate(rows)}

    def answer(prompt, seed):
        time.sleep(0.003)
        number = numbers[prompt.split("\n")[0]]
        gold = int(rows[number]["answer"])
        value = gold if is_right(number, seed) else (gold + 1 + seed % 2) % 1000
        return f"<think>\nhm\n</think>\nThe answer is $\\boxed{{{value}}}$.", "length" if seed == 15 else "stop"

    with Endpoint(answer) as server:
        out = tmp_path / "out"
        tasks = {"aime24": {"questions": str(file), "metrics": ["pass@4", "maj@16", "avg@8"]}}
        asking = settings(server, out, tasks)
        config = tmp_path / "eval.yaml"
        config.write_text(json.dumps(asking.model_dump(exclude_unset=True)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-m", "bmjax", "eval", str(config)], env=environment)
        file_of_samples = out / "samples" / "aime24.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if file_of_samples.exists() and file_of_samples.read_bytes().count(b'"answer"') >= 150:
                break
            time.sleep(0.01)
        # While it runs, no second one may.
        with pytest.raises(UserError, match="another evaluation is writing here"):
            evaluate(asking)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with file_of_samples.open("ab") as stream:
            stream.write(b'{"id": "torn", "answer": "\xc3')
        kept = set()
        for line in file_of_samples.read_bytes().splitlines()[:-1]:
            with contextlib.suppress(ValueError):
                sample = json.loads(line)
                kept |= {(sample["prompt"], sample["seed"])} if "answer" in sample else set()
        assert 150 <= len(kept) < 480 and not (out / "scores.json").exists()

        server.asked.clear()
        score = evaluate(asking)["aime24"]
        assert len(server.asked) == 480 - len(kept) and not kept & set(server.asked)  # nothing is paid for twice
        server.asked.clear()
        assert evaluate(asking) == {"aime24": score} and not server.asked

    # By hand: problem n has n % 17 right samples of 16, but the last one of all was cut off and states nothing.
    right = [min(n % 17, 15) for n in range(30)]
    assert score["accuracy"] == pytest.approx(sum(right) / 480)
    assert tuple(score["ci95"]) == bootstrap([r / 16 for r in right]) and score["ci95_by"] == "bootstrap"
    assert (score["n"], score["k"], score["unjudged"], score["over_context"]) == (30, 16, 0, 0)
    assert score["truncated"] == pytest.approx(30 / 480)
    assert score["metrics"]["pass@4"]["value"] == pytest.approx(sum(pass_at_k(16, r, 4) for r in right) / 30)
    assert score["metrics"]["avg@8"]["value"] == pytest.approx(sum(min(r, 8) / 8 for r in right) / 30)

    # The wrong samples of a problem say one of two numbers in turn, so r right ones win when no other has more votes.
    def majority(r: int) -> float:
        wrong = [sum(seed % 2 == odd for seed in range(r, 15)) for odd in (0, 1)]
        best = max(r, *wrong)
        return (r == best) / [r, *wrong].count(best) if best else 0.0

    assert score["metrics"]["maj@16"]["value"] == pytest.approx(sum(map(majority, right)) / 30)
    assert score["tokens"] == {"mean": 7, "median": 7, "max": 7, "answers": 480}
    assert score["samples"] == {"file": "samples/aime24.jsonl", "count": 480}
    lines = samples(out, "aime24")
    assert [line["sample"] for line in lines] == [*range(16)] * 30 and len({line["id"] for line in lines}) == 480
    assert {line["sampling"]["max_new_tokens"] for line in lines} == {32768}


def rows_of(tmp_path, count=3):
    return str(write_rows(tmp_path / "q.jsonl", [{"prompt": f"{n} + {n}?", "reference": 2 * n} for n in range(count)]))


def test_what_is_asked_holds_the_tasks_sampling_and_system_turn(tmp_path):
    tasks = {
        "a": {"questions": rows_of(tmp_path), "system": "Think.", "k": 2, "temperature": 0.6, "seed": 7},
        "b": {"questions": rows_of(tmp_path)},
    }
    with Endpoint(lambda prompt, seed: ("0", "stop")) as server:
        evaluate(settings(server, tmp_path / "out", tasks, max_tokens=50, extra={"top_k": 20}))
    assert len(server.bodies) == 9
    first, last = server.bodies[0], server.bodies[-1]
    assert first["messages"][0] == {"role": "system", "content": "Think."} and len(last["messages"]) == 1
    assert (first["temperature"], first["max_tokens"], first["top_k"], first["model"]) == (0.6, 50, 20, "served")
    assert {body["seed"] for body in server.bodies[:6]} == {7, 8} and last["seed"] == 0 and last["temperature"] == 0


def test_null_leaves_a_parameter_out_of_requests(tmp_path):
    changes = {"seed": None, "temperature": None, "top_p": None, "extra": {"max_completion_tokens": 9}}
    with Endpoint(lambda prompt, seed: ("0", "stop")) as server:
        evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path), "k": 2}}, **changes))
    assert {frozenset(body) for body in server.bodies} == {frozenset({"model", "messages", "max_completion_tokens"})}
    assert len(samples(tmp_path / "out", "t")) == 6


def test_a_changed_judge_judges_anew_and_asks_nothing(tmp_path):
    file, out = rows_of(tmp_path), tmp_path / "out"
    with Endpoint(lambda prompt, seed: ("0.0", "stop")) as server:
        first = evaluate(settings(server, out, {"t": {"questions": file, "judge": "math"}}))["t"]
        asked = len(server.asked)
        second = evaluate(settings(server, out, {"t": {"questions": file, "judge": "exact"}}))["t"]
        assert first["accuracy"] == pytest.approx(1 / 3) and second["accuracy"] == 0.0
        assert {line["verdict_by"] for line in samples(out, "t")} == {"exact"}
        # So does a corrected reference.
        rows = [{"prompt": f"{n} + {n}?", "reference": "0.0"} for n in range(3)]
        write_rows(tmp_path / "q.jsonl", rows)
        third = evaluate(settings(server, out, {"t": {"questions": file, "judge": "exact"}}))["t"]
        assert third["accuracy"] == 1.0 and len(server.asked) == asked == 3


def test_other_judges_of_a_new_version_judge_anew(tmp_path, monkeypatch):
    file, judged = rows_of(tmp_path), []
    judge_answer = running.judge_answer
    monkeypatch.setattr(running, "judge_answer", lambda *a: judged.append(a[0].id) or judge_answer(*a))
    with Endpoint(lambda prompt, seed: ("0", "stop")) as server:
        asking = settings(server, tmp_path / "out", {"t": {"questions": file}})
        evaluate(asking)
        evaluate(asking)
        assert len(judged) == 3
        monkeypatch.setattr(judging, "judges_version", lambda: "of another version")
        evaluate(asking)
    assert len(judged) == 6 and len(server.asked) == 3


def test_fewer_samples_and_other_sampling_lose_no_answer(tmp_path):
    file, out = rows_of(tmp_path), tmp_path / "out"
    former = out / "samples" / "t.former.jsonl"
    with Endpoint(lambda prompt, seed: (str(seed), "stop")) as server:

        def run(**changes):
            return evaluate(settings(server, out, {"t": {"questions": file}}, **changes))["t"]

        four = run(samples=4)
        two = run(samples=2)
        assert (two["k"], two["samples"]["count"], len(samples(out, "t"))) == (2, 6, 6)
        assert len(server.asked) == 12 and len(former.read_text().splitlines()) == 6
        assert run(samples=4) == four and len(server.asked) == 12 and not former.exists()
        run(samples=4, temperature=0.5)
        assert len(server.asked) == 24 and len(former.read_text().splitlines()) == 12
        assert run(samples=4) == four and len(server.asked) == 24


def test_samples_of_another_endpoint_are_kept_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-secret")
    tasks, lines = {"t": {"questions": rows_of(tmp_path), "k": 2}}, []

    def run(server, **changes):
        lines.clear()
        return evaluate(settings(server, tmp_path / "out", tasks, **changes), lines.append)["t"]

    with Endpoint(lambda prompt, seed: ("0", "stop")) as first, Endpoint(lambda prompt, seed: ("2", "stop")) as second:
        port = first.base_url.removeprefix("http://127.0.0.1:")
        secret = f"http://user:sk-secret@127.0.0.1:{port.replace('/v1', '/sk-secret/v1')}?key=sk-secret"
        run(first, base_url=secret, api_key_env="THE_KEY")
        stored = (tmp_path / "out" / "samples" / "t.jsonl").read_text()
        assert "sk-secret" not in stored and "user" not in stored
        place = f"http://127.0.0.1:{port.replace('/v1', '/***/v1')}"
        assert {sample["endpoint"] for sample in samples(tmp_path / "out", "t")} == {place}
        assert not any("warning" in line for line in lines)
        run(first, base_url=secret.replace("127.0.0.1", "localhost"), api_key_env="THE_KEY")  # the same one
        assert not any("warning" in line for line in lines)
        # Another address goes on with what is there, and says so, in --check as well.
        score = run(second)
        (warning,) = [line for line in lines if "warning" in line]
        assert f"'served' answered 6 at {place}, not at {second.base_url}" in warning and "another `output`" in warning
        assert score["accuracy"] == pytest.approx(1 / 3) and not second.asked
        checked = running.describe(settings(second, tmp_path / "out", tasks))
        assert [line for line in checked if "warning" in line] == [warning.removeprefix("eval ")]
        tasks["t"]["k"] = 3
        run(second)
        assert len(second.asked) == 3 and sum("answered 6 at" in line for line in lines) == 1


def test_a_prompt_over_the_context_is_counted_and_wrong(tmp_path):
    def answer(prompt, seed):
        return ("2", "stop") if prompt == "1 + 1?" else ("This prompt is too long for the model", 400)

    with Endpoint(answer) as server:
        score = evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path), "k": 2}}))["t"]
    assert (score["accuracy"], score["n"], score["over_context"]) == (pytest.approx(1 / 3), 3, 4)
    assert score["truncated"] == 0 and score["unjudged"] == 0
    assert "4 samples' prompts are over the context and count as wrong" in running.summary(score)


def test_a_refusal_is_told_by_its_code_whatever_its_words(tmp_path):
    refusal = {"error": {"message": "No.", "type": "invalid_request_error", "code": "context_length_exceeded"}}

    def answer(prompt, seed):
        return ("2", "stop") if prompt == "1 + 1?" else (refusal, 400)

    with Endpoint(answer) as server:
        score = evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}))["t"]
    assert (score["accuracy"], score["over_context"]) == (pytest.approx(1 / 3), 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_of_bmjax_serve_is_counted(tmp_path, stream):
    rows = [{"prompt": "2", "reference": "2"}, {"prompt": "long " * 200, "reference": "2"}]
    tasks = {"t": {"questions": str(write_rows(tmp_path / "q.jsonl", rows))}}
    with Serving(ScriptedEngine(echo)) as serving:
        values = {"base_url": f"{serving.url}/v1", "model": "tiny", "output": str(tmp_path / "out"), "tasks": tasks}
        score = evaluate(EvalSettings.read(values | {"stream": stream}))["t"]
    assert (score["accuracy"], score["n"], score["over_context"]) == (0.5, 2, 1)


def test_where_only_prompt_and_longest_answer_pass_the_context_the_answer_gets_the_rest(tmp_path):
    """As vLLM does it, with a context of 1,000 tokens, of which the long prompt alone has 1,500."""

    def answer(prompt, seed):
        length = 1500 if prompt == "2 + 2?" else 10
        longest = server.bodies[-1].get("max_tokens", 0)
        if length + longest < 1000:
            return "2", "length"
        return {"error": {"code": 400, "type": "BadRequestError", "message": (
            f"This model's maximum context length is 1000 tokens. However, you requested {longest} output tokens and "
            f"your prompt contains at least {max(1, 1001 - longest)} input tokens, for a total of at least 1001 tokens."
        )}}, 400  # fmt: skip

    lines = []
    with Endpoint(answer) as server:
        asking = settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}, concurrency=1)
        score = evaluate(asking.model_copy(update={"max_new_tokens": 1000}), lines.append)["t"]
    assert (score["over_context"], score["truncated"]) == (1, pytest.approx(2 / 3))
    assert [body.get("max_tokens") for body in server.bodies] == [1000, None] * 3
    assert sum("asked for once more" in line for line in lines) == 1


def test_where_a_refusal_tells_what_is_left_the_answer_gets_that(tmp_path):
    """A server that is asked for no length may give a short one of its own."""

    def answer(prompt, seed):
        longest = server.bodies[-1].get("max_tokens", 16)
        if 10 + longest <= 1000:
            return "2", "stop" if longest > 16 else "length"
        return {"error": {"code": "context_length_exceeded", "message": (
            f"This model's maximum context length is 1000 tokens. However, you requested {10 + longest} tokens "
            f"(10 in the messages, {longest} in the completion)."
        )}}, 400  # fmt: skip

    with Endpoint(answer) as server:
        asking = settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}, concurrency=1)
        score = evaluate(asking.model_copy(update={"max_new_tokens": 1000}))["t"]
    assert [body.get("max_tokens") for body in server.bodies] == [1000, 990] * 3 and score["truncated"] == 0


@pytest.mark.parametrize("words", [
    "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 9512, please reduce your "
    "message size and try again.",
    "max_tokens is too large: 32768. This model supports at most 16384 completion tokens.",
    "unknown field 'top_k'",
])  # fmt: skip
def test_other_refusals_are_no_prompt_over_the_context(tmp_path, words):
    refusal = {"error": {"message": words, "type": "invalid_request_error"}}
    with (
        Endpoint(lambda prompt, seed: (refusal, 400)) as server,
        pytest.raises(UserError, match=r"3 requests failed, the first: .*HTTP 400"),
    ):
        evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}))
    assert len(server.asked) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_ends_its_turn_at_once_is_wrong(tmp_path, stream):
    """As bmjax serve answers where the first token is an end token."""
    rows = [{"prompt": "2", "reference": "2"}, {"prompt": "silence", "reference": "2"}]
    tasks = {"t": {"questions": str(write_rows(tmp_path / "q.jsonl", rows)), "k": 2}}
    engine = ScriptedEngine(lambda request: [] if question(request) == "silence" else echo(request))
    with Serving(engine) as serving:
        values = {"base_url": f"{serving.url}/v1", "model": "tiny", "output": str(tmp_path / "out"), "tasks": tasks}
        score = evaluate(EvalSettings.read(values | {"stream": stream}))["t"]
    assert (score["accuracy"], score["n"], score["unjudged"], score["truncated"]) == (0.5, 2, 0, 0)
    assert [sample["tokens"] for sample in samples(tmp_path / "out", "t")] == [1, 1, 0, 0]


@pytest.mark.parametrize("reply", [
    {"choices": [{"message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
     "usage": {"completion_tokens": 0}},
])  # fmt: skip
def test_an_empty_answer_of_any_endpoint_is_wrong_and_asked_for_once(tmp_path, reply):
    with Endpoint(lambda prompt, seed: (reply, 200)) as server:
        score = evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}))["t"]
    assert (score["accuracy"], score["n"], len(server.asked)) == (0, 3, 3)


@pytest.mark.parametrize("reply", [
    {"choices": []},
    {"choices": [{"message": {}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": ""}, "finish_reason": None}], "usage": {"completion_tokens": 0}},
    {"error": {"message": "busy", "code": 503}},
])  # fmt: skip
def test_a_reply_without_an_answer_is_none(tmp_path, reply):
    with (
        Endpoint(lambda prompt, seed: (reply, 200)) as server,
        pytest.raises(UserError, match=r"tasks.t: .*3 requests failed"),
    ):
        evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}}, retries=0))


def test_no_score_is_made_of_fewer_samples_and_the_same_command_asks_again(tmp_path):
    file, out, broken = rows_of(tmp_path), tmp_path / "out", [True]

    def answer(prompt, seed):
        return ("nope", 422) if broken[0] and (prompt, seed) == ("1 + 1?", 1) else ("2", "stop")

    with Endpoint(answer) as server:
        asking = settings(server, out, {"t": {"questions": file, "k": 2}})
        with pytest.raises(UserError, match=r"tasks.t: 2 samples of each .* lack 1 in all.*row 2, sample 1"):
            evaluate(asking)
        assert not (out / "scores.json").exists()
        broken[0] = False
        assert evaluate(asking)["t"]["k"] == 2
        assert len(server.asked) == 7


@pytest.mark.parametrize("status, problem", [
    (401, "check the key in the variable api_key_env names"),
    (404, "check base_url and model"),
    (402, "top it up"),
])  # fmt: skip
def test_an_endpoint_that_refuses_ends_the_run_in_one_line(tmp_path, status, problem):
    with Endpoint(lambda prompt, seed: ("no", status)) as server, pytest.raises(UserError, match=problem) as error:
        evaluate(settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path, 40)}}))
    assert "\n" not in str(error.value) and "teacher" not in str(error.value) and len(server.asked) < 20


def test_a_full_disk_and_a_dead_endpoint_end_the_run(tmp_path, monkeypatch):
    tasks = {"t": {"questions": rows_of(tmp_path)}}
    with pytest.raises(UserError, match="is the server running"):
        evaluate(
            EvalSettings.read(
                {"base_url": "http://127.0.0.1:9/v1", "model": "m", "output": str(tmp_path / "o"), "tasks": tasks,
                 "patience": 0.2, "retries": 1}
            )
        )  # fmt: skip

    def full(self, values):
        raise UserError("samples: cannot be written: No space left on device")

    monkeypatch.setattr(JsonLines, "append", full)
    with Endpoint(lambda prompt, seed: ("2", "stop")) as server, pytest.raises(UserError, match="No space left"):
        evaluate(settings(server, tmp_path / "out", tasks))


def test_an_endpoint_needs_no_jax(tmp_path):
    program = (
        "import sys; from bmjax.evaluate.run import evaluate; from bmjax.evaluate.settings import EvalSettings\n"
        "evaluate(EvalSettings.read(sys.argv[1]))\n"
        "print(*sorted({'jax', 'torch', 'transformers', 'flax'} & sys.modules.keys()))"
    )
    with Endpoint(lambda prompt, seed: ("2", "stop")) as server:
        asking = settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path)}})
        (tmp_path / "eval.yaml").write_text(json.dumps(asking.model_dump(exclude_unset=True)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, str(tmp_path / "eval.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\n" and json.loads((tmp_path / "out" / "scores.json").read_text())["t"]["n"] == 3


def on_terminal(command, out, err) -> bytes:
    """Run a command with a terminal as standard output, standard error or both; return what it shows."""
    ours, theirs = pty.openpty()
    streams = {"stdout": theirs if out else subprocess.DEVNULL, "stderr": theirs if err else subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, **streams)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux' word for the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    return shown


def test_a_terminal_shows_every_score_once(tmp_path):
    with Endpoint(lambda prompt, seed: ("2", "stop")) as server:
        tasks = {name: {"questions": rows_of(tmp_path)} for name in ("a", "b")}
        asking = settings(server, tmp_path / "out", tasks)
        (tmp_path / "eval.yaml").write_text(json.dumps(asking.model_dump(exclude_unset=True)))
        command = [sys.executable, "-m", "bmjax", "eval", str(tmp_path / "eval.yaml")]
        for out, err in ((True, True), (True, False), (False, True)):
            shown = on_terminal(command, out, err)
            assert [shown.count(name + b": accuracy 0.333") for name in (b"a", b"b")] == [1, 1], (out, err)


def test_an_interrupt_keeps_what_is_in_flight_and_the_same_command_continues(tmp_path):
    def answer(prompt, seed):
        time.sleep(0.2)
        return "2", "stop"

    with Endpoint(answer) as server:
        asking = settings(server, tmp_path / "out", {"t": {"questions": rows_of(tmp_path, 40)}})
        config = tmp_path / "eval.yaml"
        config.write_text(json.dumps(asking.model_dump(exclude_unset=True)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "bmjax", "eval", str(config)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not server.asked and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
        assert process.returncode == 130 and "the same command continues from there" in errors
        asked = len(server.asked)
        assert 0 < asked < 40 and "Traceback" not in errors
        kept = (tmp_path / "out" / "samples" / "t.jsonl").read_text().count('"answer"')
        assert kept == asked  # answers in flight were paid for
        assert evaluate(asking)["t"]["n"] == 40 and len(server.asked) == 40
