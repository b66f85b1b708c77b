"""Greedy tokens are transformers', sampling follows the model's probabilities, batches change nothing."""

from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers

from bmjax.config import UserError
from bmjax.generate.sampler import Generation, Sampling, _compiled, generate
from bmjax.model.config import ModelConfig
from tests.model.reference import BASE, CONFIGS, from_state

LENGTHS = [1, 3, 17, 40, 41, 70, 16]


def prompts(config, lengths=LENGTHS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]


def reference(hf, prompts, new: int, eos: int | None = None) -> list[list[int]]:
    """transformers' greedy continuations, padded on the left, without the end token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0)
    rows = out[:, longest:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@lru_cache
def build(name: str, length: int = 128):
    """(transformers model, config, parameters) of 2 layers; where CONFIGS has windows, on the second."""
    torch.manual_seed(0)
    values = BASE | CONFIGS[name] | {"max_position_embeddings": length, "num_hidden_layers": 2, "max_window_layers": 1}
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values, attn_implementation="eager")).eval()
    config = ModelConfig.from_hf(hf.config.to_dict())
    return hf, config, from_state(config, {k: v.detach().numpy() for k, v in hf.state_dict().items()})


@pytest.mark.parametrize("name", ["gqa_untied", "mha_tied", "yarn", "window_some", "yarn_window"])
def test_greedy_tokens_of_a_mixed_batch_are_transformers(name):
    hf, config, params = build(name)
    mine = prompts(config)
    outs = generate(config, params, mine, Sampling(24), ())
    assert [list(out.tokens) for out in outs] == reference(hf, mine, 24)
    assert {out.finish_reason for out in outs} == {"length"}


def test_end_tokens_stop_a_row_and_only_that_row():
    hf, config, params = build("gqa_untied")
    mine = prompts(config)
    free = generate(config, params, mine, Sampling(24), ())
    eos = free[3].tokens[5]
    outs = generate(config, params, mine, Sampling(24), (eos, 10_000))
    assert [list(out.tokens) for out in outs] == reference(hf, mine, 24, eos)
    for out, unstopped in zip(outs, free, strict=True):
        assert out.finish_reason == ("stop" if eos in unstopped.tokens else "length")
    assert outs[3].finish_reason == "stop" and len(outs[3].tokens) <= 5
    assert any(out.finish_reason == "length" for out in outs)


def test_the_size_of_a_batch_changes_nothing():
    _, config, params = build("gqa_untied")
    mine = prompts(config)
    sampling = Sampling(24, 1.0, seed=7)
    outs = generate(config, params, mine, sampling, (5,))
    # A row's random numbers come from its number in the call, not from its neighbours.
    assert generate(config, params, mine, sampling, (5,), batch=4) == outs


def test_one_seed_one_text():
    _, config, params = build("gqa_untied")
    mine = prompts(config)
    texts = {seed: generate(config, params, mine, Sampling(24, 1.0, seed=seed), (5,)) for seed in (0, 1, 2**40 + 2, -1)}
    assert texts[0] == generate(config, params, mine, Sampling(24, 1.0, seed=0), (5,))
    assert texts[0] != texts[1]
    same = generate(config, params, [mine[2]] * 4, Sampling(24, 1.0, seed=0), ())
    assert len({out.tokens for out in same}) == 4  # samples of one prompt differ


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """(statistic, its mean plus 5 standard deviations for a right sampler); rare tokens pooled."""
    expected = observed.sum() * probabilities
    rare = expected < 5
    o, e = np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = len(o) - 1
    return float(((o - e) ** 2 / e).sum()), freedom + 5 * np.sqrt(2 * freedom)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature, top_p", [(0.8, 1.0), (1.3, 0.6)])
def test_sampling_follows_the_models_probabilities(temperature, top_p):
    hf, config, params = build("gqa_untied")
    prompt = prompts(config, [9])[0]
    count = 4096

    def expected(ids) -> np.ndarray:
        with torch.no_grad():
            p = softmax(hf(torch.tensor(ids)[None]).logits[0, -1].numpy() / temperature)
        order = np.argsort(-p)
        inside = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
        kept = np.zeros_like(p)
        kept[inside] = p[inside]
        return kept / kept.sum()

    outs = generate(config, params, [prompt] * count, Sampling(2, temperature, top_p, seed=3), (), batch=count)
    drawn = np.array([out.tokens for out in outs])
    first = np.bincount(drawn[:, 0], minlength=config.vocab_size)
    p = expected(prompt)
    assert not first[p == 0].any()
    statistic, bound = chi_square(first, p)
    assert statistic < bound
    # The second token, of the rows that share the commonest first one: another step, other random numbers.
    top = int(first.argmax())
    second = np.bincount(drawn[drawn[:, 0] == top, 1], minlength=config.vocab_size)
    q = expected([*prompt, top])
    assert not second[q == 0].any()
    statistic, bound = chi_square(second, q)
    assert statistic < bound


def test_prompts_of_several_prefill_passes():
    hf, config, params = build("gqa_untied", 1300)
    mine = prompts(config, [1100, 513, 5, 700])
    outs = generate(config, params, mine, Sampling(12), ())
    assert [list(out.tokens) for out in outs] == reference(hf, mine, 12)


def test_a_row_stops_at_the_context_and_its_neighbours_do_not():
    hf, config, params = build("gqa_untied")
    mine = prompts(config, [120, 10, 127, 50])
    outs = generate(config, params, mine, Sampling(40), ())
    assert [len(out.tokens) for out in outs] == [8, 40, 1, 40]
    assert {out.finish_reason for out in outs} == {"length"}
    for out, longer in zip(outs, reference(hf, mine, 40), strict=True):
        assert list(out.tokens) == longer[: len(out.tokens)]


def test_bf16_runs_and_starts_as_float32_does():
    _, config, params = build("gqa_untied")
    mine = prompts(config)
    full, half = (generate(config, params, mine, Sampling(24), (), dtype=d) for d in ("float32", "bfloat16"))
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(full, half, strict=True)) >= len(mine) - 1


def test_few_programs_are_compiled():
    _, config, params = build("gqa_untied")
    _compiled.cache_clear()
    for lengths in ([3, 5], [9, 16], [1, 12]):
        generate(config, params, prompts(config, lengths), Sampling(8), ())
    assert _compiled.cache_info().misses == 1
    run = _compiled(config, 8, True, False, (), "float32")
    assert run._cache_size() == 1


def test_no_prompts_no_texts():
    _, config, params = build("gqa_untied")
    assert generate(config, params, [], Sampling(), ()) == []
    assert Generation((1,), "stop").tokens == (1,)


@pytest.mark.parametrize("prompt, problem", [
    ([], "prompt 1: empty; expected at least one token"),
    ([5] * 128, "prompt 1: 128 tokens, the model's context holds 128 with the answer; shorten it"),
    ([5, 97], r"prompt 1: token id 97, the model's vocabulary has 0\.\.96"),
    ([-1, 5], r"prompt 1: token id -1, the model's vocabulary has 0\.\.96"),
])  # fmt: skip
def test_prompts_that_the_model_cannot_read_are_one_line(prompt, problem):
    _, config, params = build("gqa_untied")
    with pytest.raises(UserError, match=problem):
        generate(config, params, [[3], prompt], Sampling(), ())


@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(temperature=-1.0), Sampling(top_p=0.0), Sampling(top_p=1.5)]
)
def test_impossible_sampling_is_refused(sampling):
    _, config, params = build("gqa_untied")
    with pytest.raises(UserError, match="max_new_tokens must be at least 1"):
        generate(config, params, [[3]], sampling, ())
