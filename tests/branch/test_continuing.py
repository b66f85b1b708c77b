"""Trainings in parts: `until` ends early, `continue_from` goes on with other weights and the earlier moments."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from bmjax.branch.train import describe
from bmjax.config import UserError
from tests.branch.test_train import curve, run, settings, weights
from tests.conftest import sums, write_rows, write_student

SHUFFLED = {"shuffle": True, "packing": True, "batch": 2, "accumulate": 1, "steps": 8, "freeze": ["embed/*"]}


def equal(left, right):
    a, b = weights(left / "hf"), weights(right / "hf")
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(student, train_file, tmp_path_factory):
    """(output, summary) of an undisturbed training of 8 steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, run(student, train_file, output, **SHUFFLED)


def rounds(student, train_file, folder, parts, **changes):
    """Train up to each step of `parts`, every part going on from the one before with the weights that it exported."""
    output, summary = None, None
    for part in parts:
        start, earlier = (student, {}) if output is None else (output / "hf", {"continue_from": str(output)})
        output = folder / f"until{part}"
        summary = run(start, train_file, output, **SHUFFLED | changes, until=part, **earlier)
    return output, summary


def lines_of(output):
    return [{key: line[key] for key in ("step", "loss", "learning_rate", "epoch")} for line in curve(output)]


def test_parts_with_their_own_weights_are_the_undisturbed_training(student, train_file, whole, tmp_path):
    output, summary = rounds(student, train_file, tmp_path, (3, 4, 8))
    assert equal(output, whole[0])
    assert lines_of(output) == lines_of(whole[0])  # the schedule spans all parts, and the rows go on
    assert summary["tokens"] == whole[1]["tokens"] and summary["steps"] == 8 and summary["loss"] == whole[1]["loss"]
    assert [line["step"] for line in curve(tmp_path / "until3")] == [1, 2, 3]


def test_other_weights_are_trained_with_the_earlier_moments(student, train_file, whole, tmp_path):
    first, _ = rounds(student, train_file, tmp_path, (4,))
    moved = tmp_path / "moved"
    shutil.copytree(first / "hf", moved)
    tensors = {key: value + np.float32(0.01) * (value.ndim > 1) for key, value in weights(first / "hf").items()}
    safetensors.numpy.save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    run(moved, train_file, tmp_path / "on", **SHUFFLED, continue_from=str(first))
    run(moved, train_file, tmp_path / "anew", **SHUFFLED)
    on, anew = lines_of(tmp_path / "on"), lines_of(tmp_path / "anew")
    assert on[:4] == lines_of(whole[0])[:4] and on[4]["loss"] != lines_of(whole[0])[4]["loss"]
    # With Adam's moments of four steps, the first steps are not those of a training that begins there.
    assert [line["learning_rate"] for line in on] == [line["learning_rate"] for line in anew]
    change = {key: weights(tmp_path / "on/hf")[key] - tensors[key] for key in tensors}
    assert not np.any(change["model.embed_tokens.weight"]) and np.any(change["model.layers.0.mlp.up_proj.weight"])


def test_a_part_goes_on_in_its_own_output(student, train_file, whole, tmp_path):
    for until in (3, 0.75, None):
        run(student, train_file, tmp_path / "run", **SHUFFLED, until=until)
    assert equal(tmp_path / "run", whole[0]) and lines_of(tmp_path / "run") == lines_of(whole[0])
    with pytest.raises(UserError, match=r"until: 2 steps, but .* holds step 8; raise it"):
        run(student, train_file, tmp_path / "run", **SHUFFLED, until=2)


def test_a_part_that_was_killed_ends_with_the_same_bytes(student, train_file, whole, tmp_path, monkeypatch):
    first, _ = rounds(student, train_file, tmp_path, (3,))
    steps = 0

    def log(line):
        nonlocal steps
        steps += line.startswith("step ")
        if steps == 3:
            raise KeyboardInterrupt

    arguments = (first / "hf", train_file, tmp_path / "second")
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, log=log, **SHUFFLED, save_every=1, continue_from=str(first))
    shutil.rmtree(first / "checkpoints" / "2", ignore_errors=True)
    said = []
    run(*arguments, log=said.append, **SHUFFLED, save_every=1, continue_from=str(first))
    assert any("resuming at step" in line for line in said)
    assert equal(tmp_path / "second", whole[0]) and lines_of(tmp_path / "second") == lines_of(whole[0])


def test_a_checkpoint_on_the_way_may_be_named(student, train_file, whole, tmp_path):
    run(student, train_file, tmp_path / "exports", **SHUFFLED, save_every=2, export_every=4)
    start = tmp_path / "exports" / "exports" / "4"
    run(start, train_file, tmp_path / "on", **SHUFFLED, continue_from=str(whole[0] / "checkpoints" / "4"))
    assert equal(tmp_path / "on", whole[0])


def test_a_student_of_other_sizes_is_named(train_file, whole, tmp_path):
    other = write_student(tmp_path / "other", intermediate_size=48)
    with pytest.raises(UserError, match=r"continue_from: .*no moments of the shapes of student '.*other'") as error:
        run(other, train_file, tmp_path / "run", **SHUFFLED, continue_from=str(whole[0] / "checkpoints" / "4"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-3}, "continue_from: .*: learning_rate: it had 0.003, now 0.001; a training goes on"),
        ({"steps": 9}, "continue_from: .*: steps: it had 8, now 9; schedule: cosine ended there"),
        ({"batch": 4}, "continue_from: .*: batch: it had 2, now 4"),
        ({"until": 8}, "8 steps are done there, and this training ends after 8; raise until"),
        ({"until": 9}, "until: 9: expected a share below 1, or a whole number up to 8 steps"),
        ({"until": 2.5}, "until: 2.5: expected a share below 1"),
        ({"continue_from": "nowhere"}, "continue_from: nowhere: no checkpoint there"),
    ],
)
def test_what_cannot_go_on_is_refused(student, train_file, whole, tmp_path, changes, told):
    values = SHUFFLED | {"continue_from": str(whole[0])} | changes
    for refused in (run, lambda *arguments, **keys: describe(settings(*arguments, **keys))):
        with pytest.raises(UserError, match=told) as error:
            refused(student, train_file, tmp_path / "run", **values)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "hf").exists()


def test_other_data_is_refused(student, whole, tmp_path):
    write_rows(tmp_path / "rows.jsonl", sums(20, 5))
    with pytest.raises(UserError, match=r"continue_from: .*: data: its contents differ"):
        run(student, tmp_path / "rows.jsonl", tmp_path / "run", **SHUFFLED, continue_from=str(whole[0]))
