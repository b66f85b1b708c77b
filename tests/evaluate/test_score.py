"""Statistics against published values, hand computations and exhaustive counts."""

import itertools
import math

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.evaluate.loss import interval_of_ratio
from bmjax.evaluate.score import (
    Z95,
    accuracy,
    bootstrap,
    interval,
    majority,
    metric,
    pass_at_k,
    require_samples,
    token_lengths,
    wilson,
)


@pytest.mark.parametrize("right, n, low, high", [
    # Newcombe, Statist. Med. 17 (1998), table I, method 3 (score without continuity correction).
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_has_the_published_values(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("right, n", [(1, 3), (7, 10), (599, 600), (300, 600), (30_000, 40_000)])
def test_wilsons_ends_are_where_the_share_is_z_deviations_away(right, n):
    for end in wilson(right / n, n):
        assert abs(right / n - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_wilson_at_the_ends():
    assert wilson(0, 10)[0] == 0.0 and wilson(1, 10)[1] == pytest.approx(1.0, abs=1e-12)
    assert wilson(0, 1)[1] < 1.0
    assert wilson(0.3, 10) == pytest.approx(tuple(1 - end for end in reversed(wilson(0.7, 10))))


def test_the_bootstrap_is_that_of_all_equally_likely_draws():
    # Four problems have 4^4 draws with replacement: their quantiles are exact.
    values = [0.0, 0.25, 0.25, 1.0]
    means = [sum(draw) / 4 for draw in itertools.product(values, repeat=4)]
    exact = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    assert bootstrap(values) == pytest.approx(tuple(exact), abs=1e-12)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    # Of many problems the interval is the normal one.
    many = [0.0, 1.0] * 500
    half = Z95 * math.sqrt(0.25 / 1000)
    assert bootstrap(many) == pytest.approx((0.5 - half, 0.5 + half), abs=2e-3)


def test_wilson_stands_in_where_all_problems_agree():
    assert interval([1.0] * 8) == (list(wilson(1.0, 8)), "wilson")
    assert interval([0.5] * 8) == (list(wilson(0.5, 8)), "wilson")
    assert interval([0.5, 1.0])[1] == "bootstrap"


@pytest.mark.parametrize("n, right, k", [(1, 0, 1), (4, 2, 2), (5, 1, 3), (6, 6, 4), (6, 0, 6), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(n, right, k):
    samples = [True] * right + [False] * (n - right)
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="pass@9 of 8"):
        pass_at_k(8, 2, 9)


@pytest.mark.parametrize("votes, right, expected", [
    ([0, 0, 1], [True, True, False], 1.0),
    ([0, 1, 1], [True, False, False], 0.0),
    ([0, 1], [True, False], 0.5),  # a tie: each wins with equal chance
    ([0, 0, 1, 1, 2], [False, False, True, True, True], 0.5),
    ([0, 1, 2], [True, False, False], 1 / 3),
    ([None, None, 0], [False, False, True], 1.0),  # who says nothing has no vote
    ([None, None], [False, False], 0.0),
])  # fmt: skip
def test_the_majority_decides_and_ties_are_their_mean(votes, right, expected):
    assert majority(votes, right) == pytest.approx(expected)


def test_accuracy_is_the_mean_over_problems():
    score = accuracy([[True], [False], [True], [True]])
    assert (score["accuracy"], score["n"], score["k"], score["ci95_by"]) == (0.75, 4, 1, "bootstrap")
    assert tuple(score["ci95"]) == bootstrap([1, 0, 1, 1])
    # Shares 1, 1/2, 0, 1/2.
    outcomes = [[True, True], [True, False], [False, False], [False, True]]
    score = accuracy(outcomes)
    assert (score["accuracy"], score["n"], score["k"]) == (0.5, 4, 2)
    assert tuple(score["ci95"]) == bootstrap([1, 0.5, 0, 0.5])
    # Samples of one problem that always agree say no more than one sample does.
    agreed, single = accuracy([[True] * 8, [False] * 8] * 50), accuracy([[True], [False]] * 50)
    assert agreed["ci95"] == single["ci95"]


def test_metrics_equal_hand_computations():
    outcomes = [[True, False, False, True], [False] * 4, [True] * 4]
    # pass@2 of 2 right of 4: 1 - C(2, 2) / C(4, 2) = 5/6.
    assert metric("pass@2", outcomes)["value"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert metric("pass@1", outcomes)["value"] == pytest.approx(accuracy(outcomes)["accuracy"]) == 0.5
    assert metric("avg@2", outcomes)["value"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    votes = [[0, 1, 2, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    measure = metric("maj@4", outcomes, votes)
    assert measure["value"] == pytest.approx(2 / 3) and measure["n"] == 3
    assert measure["ci95"] == interval([1.0, 0.0, 1.0])[0]
    # Of the first two samples the first problem's votes are a tie of right and wrong.
    assert metric("maj@2", outcomes, votes)["value"] == pytest.approx((0.5 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="unknown metric"):
        metric("best@2", outcomes)


def test_problems_with_too_few_judged_samples_do_not_count_in_a_metric():
    outcomes = [[True, None, None], [True, False, True], [None, None, None]]
    measure = metric("pass@2", outcomes)
    assert (measure["value"], measure["n"]) == (1.0, 1)
    assert metric("pass@4", outcomes) is None


def test_unjudged_samples_are_neither_right_nor_wrong():
    score = accuracy([[True, None], [None, None], [False, True]])
    assert (score["accuracy"], score["n"], score["k"], score["unjudged"]) == (0.75, 2, 2, 3)
    with pytest.raises(ValueError, match="no sample was judged"):
        accuracy([[None], [None]])
    with pytest.raises(ValueError, match="same number"):
        accuracy([[True], [True, False]])


def test_no_average_of_fewer_samples():
    require_samples("aime24", [16] * 30, 16)
    with pytest.raises(UserError, match=r"tasks.aime24: 16 samples .* 2 of 30 problems lack 9 in all") as error:
        require_samples("aime24", [16] * 28 + [8, 15], 16)
    assert "\n" not in str(error.value)


def test_lengths_are_of_answers_that_tell_theirs():
    assert token_lengths([10, None, 40, 20]) == {"mean": pytest.approx(70 / 3), "median": 20, "max": 40, "answers": 3}
    assert token_lengths([None]) is None


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        tokens = random.integers(20, 200, 80).astype(float)
        nats = random.gamma(2.0, 0.25, 80) * tokens  # 0.5 nats a token
        low, high = interval_of_ratio(nats, tokens, trial)
        assert low < nats.sum() / tokens.sum() < high
        covered += low < 0.5 < high
    assert covered >= 52
    assert interval_of_ratio(np.ones(9), np.ones(9)) is None
    assert interval_of_ratio(np.ones(11), np.array([1.0] * 9 + [0.0] * 2)) is None
