"""Intervals against published values and the equation they solve."""

import math

import pytest

from bmjax.evaluate.score import Z95, accuracy, wilson


@pytest.mark.parametrize("right, n, low, high", [
    # Newcombe, Statist. Med. 17 (1998), table I, method 3 (score without continuity correction).
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_has_the_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("right, n", [(1, 3), (7, 10), (599, 600), (300, 600), (30_000, 40_000)])
def test_wilsons_ends_are_where_the_share_is_z_deviations_away(right, n):
    for end in wilson(right, n):
        assert abs(right / n - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_wilson_at_the_ends():
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0, abs=1e-12)
    assert wilson(0, 1)[1] < 1.0
    assert wilson(3, 10) == pytest.approx(tuple(1 - end for end in reversed(wilson(7, 10))))


def test_one_sample_a_question():
    score = accuracy([[True], [False], [True], [True]])
    assert (score["accuracy"], score["n"], score["k"]) == (0.75, 4, 1)
    assert tuple(score["ci95"]) == wilson(3, 4)


def test_the_mean_over_samples_has_an_interval_over_questions():
    # Shares 1, 1/2, 0, 1/2: mean 1/2, sample variance 1/6, standard error sqrt(1/6/4).
    score = accuracy([[True, True], [True, False], [False, False], [False, True]])
    assert (score["accuracy"], score["n"], score["k"]) == (0.5, 4, 2)
    half = 1.959964 * math.sqrt(1 / 6 / 4)
    assert tuple(score["ci95"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    # Samples of one question that always agree say no more than one sample does.
    agreed = accuracy([[True] * 8, [False] * 8] * 50)
    single = accuracy([[True], [False]] * 50)
    assert tuple(agreed["ci95"]) == pytest.approx(tuple(single["ci95"]), abs=0.01)


def test_every_question_needs_as_many_samples():
    with pytest.raises(ValueError, match="same number"):
        accuracy([[True], [True, False]])


def test_unjudged_samples_are_neither_right_nor_wrong():
    score = accuracy([[True, None], [None, None], [False, True]])
    assert (score["accuracy"], score["n"], score["k"], score["unjudged"]) == (0.75, 2, 2, 3)
    single = accuracy([[True], [None], [False]])
    assert (tuple(single["ci95"]), single["n"], single["unjudged"]) == (wilson(1, 2), 2, 1)
    with pytest.raises(ValueError, match="no sample was judged"):
        accuracy([[None], [None]])
