"""The engine: transformers' tokens and log-probabilities whatever shares the batch, slots, cancelling, memory."""

import logging
import threading
from functools import lru_cache

import jax
import numpy as np
import pytest
import torch

from bmjax.config import UserError
from bmjax.generate.engine import MOST_READ, Engine
from bmjax.generate.requests import Request, Sampling
from bmjax.parallel.mesh import make_mesh
from tests.generate.reference import Listener, build, random_prompts, reference, run

LENGTHS = [1, 3, 17, 40, 41, 70, 16, 100, 64, 33] * 5
NEW = 12


def greedy(prompts, **options):
    return [Request(tuple(prompt), Sampling(NEW, **options)) for prompt in prompts]


def assert_reference(hf, prompts, listeners, expected=None):
    tokens, logprobs = expected or reference(hf, prompts, NEW)
    assert [listener.ids for listener in listeners] == tokens
    for row, listener in enumerate(listeners):
        assert listener.reason == "length"
        mine = [token.logprob for token in listener.tokens]
        np.testing.assert_allclose(mine, logprobs[row, range(NEW), listener.ids], atol=2e-5)
        likeliest = np.argsort(-logprobs[row], axis=-1)[:, :2]
        assert [[id for id, _ in token.likeliest] for token in listener.tokens] == likeliest.tolist()


@pytest.mark.parametrize(
    "name",
    ["gqa_untied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("window_some", "yarn", "mha_tied"))],
)
def test_greedy_tokens_and_logprobs_are_transformers_for_50_prompts(name):
    hf, config, params = build(name)
    prompts = random_prompts(config, LENGTHS)
    engine = Engine(config, params, (), slots=8)
    assert_reference(hf, prompts, run(engine, greedy(prompts, logprobs=2)))


def test_alone_and_entering_one_after_another_the_tokens_are_the_same():
    hf, config, params = build("yarn_window")
    prompts = random_prompts(config, LENGTHS)
    engine = Engine(config, params, (), slots=4)
    alone = [run(engine, [request])[0] for request in greedy(prompts, logprobs=2)]
    assert_reference(hf, prompts, alone)
    # A request enters at every step, while others are at their beginning, middle or end.
    entering = []
    for request in greedy(prompts, logprobs=2):
        entering.append(Listener(engine, request))
        engine.step()
    engine.run()
    assert_reference(hf, prompts, entering)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa_untied", "yarn_window"])
def test_on_a_mesh_the_tokens_are_the_same(name):
    hf, config, params = build(name)
    prompts = random_prompts(config, LENGTHS)
    with jax.set_mesh(make_mesh({"tensor": 2, "data": 4})):
        engine = Engine(config, params, (), slots=8)
    assert_reference(hf, prompts, run(engine, greedy(prompts, logprobs=2)))


# Several chunks each, one more than two whole chunks, and short ones between them.
LONG = [301, 5, 800, 64, 513, 1, 320, 700, 33, 257]


@pytest.mark.parametrize(
    "name",
    ["yarn_window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gqa_untied", "window_some", "yarn"))],
)
def test_long_prompts_alone_batched_and_entering(name):
    hf, config, params = build(name, 1024)
    prompts = random_prompts(config, LONG)
    engine = Engine(config, params, (), slots=4, prefill_tokens=256)
    requests = greedy(prompts, logprobs=2)
    batched = run(engine, requests)
    engine._table.clear()  # else the prompts are found in the cache
    alone = []
    for request in requests:
        alone += run(engine, [request])
        engine._table.clear()
    entering = []
    for request in requests:
        entering.append(Listener(engine, request))
        engine.step()
    engine.run()
    tokens, logprobs = reference(hf, prompts, NEW)
    for listeners in (batched, alone, entering):
        assert_reference(hf, prompts, listeners, (tokens, logprobs))


def test_prompts_of_several_chunks_and_their_logprobs():
    hf, config, params = build("window_some", 700)
    prompts = random_prompts(config, [600, 257, 5, 300])
    engine = Engine(config, params, (), slots=4)
    scored = [
        Request(request.tokens, request.sampling, prompt_logprobs=True) for request in greedy(prompts, logprobs=2)
    ]
    listeners = run(engine, scored)
    assert_reference(hf, prompts, listeners)
    for prompt, listener in zip(prompts, listeners, strict=True):
        told = listener.running.prompt_tokens
        assert [token.id for token in told] == prompt and told[0].logprob is None
        with torch.no_grad():
            want = hf(torch.tensor(prompt)[None]).logits[0].log_softmax(-1).numpy()
        mine = [token.logprob for token in told[1:]]
        np.testing.assert_allclose(mine, want[range(len(prompt) - 1), prompt[1:]], atol=5e-5)
    # A prompt alone can be scored up to the last token of the context.
    prompt = random_prompts(config, [700])[0]
    (listener,) = run(engine, [Request(tuple(prompt), Sampling(0), prompt_logprobs=True)])
    assert (listener.ids, listener.calls) == ([], ["length"]) and len(listener.running.prompt_tokens) == 700


def test_samples_of_a_prompt_read_it_once(monkeypatch):
    _, config, params = build("gqa_untied")
    (prompt,) = random_prompts(config, [90])
    engine = Engine(config, params, (), slots=8)
    read = []
    for name in ("_read_first", "_read_next"):
        method = getattr(engine._reader, name)
        monkeypatch.setattr(
            engine._reader, name, lambda answers, method=method: read.append(method(answers)) or read[-1]
        )
    settings = Sampling(NEW, temperature=1.0, seed=4)
    shared = run(engine, [Request(tuple(prompt), settings, sample=n) for n in range(12)])
    # Once for the first eight, and its last token once more for those that came later.
    assert read == [256, 64]
    apart = [run(Engine(config, params, (), slots=8), [Request(tuple(prompt), settings, sample=n)])[0] for n in (0, 11)]
    assert [shared[0].ids, shared[11].ids] == [listener.ids for listener in apart]
    assert len({tuple(listener.ids) for listener in shared}) == 12


def test_a_conversation_goes_on_where_it_was(monkeypatch):
    hf, config, params = build("gqa_untied")
    first, more, other = random_prompts(config, [60, 20, 90])
    engine = Engine(config, params, (), slots=2)
    (listener,) = run(engine, [Request(tuple(first), Sampling(NEW))])
    prompt = [*first, *listener.ids, *more]
    read = []
    monkeypatch.setattr(engine._reader, "_read_first", lambda answers: pytest.fail("read from the start"))
    method = engine._reader._read_next
    monkeypatch.setattr(engine._reader, "_read_next", lambda answer: read.append(method(answer)) or read[-1])
    (again,) = run(engine, [Request(tuple(prompt), Sampling(NEW))])
    assert [again.ids] == reference(hf, [prompt], NEW)[0] and read == [64]
    monkeypatch.undo()
    # The slot is another's now, and its text is not mixed with what was there.
    listeners = run(engine, greedy([other, other[::-1]]))
    assert [row.ids for row in listeners] == reference(hf, [other, other[::-1]], NEW)[0]


def test_end_tokens_and_rooms():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, [9, 120, 30, 127])
    free = run(Engine(config, params, (), slots=8), [Request(tuple(p), Sampling(40)) for p in prompts])
    assert [len(row.ids) for row in free] == [40, 8, 40, 1] and {row.reason for row in free} == {"length"}
    first, second = free[0].ids[11], free[2].ids[5]
    engine = Engine(config, params, (first,), slots=8)
    requests = [Request(tuple(p), Sampling(40, end_ids=(second, 3))) for p in prompts]
    for row, unstopped in zip(run(engine, requests), free, strict=True):
        ends = [i for i, token in enumerate(unstopped.ids) if token in (first, second, 3)]
        assert row.ids == unstopped.ids[: ends[0] if ends else None]
        assert row.reason == ("stop" if ends else "length")
    (row,) = run(engine, [Request(tuple(prompts[0]), Sampling(40, ignore_end=True))])
    assert row.ids == free[0].ids


def test_cancelled_requests_free_their_slots_at_once():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, [20, 30, 40, 50])
    engine = Engine(config, params, (), slots=2)
    listeners = [Listener(engine, Request(tuple(prompt), Sampling(60))) for prompt in prompts]
    engine.step()
    assert (engine.running, engine.waiting) == (2, 2)
    for number in (0, 3, 0, 3):  # one that runs and one that waits, each twice
        engine.cancel(listeners[number].running)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 0)
    assert listeners[0].reason == listeners[3].reason == "cancelled" and len(listeners[0].ids) == 8
    engine.run()
    alone = [run(engine, [Request(tuple(prompt), Sampling(60))])[0].ids for prompt in prompts]
    assert [row.ids for row in listeners[1:3]] == alone[1:3] and listeners[1].reason == "length"
    engine.cancel(listeners[1].running)
    assert not engine.step() and listeners[1].reason == "length"
    # One whose prompt others wait for leaves them to read it.
    same = [Listener(engine, Request(tuple(prompts[0]), Sampling(60))) for _ in range(2)]
    engine._admit()
    engine.cancel(same[0].running)
    engine.run()
    assert same[1].ids == alone[0] and same[0].reason == "cancelled"


def test_requests_come_from_other_threads():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, [5, 20, 33, 60] * 4)
    engine = Engine(config, params, (), slots=8)
    alone = [run(engine, [request])[0].ids for request in greedy(prompts[:4])]
    listeners = {}

    def client(number: int) -> None:
        listeners[number] = Listener(engine, greedy([prompts[number % 4]])[0])
        if number % 5 == 4:
            engine.cancel(listeners[number].running)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.step():
        engine.step()
    for number, listener in listeners.items():
        if number % 5 == 4:
            assert listener.reason in ("cancelled", "length")
        else:
            assert listener.ids == alone[number % 4]


def test_nothing_is_compiled_for_requests_within_a_bucket():
    _, config, params = build("gqa_untied")
    engine = Engine(config, params, (), slots=8)
    settings = [Sampling(9), Sampling(14, 0.9, top_p=0.8), Sampling(3, 1.0, top_k=4, min_p=0.1, logprobs=3)]

    def wave(lengths, seed):
        prompts = random_prompts(config, lengths, seed)
        run(engine, [Request(tuple(p), settings[i % 3], sample=i) for i, p in enumerate(prompts)])

    wave([5, 20, 33, 60, 12, 3, 40, 7, 9, 50, 61, 2], seed=1)
    with jax.log_compiles(), CountCompilations() as count:
        wave([6, 31, 64, 49, 2, 22, 35, 18, 1, 43, 62, 8], seed=2)
        # Another model of the same shape shares the programs.
        again = Engine(config, jax.tree.map(lambda a: a * 1.1, params), (), slots=8)
        count.messages.clear()
        run(again, [Request((5, 6, 7), Sampling(9)), Request(tuple(range(2, 42)), Sampling(9))])
    assert not count.messages


@pytest.mark.parametrize(("slots", "sizes"), [(2, 2), pytest.param(8, 4, marks=pytest.mark.slow)])
def test_after_compiling_ahead_no_request_compiles_anything(slots, sizes):
    _, config, params = build("gqa_untied", 256)
    engine = Engine(config, params, (), slots=slots)
    assert engine.compile_ahead() == sizes and engine.running == 0  # all slots or a quarter; 128 or 256 tokens
    long, longer = random_prompts(config, [150, 240])
    requests = [
        *(Request(tuple(prompt), Sampling(9)) for prompt in random_prompts(config, [5, 20, 33, 60] * 5)),
        Request(tuple(long), Sampling(100, 0.9, top_p=0.8, logprobs=3)), Request(tuple(longer), Sampling(12)),
        Request((5, 6, 7), Sampling(9, 1.0, top_k=4, min_p=0.1)),
        Request(tuple(long), Sampling(repetition_penalty=2.0)),
        Request(tuple(longer), Sampling(0), prompt_logprobs=True), *[Request(tuple(longer), Sampling(4, 1.0))] * 3,
    ]  # fmt: skip
    with jax.log_compiles(), CountCompilations() as count:
        # Alone the longest first, so that the cache shrinks; then all, so that it grows.
        for request in requests[::-1]:
            run(engine, [request])
        listeners = run(engine, requests)
        for number, request in enumerate(requests):
            listeners.append(Listener(engine, request))
            engine.step()
            if number % 4 == 0:
                engine.cancel(listeners[-1].running)
        engine.run()
    assert not count.messages and {listener.reason for listener in listeners} == {"length", "cancelled"}


def test_a_cancelled_request_is_not_read_to_its_end():
    _, config, params = build("gqa_untied", 4096)
    engine = Engine(config, params, (), slots=2, prefill_tokens=256)
    (prompt,) = random_prompts(config, [4000])
    listener = Listener(engine, Request(tuple(prompt), Sampling(5)))
    engine.step()
    assert 0 < listener.running.read <= MOST_READ * 256 < 4000
    engine.cancel(listener.running)
    assert not engine.step() and listener.calls == ["cancelled"]
    # One that is cancelled while a step reads stops that step after the chunk.
    engine._table.clear()  # what was read would be found again
    listener = Listener(engine, Request(tuple(prompt), Sampling(5)))
    method, chunks = engine._reader._read_next, []

    def cancel_at_the_third(answer):
        chunks.append(answer.read)
        if len(chunks) == 3:
            engine.cancel(answer)
        return method(answer)

    engine._reader._read_next = cancel_at_the_third
    assert engine.step() and not engine.step()
    assert len(chunks) == 3 and listener.calls == ["cancelled"]


class CountCompilations:
    """What JAX says that it compiles."""

    def __enter__(self):
        self.messages = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: (
            self.messages.append(record.getMessage()) if "ompiling" in record.getMessage() else None
        )
        logging.getLogger("jax").addHandler(self.handler)
        return self

    def __exit__(self, *error):
        logging.getLogger("jax").removeHandler(self.handler)


def test_memory_bounds_the_rows_that_run_together():
    _, config, params = build("gqa_untied")
    a_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    prompts = random_prompts(config, [10, 60, 30, 20, 50])
    whole = run(Engine(config, params, (), slots=8), greedy(prompts))
    engine = Engine(config, params, (), slots=8, memory=2 * 128 * a_token)
    listeners = [Listener(engine, request) for request in greedy(prompts)]
    most = 0
    while engine.step():
        most = max(most, engine.running)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._table.cache))
        assert held <= 2 * 128 * a_token
    assert most == 2 and [row.ids for row in listeners] == [row.ids for row in whole]
    with pytest.raises(
        UserError, match=r"the cache of a context of 128 tokens takes 0 MiB a device, the budget is 0 MiB"
    ):
        Engine(config, params, (), slots=8, memory=100 * a_token)


def test_an_int8_cache_is_nearly_exact():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, LENGTHS[:10])
    requests = greedy(prompts, logprobs=2)
    full = run(Engine(config, params, (), slots=8), requests)
    small = Engine(config, params, (), slots=8, quantized_cache=True)
    rows = run(small, requests)
    assert small._table.cache[0].k.dtype == np.int8
    distances = []
    for row, wanted in zip(rows, full, strict=True):
        same = next((i for i, pair in enumerate(zip(row.ids, wanted.ids, strict=True)) if pair[0] != pair[1]), NEW)
        assert same >= 1
        distances += [abs(row.tokens[i].logprob - wanted.tokens[i].logprob) for i in range(same)]
    assert len(distances) > 0.8 * NEW * len(rows) and np.max(distances) < 0.05 and np.mean(distances) < 0.01


@pytest.mark.parametrize("request_, problem", [
    (Request(()), "prompt: empty; expected at least one token"),
    (Request((5,) * 128), "prompt: 128 tokens, the model's context holds 128 with the answer; shorten it"),
    (Request((5,) * 129, Sampling(0), prompt_logprobs=True), "prompt: 129 tokens, the model's context holds 128; "),
    (Request((97,)), "prompt: token id 97, the model's vocabulary has 0..96"),
    (Request((5,), Sampling(0)), "max_new_tokens is 0; expected at least 1"),
    (Request((5,), Sampling(-1), prompt_logprobs=True), "max_new_tokens is -1; expected at least 0"),
    (Request((5,), Sampling(temperature=-1.0)), "temperature is -1.0; expected a number from 0 on"),
    (Request((5,), Sampling(temperature=float("nan"))), "temperature is nan; expected a number from 0 on"),
    (Request((5,), Sampling(top_p=0.0)), r"top_p is 0.0; expected in \(0, 1\]"),
    (Request((5,), Sampling(top_k=-1)), "top_k is -1; expected at least 0"),
    (Request((5,), Sampling(min_p=1.5)), r"min_p is 1.5; expected in \[0, 1\]"),
    (Request((5,), Sampling(repetition_penalty=0.0)), "repetition_penalty is 0.0; expected above 0"),
    (Request((5,), Sampling(logprobs=21)), r"logprobs is 21; expected in 0\.\.20"),
])  # fmt: skip
def test_impossible_requests_are_refused_in_one_line(request_, problem):
    engine = small_engine()
    with pytest.raises(UserError, match=problem):
        engine.submit(request_, lambda tokens, reason: None)
    assert not engine.step()


@lru_cache
def small_engine() -> Engine:
    _, config, params = build("gqa_untied")
    return Engine(config, params, (), slots=2)


@pytest.mark.slow
def test_with_the_gpu_kernel_the_tokens_are_the_same():
    # Interpreted: the layout of the cache, its pages and its int8 numbers are those of a GPU.
    hf, config, params = build("gqa_untied", head_dim=16)
    prompts = random_prompts(config, [5, 40, 70, 33])
    engine = Engine(config, params, (), slots=2, attention="gpu")
    assert_reference(hf, prompts, run(engine, greedy(prompts, logprobs=2)))
    small = run(Engine(config, params, (), slots=2, attention="gpu", quantized_cache=True), greedy(prompts))
    plain = run(Engine(config, params, (), slots=2, quantized_cache=True), greedy(prompts))
    same = [a == b for x, y in zip(small, plain, strict=True) for a, b in zip(x.ids, y.ids, strict=True)]
    assert np.mean(same) > 0.8
