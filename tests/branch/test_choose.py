"""What a config leaves out: how it is chosen, said, kept for whoever goes on, and when a warning comes."""

import json

import pytest

from bmjax.branch import choose, prepare
from bmjax.branch.export import open_student
from bmjax.branch.loader import Loader
from bmjax.branch.remarks import warnings
from bmjax.branch.settings import ChosenTraining, TrainSettings
from bmjax.branch.train import describe, train
from bmjax.config import UserError
from tests.conftest import sums, write_rows

LEFT_OUT = {"seq_len", "batch", "learning_rate", "warmup", "compute_dtype"}


def settings(student, data, output, **changes) -> TrainSettings:
    values = {"student": str(student), "data": str(data), "output": str(output), "mesh": {}, "remat": "none"}
    return TrainSettings.read(values | changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(120))


@pytest.mark.parametrize(
    ("parameters", "rate"), [(32_000_000_000, 1e-5), (7_000_000_000, 1e-5), (500_000_000, 3.7e-5), (340_000, 1e-3)]
)
def test_the_rate_goes_with_the_root_of_the_parameters(parameters, rate):
    assert choose.learning_rate(parameters).value == rate


@pytest.mark.parametrize(("steps", "warm"), [(5, 0), (29, 0), (30, 3), (100, 10), (5000, 100)])
def test_the_warm_up_is_a_tenth_of_at_least_thirty_steps(steps, warm):
    assert choose.warmup(steps).value == warm


def test_sizes_follow_from_the_data(student, rows, tmp_path):
    given = settings(student, rows, tmp_path / "run", epochs=10)
    opened = open_student(given)
    mesh = prepare.check(given, opened.config)
    chosen = choose.choose(given, opened, mesh)
    longest = max(len(example.tokens) for example in chosen.loader.dataset.examples)
    seq_len, batch = chosen.settings.seq_len, chosen.settings.batch
    assert seq_len % 128 == 0 and longest <= seq_len < longest + 128
    assert chosen.loader.dataset.truncated == 0
    steps = prepare.total_steps(chosen.settings, chosen.loader)
    assert steps >= choose.LEAST_STEPS and batch & (batch - 1) == 0
    assert chosen.settings.compute_dtype == "float32"  # of a CPU
    # One block says all of it.
    head, *lines = chosen.lines()
    assert head.startswith("chosen,") and [line.split(":")[0].strip() for line in lines] == [
        "seq_len", "batch", "learning_rate", "warmup", "compute_dtype",
    ]  # fmt: skip
    assert f"the longest document has {longest}" in lines[0]


def test_what_is_given_is_not_chosen(student, rows, tmp_path):
    given = settings(
        student, rows, tmp_path, seq_len=200, batch=3, steps=40, learning_rate=0.0, warmup=0.0, compute_dtype="bfloat16"
    )
    opened = open_student(given)
    chosen = choose.choose(given, opened, prepare.check(given, opened.config))
    assert not chosen.choices and not chosen.lines()
    assert {key: getattr(chosen.settings, key) for key in LEFT_OUT} == {key: getattr(given, key) for key in LEFT_OUT}


def test_a_training_that_goes_on_takes_the_values_that_it_began_with(student, rows, tmp_path, monkeypatch):
    lines: list[str] = []
    given = settings(student, rows, tmp_path / "run", steps=4, until=2)
    train(given, lines.append)
    began = next(line for line in lines if line.strip().startswith("batch:"))
    # Other rules would choose otherwise.
    monkeypatch.setattr(choose, "DOCUMENTS", 8)
    monkeypatch.setattr(choose, "LENGTH_MULTIPLE", 256)
    monkeypatch.setattr(choose, "compute_dtype", lambda device: choose.Choice("compute_dtype", "bfloat16", "here"))
    lines.clear()
    result = train(given.model_copy(update={"until": None}), lines.append)
    assert "resuming at step 2" in lines
    again = [line for line in lines if line.startswith("  ")]
    assert len([line for line in again if "as in" in line and "checkpoints/2" in line]) == len(LEFT_OUT)
    assert began.split()[:2] == next(line for line in again if line.strip().startswith("batch:")).split()[:2]
    assert result["fingerprint"]["seq_len"] == "128" and result["steps"] == 4
    # A finished one says so whatever would be chosen now; its result tells the values once its checkpoints are gone.
    assert train(given.model_copy(update={"until": None}), lines.append)["steps"] == 4
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    assert train(given.model_copy(update={"until": None}), lines.append)["fingerprint"] == result["fingerprint"]


def test_a_small_memory_makes_microbatches_and_then_shorter_rows(student, rows, tmp_path, monkeypatch):
    given = settings(student, rows, tmp_path / "run", steps=2, batch=8, seq_len=256)
    opened = open_student(given)
    mesh = prepare.check(given, opened.config)
    chosen = choose.choose(given, opened, mesh)
    whole = choose.Fit.of(chosen.settings, False, opened, mesh, chosen.loader)
    assert whole.fits and whole.state < whole.total
    split = choose.Fit.of(chosen.settings.model_copy(update={"accumulate": 8}), False, opened, mesh, chosen.loader)
    assert split.total < whole.total
    monkeypatch.setattr(choose, "usable_memory", lambda device: int(split.total) + 2**20)
    fitted, fit = choose.fit_memory(chosen, given, opened, mesh)
    assert fit.fits and fitted.settings.accumulate > 1
    assert any(choice.key == "accumulate" for choice in fitted.choices)
    # Of rows that may be chosen the length is halved, and the line says what it cost.
    monkeypatch.setattr(choose, "SHORTEST", 64)
    monkeypatch.setattr(choose, "LENGTH_MULTIPLE", 64)
    longer = given.model_copy(update={"seq_len": None, "batch": 1, "accumulate": 1})
    one = choose.choose(longer, opened, mesh)
    monkeypatch.setattr(choose, "usable_memory", lambda device: int(whole.state) + 2**20)
    short = choose.choose(longer, opened, mesh)
    if short.settings.seq_len < one.settings.seq_len:
        assert "does not fit" in short.choices[0].reason and short.loader.dataset.truncated
    else:  # the step of one row is that small
        assert choose.Fit.of(short.settings, False, opened, mesh, short.loader).fits


def test_warnings_name_what_cannot_learn(student, rows, tmp_path):
    given = settings(student, rows, tmp_path, seq_len=128, batch=8, epochs=2, learning_rate=1e-3, warmup=0.0)
    opened = open_student(given)
    chosen = choose.choose(given, opened, prepare.check(given, opened.config))
    fit = choose.Fit(1, 1.0, 1.0, 2)
    assert warnings(chosen.settings, chosen.loader, 100, fit) == []
    told = warnings(chosen.settings, chosen.loader.with_batch(2000), 2, choose.Fit(1, 2.0**31, 1.0, 2**30))
    assert [line.split()[0] for line in told] == ["batch", "2", "a"]
    assert "of every step are empty" in told[0] and "fewer than 30" in told[1] and "2.00 GiB of 1.00 GiB" in told[2]


def test_check_says_choices_and_memory_and_writes_nothing(student, rows, tmp_path):
    lines = describe(settings(student, rows, tmp_path / "run", epochs=1))
    assert not (tmp_path / "run").exists()
    assert lines[0].startswith("chosen,")
    assert any(line.startswith("a step takes ") and "parameters" in line for line in lines)
    assert lines[-1].endswith("nothing was written")


def test_an_output_that_holds_something_else_is_refused(student, rows, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "job.log").write_text("")
    with pytest.raises(UserError, match=r"holds 'notes.md' and no training; give a new directory"):
        describe(settings(student, rows, tmp_path))
    (tmp_path / "notes.md").unlink()
    assert describe(settings(student, rows, tmp_path, steps=1))  # a scheduler's log may be there


def test_a_plan_wants_its_sizes(student, rows, tmp_path):
    with pytest.raises(UserError, match="seq_len: give it for a plan"):
        choose.without_data(settings(student, rows, tmp_path), "a plan")
    chosen = choose.without_data(settings(student, rows, tmp_path, seq_len=64, batch=8), "a plan")
    assert (chosen.accumulate, chosen.compute_dtype) == (1, "bfloat16")


def test_marks_of_keys_are_those_of_the_settings():
    assert ChosenTraining.keys_without("same result") == TrainSettings.keys_without("same result")
    assert ChosenTraining.keys_without("may change") == TrainSettings.keys_without("may change")


def test_branches_share_the_longest_row_and_the_smallest_batch(student, rows, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", sums(8, seed=1))
    trainings = [settings(student, data, tmp_path / "run", compute_dtype="float32", epochs=10) for data in (rows, few)]
    opened = open_student(trainings[0])
    mesh = prepare.check(trainings[0], opened.config)
    choices, loaders = choose.choose_sizes([(training, opened) for training in trainings], mesh)
    alone = [choose.choose_sizes([(training, opened)], mesh)[0] for training in trainings]
    values = {choice.key: choice.value for choice in choices}
    assert values["batch"] == min(choice.value for part in alone for choice in part if choice.key == "batch")
    assert values["seq_len"] == max(choice.value for part in alone for choice in part if choice.key == "seq_len")
    assert all(isinstance(loader, Loader) and loader.batch == values["batch"] for loader in loaders)
    assert json.dumps(values)
