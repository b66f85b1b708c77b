"""Progress bars show on a terminal only, and lines stand above them."""

import io
import re
import time

import pytest

from bmjax.log import progress_bar, quieted, silent, stage, write_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, shown, visible", [
    (Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False),
])  # fmt: skip
def test_a_bar_shows_on_a_terminal_where_it_is_wanted(monkeypatch, stream, shown, visible):
    error = stream()
    monkeypatch.setattr("sys.stderr", error)
    with progress_bar("branch", "step", total=4, done=1, shown=shown) as bar:
        bar.update(1)
        bar.refresh()
        write_line("a remark")
    assert ("branch" in error.getvalue()) == ("2/4" in error.getvalue()) == visible
    assert "a remark\n" in error.getvalue()


def test_a_stage_says_that_it_begins_goes_on_and_ends(monkeypatch):
    lines = []
    monkeypatch.setattr("bmjax.log.REMINDER", 1)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(ValueError, match="no"), stage("compiling", lines.append, "1 to 3 minutes"):
        time.sleep(1.5)
        raise ValueError("no")
    assert lines[0] == "compiling (1 to 3 minutes) ..." and re.fullmatch(r"compiling: \d\.\d s", lines[-1])
    assert any(line.startswith("compiling: not done after") for line in lines[1:-1])


@pytest.mark.parametrize("log, clock", [(lambda line: None, True), (silent, False)])
def test_a_stage_has_a_clock_on_a_terminal(monkeypatch, log, clock):
    error = Terminal()
    monkeypatch.setattr("sys.stderr", error)
    with stage("compiling", log):
        pass
    assert ("compiling 00:00" in error.getvalue()) == clock


def test_lines_come_where_there_is_no_terminal(monkeypatch):
    error = io.StringIO()
    monkeypatch.setattr("sys.stderr", error)
    monkeypatch.setattr("bmjax.log.REMINDER", 0)
    with progress_bar("merge", "B", total=4_000_000) as bar:
        time.sleep(0.02)
        bar.update(1_000_000)
        assert bar.count == 1_000_000 and not bar.is_bar
    assert re.fullmatch(r"merge: 1\.00M/4\.00M, [\d.]+[kM]?B/s, 00:\d\d left\n", error.getvalue())
    with progress_bar("merge", "B", lines=False) as bar, quieted():
        bar.update(1)
    assert error.getvalue().count("\n") == 1


def test_the_rate_leaves_compiling_out_and_says_it(monkeypatch):
    import jax

    error = Terminal()
    monkeypatch.setattr("sys.stderr", error)
    with progress_bar("eval", "answers", total=10, compiles=True) as bar:
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.1)
        assert "eval, compiling" in error.getvalue()
        time.sleep(0.05)
        for _ in range(2):  # two threads at once
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 40.0)
        assert bar.compiling < 1  # not more than has passed since the beginning
        bar.compiling = 30.0
        bar.update(2)
        assert bar.line().endswith("compiling took 30 s beside that")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 40.0)
    assert bar.compiling == 30.0  # it has stopped listening


def test_a_stage_that_ends_at_once_says_nothing(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with stage("converting", lines.append, patience=2):
        pass
    assert not lines
    with stage("converting", lines.append, patience=0.5):
        time.sleep(1.2)
    assert lines[0] == "converting ..." and re.fullmatch(r"converting: \d\.\d s", lines[1])
