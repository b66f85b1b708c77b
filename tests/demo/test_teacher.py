import json
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

import pytest

from bmjax.demo.problems import make_problems, solve
from bmjax.demo.settings import Mistakes
from bmjax.demo.teacher import DemoTeacher, count_tokens


def post(url: str, body: Any) -> tuple[int, dict[str, str], Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


def chat(prompt: str, **extra: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": prompt}], **extra}


@pytest.fixture(scope="module")
def flawless() -> Any:
    with DemoTeacher(mistakes=Mistakes(wrong=0, truncated=0, malformed=0, flaky=0)) as teacher:
        yield teacher


def test_it_answers_as_deepseek_r1_does(flawless: DemoTeacher) -> None:
    status, _, body = post(flawless.base_url, chat("Compute (7 + 5) * 3 - 4."))
    assert status == 200
    content = "<think>\n7+5=12\n12*3=36\n36-4=32\n</think>\n32"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    ]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 20


def test_max_tokens_cuts_and_n_gives_choices(flawless: DemoTeacher) -> None:
    _, _, body = post(flawless.base_url, chat("Compute 7 + 5.", max_tokens=8, n=3))
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    for choice in body["choices"]:
        assert choice["finish_reason"] == "length"
        assert count_tokens(choice["message"]["content"]) == 8


def test_models_are_listed(flawless: DemoTeacher) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{flawless.base_url}/models", timeout=10) as answer:
        assert json.load(answer)["data"][0]["id"] == "builtin-teacher"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat("Who wrote Faust?"), "does not know"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "user"),
        (chat("Compute 1 + 1.", n=0), "n:"),
        (chat("Compute 1 + 1.", max_tokens="9"), "max_tokens"),
        (chat("Compute 1 + 1.", temperature=-1), "temperature"),
        (chat("Compute 1 + 1.", stream=True), "stream"),
        (chat("Compute 1 + 1.", seed=1.5), "seed"),
        (chat("Compute 1 + 1.", mistakes={"wrogn": 1}), "wrong"),
        (chat("Compute 1 + 1.", mistakes={"wrong": 2}), "wrong"),
        ([1], "object"),
        (b"{no json", "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_what_it_refuses(flawless: DemoTeacher, body: Any, message: str) -> None:
    status, _, answer = post(flawless.base_url, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_mistakes_come_at_their_rates_and_look_as_they_should() -> None:
    teacher = DemoTeacher(seed=5, mistakes=Mistakes(wrong=0.1, truncated=0.1, malformed=0.1, flaky=0))
    kinds: Counter[str] = Counter()
    for problem in make_problems("math", 3000):
        content, finish = teacher.reply(problem.prompt, seed=0)
        right = solve(problem.prompt)
        before, closed, after = content.partition("</think>")
        if finish == "length":
            kinds["truncated"] += 1
            assert f"<think>\n{right.reasoning}".startswith(content) and not closed
        elif content.count("<think>") == content.count("</think>") == 1 and after.strip():
            kinds["right" if after.strip() == problem.reference else "wrong"] += 1
            assert (before == f"<think>\n{right.reasoning}\n") == (after.strip() == problem.reference)
        else:
            kinds["malformed"] += 1
    assert 2000 < kinds["right"] < 2200
    assert all(230 < kinds[kind] < 370 for kind in ("wrong", "truncated", "malformed"))


def test_answers_depend_on_request_and_seed_alone() -> None:
    prompts = [p.prompt for p in make_problems("code", 300)]
    first, again = DemoTeacher(seed=1), DemoTeacher(seed=1)
    assert [first.reply(p, 7) for p in prompts] == [again.reply(p, 7) for p in reversed(prompts)][::-1]
    assert [first.reply(p, 7) for p in prompts] != [first.reply(p, 8) for p in prompts]
    assert [first.reply(p, 7) for p in prompts] != [DemoTeacher(seed=2).reply(p, 7) for p in prompts]


def test_a_request_names_its_mistakes(flawless: DemoTeacher) -> None:
    asked = chat("Compute 7 + 5.", mistakes={"wrong": 1, "truncated": 0, "malformed": 0, "flaky": 0})
    _, _, body = post(flawless.base_url, asked)
    assert not body["choices"][0]["message"]["content"].endswith("\n12")


def test_a_flaky_request_succeeds_the_second_time() -> None:
    with DemoTeacher(mistakes=Mistakes(wrong=0, truncated=0, malformed=0, flaky=1)) as teacher:
        seen = set()
        for number in range(12):
            status, headers, body = post(teacher.base_url, chat(f"Compute {number} + 1."))
            seen.add(status)
            assert "message" in body["error"]
            assert (headers.get("Retry-After") == "0") == (status == 429)
            assert post(teacher.base_url, chat(f"Compute {number} + 1."))[0] == 200
        assert seen == {429, 500}
        assert (teacher.requests, teacher.refused) == (24, 12)


def test_it_serves_inside_its_block_only() -> None:
    with DemoTeacher() as teacher:
        url = teacher.base_url
    with pytest.raises(RuntimeError):
        _ = teacher.base_url
    with pytest.raises(urllib.error.URLError):
        post(url, chat("Compute 1 + 1."))
    with pytest.raises(ValueError):
        Mistakes(wrong=0.6, truncated=0.6)
