"""A list of prompts through the engine: order, ends, random numbers by number, errors that name the prompt."""

import pytest

from bmjax.config import UserError
from bmjax.generate.prompts import Generation, generate
from bmjax.generate.requests import Sampling
from tests.generate.reference import build, random_prompts, reference

LENGTHS = [1, 3, 17, 40, 41, 70, 16]


def test_generations_are_in_the_order_of_the_prompts():
    hf, config, params = build("gqa_untied")
    prompts = random_prompts(config, LENGTHS)
    outs = generate(config, params, prompts, Sampling(24), (), batch=8)
    tokens, _ = reference(hf, prompts, 24)
    assert [list(out.tokens) for out in outs] == tokens and {out.finish_reason for out in outs} == {"length"}
    # Fewer rows than prompts, and an end token in some of them.
    end = tokens[3][5]
    ended = generate(config, params, prompts, Sampling(24), (end, 10_000), batch=2)
    for out, row in zip(ended, tokens, strict=True):
        stop = row.index(end) if end in row else 24
        assert list(out.tokens) == row[:stop] and out.finish_reason == ("stop" if end in row else "length")


def test_a_row_stops_at_the_end_of_the_context():
    hf, config, params = build("gqa_untied")
    prompts = random_prompts(config, [120, 10, 127, 50])
    outs = generate(config, params, prompts, Sampling(40), (), batch=8)
    assert [len(out.tokens) for out in outs] == [8, 40, 1, 40]
    assert {out.finish_reason for out in outs} == {"length"}
    for out, longer in zip(outs, reference(hf, prompts, 40)[0], strict=True):
        assert list(out.tokens) == longer[: len(out.tokens)]


def test_a_generation_ends_where_the_caller_says():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, LENGTHS)
    free = generate(config, params, prompts, Sampling(40), (), batch=8)
    heard: dict[int, list[int]] = {}

    def is_over(number: int, tokens) -> bool:
        heard.setdefault(number, []).extend(tokens)
        return number == 4 and len(heard[4]) >= 10

    outs = generate(config, params, prompts, Sampling(40), (), 8, is_over=is_over)
    assert [out.finish_reason for out in outs] == ["length"] * 4 + ["stop"] + ["length"] * 2
    assert 10 <= len(outs[4].tokens) < 40 and outs[4].tokens == free[4].tokens[: len(outs[4].tokens)]
    assert [list(out.tokens) for out in outs] == [heard[number] for number in range(len(prompts))]


def test_bf16_runs_and_starts_as_float32_does():
    _, config, params = build("gqa_untied")
    prompts = random_prompts(config, LENGTHS)
    full, half = (generate(config, params, prompts, Sampling(4), (), 8, dtype=d) for d in ("float32", "bfloat16"))
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(full, half, strict=True)) >= len(prompts) - 1


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
    with pytest.raises(UserError, match="expected"):
        generate(config, params, [[3]], sampling, ())
