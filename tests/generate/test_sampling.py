"""Sampling: the exact distribution of every filter, seeds, mixed batches, transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from bmjax.generate import sampling
from bmjax.generate.engine import Engine
from bmjax.generate.prompts import generate
from bmjax.generate.requests import Request, Sampling
from tests.generate.reference import build, random_prompts, reference, run

SETTINGS = {
    "temperature": Sampling(1, 0.7),
    "hot": Sampling(1, 1.6),
    "top_p": Sampling(1, 1.3, top_p=0.6),
    "top_p that one token reaches": Sampling(1, 0.4, top_p=0.01),
    "top_k": Sampling(1, 1.2, top_k=5),
    "min_p": Sampling(1, 1.5, min_p=0.2),
    "all": Sampling(1, 1.4, top_p=0.8, top_k=12, min_p=0.1, repetition_penalty=1.3),
}


def settings_of(rows: list[Sampling], count: int) -> sampling.Rows:
    """The same settings for `count` rows each, with other random numbers."""
    columns = np.repeat(
        [(s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.top_k) for s in rows], count, axis=0
    ).T
    number = np.arange(len(rows) * count, dtype=np.int32)
    floats = [column.astype(np.float32) for column in columns[:4]]
    zeros = np.zeros_like(number)
    return sampling.Rows(*floats, columns[4].astype(np.int32), number, zeros, zeros.astype(np.uint32) + 7)


def processed(z_V: np.ndarray, seen: list[int], s: Sampling) -> np.ndarray:
    """The probabilities after transformers' processors, in the order that `generate` applies them."""
    processors = [transformers.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)]
    processors += [transformers.TemperatureLogitsWarper(s.temperature)]
    processors += [transformers.TopKLogitsWarper(s.top_k)] if s.top_k else []
    processors += [transformers.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    processors += [transformers.MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = transformers.LogitsProcessorList(processors)(torch.tensor([seen]), torch.tensor(z_V)[None])
    return scores[0].double().softmax(-1).numpy()


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """(statistic, its mean plus 5 standard deviations for a right sampler); rare tokens pooled."""
    expected = observed.sum() * probabilities
    rare = expected < 5
    o, e = np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = len(o) - 1
    return float(((o - e) ** 2 / e).sum()), freedom + 5 * np.sqrt(2 * freedom)


def test_every_filter_draws_from_transformers_distribution():
    # All settings in one batch, as a server mixes them.
    rng = np.random.default_rng(0)
    V, count = 200, 4000
    z_V, seen = (rng.normal(size=V) * 2).astype(np.float32), [3, 5, 100, int(np.argmax(rng.normal(size=V)))]
    rows = settings_of(list(SETTINGS.values()), count)
    B = len(SETTINGS) * count
    seen_BV = np.zeros((B, V), bool)
    seen_BV[:, seen] = True
    used = sampling.Used(np.bool_(True), np.bool_(True), np.bool_(False), np.bool_(True))

    @jax.jit
    def draw(rows, seen_BV):
        z_BV = sampling.penalize(jnp.broadcast_to(z_V, (B, V)), seen_BV, rows.penalty)
        return sampling.choose(z_BV, rows, jnp.int32(0), used)

    tokens = np.asarray(draw(rows, seen_BV)).reshape(len(SETTINGS), count)
    for (name, settings), drawn in zip(SETTINGS.items(), tokens, strict=True):
        p = processed(z_V, seen, settings)
        observed = np.bincount(drawn, minlength=V)
        assert not observed[p == 0].any(), name
        statistic, bound = chi_square(observed, p)
        assert statistic <= bound, (name, statistic, bound)
        assert (observed > 0).sum() > 0.5 * (p * count > 3).sum(), name


def test_what_is_kept_is_what_transformers_keeps():
    rng = np.random.default_rng(1)
    z_BV = (rng.normal(size=(len(SETTINGS) * 8, 300)) * 3).astype(np.float32)
    z_BV[:, 7] = z_BV[:, 9]  # a tie
    rows = settings_of(list(SETTINGS.values()), 8)
    kept = np.isfinite(np.asarray(sampling.filtered(z_BV / rows.temperature[:, None], rows)))
    for row, (z_V, settings) in enumerate(zip(z_BV, np.repeat(list(SETTINGS.values()), 8), strict=True)):
        plain = Sampling(1, settings.temperature, settings.top_p, settings.top_k, settings.min_p)
        np.testing.assert_array_equal(kept[row], processed(z_V, [0], plain) > 0, err_msg=str(plain))


def test_greedy_rows_in_a_sampled_batch_stay_greedy():
    hf, config, params = build("gqa_untied")
    prompts = random_prompts(config, [9, 20, 33, 40])
    engine = Engine(config, params, (), slots=8)
    settings = [Sampling(8), Sampling(8, 1.0), Sampling(8), Sampling(8, 1.0, top_k=2)]
    listeners = run(engine, [Request(tuple(p), s) for p, s in zip(prompts, settings, strict=True)])
    greedy = reference(hf, prompts, 8)[0]
    assert [listeners[i].ids for i in (0, 2)] == [greedy[i] for i in (0, 2)]
    assert all(listeners[i].ids != greedy[i] for i in (1, 3))


def test_the_repetition_penalty_is_transformers():
    hf, config, params = build("gqa_untied")
    prompts = random_prompts(config, [9, 20, 33, 40])
    penalties = [1.0, 1.8, 1.8, 0.7]
    settings = [Sampling(20, repetition_penalty=penalty, logprobs=0) for penalty in penalties]
    engine = Engine(config, params, (), slots=8)
    rows = run(engine, [Request(tuple(p), s) for p, s in zip(prompts, settings, strict=True)])
    for prompt, row, penalty in zip(prompts, rows, penalties, strict=True):
        tokens, logprobs = reference(hf, [prompt], 20, repetition_penalty=penalty)
        assert [row.ids] == tokens
        # Log-probabilities are the model's, before the penalty.
        np.testing.assert_allclose([t.logprob for t in row.tokens], logprobs[0, range(20), row.ids], atol=2e-5)


def test_a_seed_gives_the_same_text_at_batch_1_and_32():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, [5, 60, 21, 34] * 8)
    settings = Sampling(10, 1.0, 0.9, seed=11)
    wide = generate(config, params, prompts, settings, (3,), batch=32)
    engine = Engine(config, params, (3,), slots=1)
    for number in range(0, 32, 3):
        (alone,) = run(engine, [Request(tuple(prompts[number]), settings, sample=number)])
        assert tuple(alone.ids) == wide[number].tokens
    assert len({out.tokens for out in wide[::4]}) == 8  # one prompt length, but other prompts and numbers
    same = generate(config, params, [prompts[2]] * 4, settings, (), batch=8)
    assert len({out.tokens for out in same}) == 4
    other = generate(config, params, prompts[:4], Sampling(10, 1.0, 0.9, seed=12), (3,), batch=8)
    assert [out.tokens for out in other] != [out.tokens for out in wide[:4]]
    for seed in (2**40 + 2, -1):
        assert generate(config, params, prompts[:1], Sampling(4, 1.0, seed=seed), (), batch=8)


@pytest.mark.parametrize("values", [[0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, -np.inf, np.inf]])
def test_the_order_of_floats_is_kept(values):
    z = np.array(sorted(values), np.float32)
    order = np.asarray(sampling._sortable(jnp.asarray(z))).astype(np.int64)
    assert (np.diff(order)[np.diff(z) > 0] > 0).all()
