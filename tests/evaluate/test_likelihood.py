"""Log-likelihoods through the engine equal the model's held-out loss; texts are those of generate."""

import math

import jax
import numpy as np
import pytest

import bmjax
from bmjax.config import UserError
from bmjax.evaluate.likelihood import continue_texts, loglikelihoods
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.settings import EvalSettings
from bmjax.generate.engine import Engine
from bmjax.generate.requests import Request, Sampling
from tests.conftest import sums, write_rows


@pytest.fixture(scope="module")
def model(student):
    return bmjax.load(student)


@pytest.fixture(scope="module")
def engine(model):
    with jax.set_mesh(model.mesh):
        return Engine(model.config, model.params, [2], slots=4)


@pytest.fixture(scope="module")
def pairs():
    """Pairs of 40 tokens, of which 1 to 26 are the continuation."""
    rows = np.random.default_rng(0).integers(5, 300, (6, 40)).tolist()
    return [(row[: 39 - 5 * number], row[39 - 5 * number :]) for number, row in enumerate(rows)]


def test_a_loglikelihood_is_minus_the_held_out_loss(model, engine, pairs):
    scores, cut = loglikelihoods(engine, pairs, 256)
    assert cut == 0
    for (before, after), score in zip(pairs, scores, strict=True):
        nats, count = model.loss([before + after], [[0] * len(before) + [1] * len(after)])
        assert count == len(after) and score.logprob == pytest.approx(-nats, rel=1e-6, abs=1e-6)
        best = np.asarray(model.logits([before + after]))[0, len(before) - 1 : -1].argmax(-1).tolist()
        assert score.is_greedy == (best == after)


def test_loglikelihoods_of_a_data_set_add_up_to_evals_held_out_loss(engine, student, tokenizer, tmp_path):
    """`bmjax eval` packs whole chats into rows; lm-eval's requests come one by one, tokenized by the caller."""
    rows = [{key: value for key, value in row.items() if key != "reasoning"} for row in sums(40, seed=3)]
    values = {
        "model": str(student), "output": str(tmp_path / "out"), "seq_len": 128, "batch": 4, "mesh": {},
        "tasks": {"held_out_loss": {"traces": str(write_rows(tmp_path / "traces.jsonl", rows))}},
    }  # fmt: skip
    score = evaluate(EvalSettings.read(values))["held_out_loss"]
    asked = []
    for row in rows:
        before = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        asked.append(tuple(tokenizer(text)["input_ids"] for text in (before, f"{row['response']}<|im_end|>")))
    scores, cut = loglikelihoods(engine, asked, 256)
    assert cut == score["cut_rows"] == 0 and score["loss_tokens"] == sum(len(after) for _, after in asked) > 400
    nats = -math.fsum(score.logprob for score in scores)
    assert nats == pytest.approx(score["loss"] * score["loss_tokens"], rel=1e-6)


def test_what_greedy_decoding_writes_is_greedy(model, engine, pairs):
    before, after = pairs[0][0], []
    engine.submit(Request(tuple(before), Sampling(5)), lambda tokens, _: after.extend(token.id for token in tokens))
    engine.run()
    (score, other), _ = loglikelihoods(engine, [(before, after), (before, [*after[:-1], after[-1] - 1])], 256)
    assert score.is_greedy and not other.is_greedy


def test_a_long_context_loses_its_beginning_and_is_counted(model, engine):
    tokens = list(range(5, 265))
    (score,), cut = loglikelihoods(engine, [(tokens[:-3], tokens[-3:])], 256)
    (same,), _ = loglikelihoods(engine, [(tokens[4:-3], tokens[-3:])], 256)
    assert cut == 1 and score == same


def test_what_cannot_be_scored_is_said(engine):
    with pytest.raises(UserError, match="pair 1 has no context"):
        loglikelihoods(engine, [([5], [6]), ([], [6])], 256)
    with pytest.raises(UserError, match="continuation 0 has 256 tokens"):
        loglikelihoods(engine, [([5], [6] * 256)], 256)


def test_texts_are_those_of_generate_up_to_a_stop_string(model, engine):
    prompts = ["1 + 2", "What is 3?", "7"]
    tokens = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    whole = bmjax.generate(model, prompts, max_new_tokens=12)
    asked = [(ids, Sampling(12), ()) for ids in tokens]
    assert continue_texts(engine, model.tokenizer, asked) == whole
    stops = [text[4:6] for text in whole]
    asked = [(ids, Sampling(12), (stop,)) for ids, stop in zip(tokens, stops, strict=True)]
    cut = [text[: text.find(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert continue_texts(engine, model.tokenizer, asked) == cut
