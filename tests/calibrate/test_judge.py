"""Whether a stage is better than another by more than noise: against the formula by simulation, and in whole merges."""

import numpy as np
import pytest

from bmjax.calibrate import dispatch, judge
from bmjax.calibrate.judge import Loss
from tests.calibrate.tiny_models import recipe, tensors
from tests.conftest import sums, write_rows


def drawn(rng, count, difference, noise):
    """(before, after): documents of different lengths whose nats differ by `difference` a token and noise."""
    targets = rng.integers(5, 50, count).astype(np.float64)
    before = targets * rng.uniform(0.5, 2.0, count)
    return Loss(before, targets), Loss(before - targets * difference + rng.normal(0, noise, count), targets)


def test_documents_of_packed_rows_are_summed_apart():
    nats = np.arange(12.0).reshape(2, 6)
    mask = np.array([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 3, 3, 3]])
    loss = judge.by_document(nats, mask, segments)
    assert loss.nats.tolist() == [0 + 2, 3 + 4, 6 + 7, 8, 9] and loss.targets.tolist() == [2, 2, 2, 1, 1]
    assert loss.mean == pytest.approx(39 / 8)
    again = Loss.read(loss.plain())
    assert np.array_equal(again.nats, loss.nats) and np.array_equal(again.targets, loss.targets)


def test_the_error_is_the_spread_of_gains_over_draws():
    rng = np.random.default_rng(0)
    gains, errors = zip(*(judge.gain(*drawn(rng, 40, 0.1, 3.0)) for _ in range(2000)), strict=True)
    assert np.mean(gains) == pytest.approx(0.1, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.1)


def test_noise_alone_is_hardly_ever_better():
    rng = np.random.default_rng(1)
    faults = [judge.fault("ab", *zip(*(drawn(rng, 30, 0.0, 3.0) for _ in "ab"), strict=True)) for _ in range(1000)]
    assert sum(fault is None for fault in faults) < 50


def test_a_gain_above_noise_is_better_and_a_domain_that_loses_is_named():
    rng = np.random.default_rng(2)
    gaining, losing = drawn(rng, 30, 0.5, 1.0), drawn(rng, 30, -0.2, 1.0)
    assert judge.fault(["a", "b"], [gaining[0], gaining[0]], [gaining[1], gaining[1]]) is None
    fault = judge.fault(["a", "b"], [gaining[0], losing[0]], [gaining[1], losing[1]])
    assert "held-out loss of 'b' rises" in fault


@pytest.mark.parametrize("change", [0.0, 1e-7, -1e-7])
def test_rounding_is_no_gain(change):
    before = Loss(np.full(64, 20.0), np.full(64, 10.0))
    assert "is not below" in judge.fault(["a"], [before], [Loss(before.nats * (1 - change), before.targets)])


def test_one_document_and_nan_are_no_gain():
    one, better = Loss(np.array([20.0]), np.array([10.0])), Loss(np.array([1.0]), np.array([10.0]))
    assert "one held-out document of 'a'" in judge.fault(["a"], [one], [better])
    many, nan = Loss(np.full(9, 20.0), np.full(9, 10.0)), Loss(np.full(9, np.nan), np.full(9, 10.0))
    assert "is not below" in judge.fault(["a"], [many], [nan])
    assert judge.worse_than_base(["a"], [many], [nan]) is not None


@pytest.mark.parametrize("change", [{"polish": 2, "polish_rate": 0}, {"distill": 2, "distill_rate": 0}])
def test_a_stage_that_changes_nothing_is_not_kept(models, tmp_path, change):
    said = []
    report = dispatch.merge(recipe(models, "regmean", steps=0, **change), tmp_path / "out", log=said.append)
    assert report["kept"] == "start" and any("not kept" in line for line in said)


def test_rows_that_no_model_was_trained_on_judge(models, tmp_path):
    """Coefficients that fit other rows are not kept where those of the domain, `held_out_data`, say no."""
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", sums(30, seed=20 + ord(name)))
    merge = recipe(models, steps=12, learning_rate=0.5)
    for entry in merge["models"]:
        entry["held_out_data"] = str(tmp_path / f"{entry['model']}.jsonl")
    said: list[str] = []
    report = dispatch.merge(merge, tmp_path / "out", log=said.append)
    assert not any("come from their data" in line for line in said)
    assert report["recipe"]["steps"][0]["models"][0]["held_out_data"] == str(tmp_path / "a.jsonl")
    assert "`held_out_data`, which no model was to be trained on" in (tmp_path / "out/README.md").read_text()
    # The same rows are learned from, so the coefficients are those without it; the losses are of other rows.
    other = dispatch.merge(recipe(models, steps=12, learning_rate=0.5), tmp_path / "other", log=said.append)
    assert any("the held-out rows of 'a', 'b' come from their data" in line for line in said)
    assert other["tokens"]["learning"] == report["tokens"]["learning"]
    assert other["held_out_loss"]["start"] != report["held_out_loss"]["start"]
    # With an answer that nothing foresees, learning on the others' rows gains nothing there.
    rng = np.random.default_rng(3)
    for name in "ab":
        noise = ["".join(map(chr, rng.integers(97, 123, 12))) for _ in range(30)]
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "?", "response": text} for text in noise])
    report = dispatch.merge(merge, tmp_path / "noise", overwrite=True)
    if report["kept"] == "start":
        dispatch.merge(merge | {"parameters": merge["parameters"] | {"steps": 0}}, tmp_path / "start")
        noise, start = tensors(tmp_path / "noise"), tensors(tmp_path / "start")
        assert all(np.array_equal(noise[key], start[key]) for key in noise)


def test_a_merge_that_is_worse_than_its_base_says_so(models, tmp_path):
    said: list[str] = []
    report = dispatch.merge(recipe(models, "regmean", steps=0, start=40.0), tmp_path / "out", log=said.append)
    losses = report["held_out_loss"]
    worse = [name for name in "ab" if losses["start"][name] > losses["base"][name] * 1.001]
    (line,) = (line for line in said if "is above the base's" in line)
    assert worse and all(
        f"'{name}' {losses['base'][name]:.4f} -> {losses['start'][name]:.4f}" in line for name in worse
    )
