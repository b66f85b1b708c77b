"""Stages: done is skipped, killed continues, changed begins anew."""

import json
import subprocess
import sys

import pytest

from bmjax.pipeline.stages import Stage, Stages


def stage(name, value, after, outputs, work):
    return Stage(name, lambda: value, after, outputs, work)


def make(directory, value, made):
    def work():
        made.append(value)
        (directory / "out").mkdir(exist_ok=True)
        (directory / "out" / "file").write_text(str(value))

    return work


def test_a_done_stage_is_skipped_and_a_changed_one_wiped(tmp_path):
    made: list[int] = []
    for value in (1, 1, 2):
        Stages(tmp_path, lambda line: None).run(stage("one", value, (), ("out",), make(tmp_path, value, made)))
    assert made == [1, 2]
    assert (tmp_path / "out" / "file").read_text() == "2"


def test_what_depends_on_a_changed_stage_is_redone(tmp_path):
    made: list[str] = []
    for value in (1, 1, 2):
        stages = Stages(tmp_path, lambda line: None)
        stages.run(stage("one", value, (), (), lambda: made.append("one")))
        stages.run(stage("two", 0, ("one",), (), lambda: made.append("two")))
    assert made == ["one", "two", "one", "two"]


def test_a_killed_stage_continues_unless_its_inputs_changed(tmp_path):
    def killed():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "half").touch()
        raise KeyboardInterrupt

    seen: list[bool] = []
    for value in (1, 1, 2):
        stages = Stages(tmp_path, lambda line: None)
        with pytest.raises(KeyboardInterrupt):
            stages.run(
                stage("one", value, (), ("out",), lambda: (seen.append((tmp_path / "out" / "half").exists()), killed()))
            )
    assert seen == [False, True, False]


def test_a_missing_output_is_made_again(tmp_path):
    made: list[int] = []
    for _ in range(2):
        Stages(tmp_path, lambda line: None).run(stage("one", 1, (), ("out",), make(tmp_path, 1, made)))
        (tmp_path / "out" / "file").unlink()
        (tmp_path / "out").rmdir()
    assert made == [1, 1]


def test_time_and_memory_are_measured_and_kept(tmp_path):
    stages = Stages(tmp_path, lambda line: None)
    stages.run(stage("a/b", 1, (), (), lambda: bytearray(50 * 2**20)))
    again = Stages(tmp_path, lambda line: None)
    again.run(stage("a/b", 1, (), (), lambda: None))
    assert again.measured == stages.measured
    assert json.loads((tmp_path / "stages" / "a-b.json").read_text())["seconds"] == stages.measured["a/b"]["seconds"]


def test_peak_memory_forgets_an_allocation_at_the_reset():
    # In a process of its own: threads of other tests allocate, too.
    program = """
from bmjax.pipeline.stages import peak_memory, reset_peak_memory
reset_peak_memory()
before = peak_memory()
block = bytearray(b"x") * (200 * 2**20)
del block
with_block = peak_memory()
reset_peak_memory()
print(with_block - before, peak_memory() - before)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    with_block, after = map(float, out.split())
    assert with_block > 150 and after < 100
