"""Progress bars show on a terminal only, and lines stand above them."""

import io

import pytest

from bmjax.log import progress_bar, write_line


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
