"""Files and directories that appear whole or not at all, also when a process is killed or the disk is full."""

import fcntl
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.io.atomic import held, replacing, replacing_file, write_atomic

resuming = functools.partial(replacing, resume=True)

KILLED = (
    "import os, sys; from pathlib import Path; from bmjax.io.atomic import replacing\n"
    "with replacing(sys.argv[1], resume=True) as folder: (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)"
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_a_writer(target: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(target)], timeout=60)


@pytest.mark.parametrize("old", [False, True])
def test_the_directory_takes_its_place_when_the_block_ends(tmp_path: Path, old: bool) -> None:
    target = tmp_path / "deep" / "out"
    if old:
        target.mkdir(parents=True)
        (target / "old").write_text("x")
    with resuming(target) as folder:
        (folder / "file").write_text("one")
        assert target.exists() == old
        assert folder == tmp_path / "deep" / ".out.partial"
    assert names(target) == ["file"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [UserError("no"), OSError(28, "No space left on device")])
def test_an_error_of_the_user_or_the_disk_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with pytest.raises(UserError, match=r"^no$|out: cannot write: No space left on device"), resuming(target) as folder:
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == []
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError), resuming(target):
        raise error
    assert names(tmp_path / "new") == [], "a parent that was there before is gone, or a new one is left"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_it_goes_on_after_an_interrupt_or_a_bug(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(error), resuming(target) as folder:
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == [".out.partial", "out"] and names(target) == ["old"]
    with resuming(target) as folder:
        assert names(folder) == ["half"]
    assert names(tmp_path) == ["out"] and names(target) == ["half"]


def test_after_a_kill_it_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kill_a_writer(target)
    assert names(tmp_path) == [".out.partial"]
    kill_a_writer(target)
    with resuming(target) as folder:
        assert names(folder) == ["half"], "the lock of a killed process holds, or its work is lost"
    assert names(tmp_path) == ["out"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with resuming(target) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(UserError, match="another process is writing it"), resuming(target):
            pass
        assert names(folder) == ["file"], "the second one removed what the first writes"
        with resuming(tmp_path / "other"):
            pass
    assert names(tmp_path) == ["other", "out"]


def test_a_living_writers_old_target_is_not_put_back(tmp_path: Path) -> None:
    """Between its two renames the old target is aside: a second process must not touch it."""
    target, aside = tmp_path / "out", tmp_path / ".out.replaced"
    target.mkdir()
    (target / "old").write_text("x")
    with resuming(target) as folder:
        (folder / "new").write_text("x")
        target.rename(aside)
        with pytest.raises(UserError, match="another process"), resuming(target):
            pass
        assert names(aside) == ["old"] and not target.exists()
        aside.rename(target)
    assert names(target) == ["new"]


def test_a_lock_taken_after_the_rename_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the first writer's rename, locked after it: that directory is the result now."""
    target = tmp_path / "out"
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        (tmp_path / ".out.partial").rename(target)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process"), resuming(target):
        raise AssertionError("two write at once")
    assert names(tmp_path) == ["out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    target, aside = tmp_path / "out", tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "old").write_text("x")
    with pytest.raises(UserError), resuming(target):
        assert names(target) == ["old"]
        raise UserError("no")
    assert names(tmp_path) == ["out"]
    # Killed after both: what was aside is only in the way.
    aside.mkdir()
    with resuming(target) as folder:
        (folder / "new").write_text("x")
    assert names(tmp_path) == ["out"] and names(target) == ["new"]


def test_a_rename_that_fails_puts_the_old_target_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="out: cannot write: Input/output error"), resuming(target):
        pass
    assert names(tmp_path) == ["out"] and names(target) == ["old"]


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/out: cannot write"), resuming(tmp_path / "file" / "out"):
        pass
    (tmp_path / ".a.partial").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    os.symlink("mine", tmp_path / ".b.partial")
    os.symlink("nothing", tmp_path / ".c.partial")
    os.symlink(".d.partial", tmp_path / ".d.partial")
    before = names(tmp_path)
    for name in "abcd":
        with pytest.raises(UserError, match=f"{name}: cannot write"), resuming(tmp_path / name):
            raise AssertionError
    assert names(tmp_path) == before and names(tmp_path / "mine") == ["thesis"]


def test_the_target_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    os.symlink("disk/out", tmp_path / "out")
    with resuming(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path / "disk", "a rename to another disk would fail"
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk" / "out") == ["file"]


# replacing and write_atomic


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with replacing(target) as temporary:
        (temporary / "file").write_text("one")
        assert not target.exists()
    assert (target / "file").read_text() == "one"
    with pytest.raises(RuntimeError, match="boom"), replacing(target) as temporary:
        (temporary / "file").write_text("two")
        raise RuntimeError("boom")
    assert (target / "file").read_text() == "one"
    with replacing(target) as temporary:
        (temporary / "other").write_text("three")
    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_replacing_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    with pytest.raises(UserError, match="not a directory"), replacing(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "file" / "below"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from bmjax.io.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as t: (t / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, str(target)], timeout=60)
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with replacing(target) as outer:
        with pytest.raises(UserError, match="another process is writing it"), replacing(target):
            raise AssertionError("two write at once")
        assert outer.exists() and names(outer) == [], (
            "a living writer's directory was cleared, or a killed one's was not"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    # Killed between the two renames: the old target comes back.
    target.rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(RuntimeError), replacing(target):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FULL = """
import resource, sys, numpy as np
from pathlib import Path
from bmjax.config import UserError
from bmjax.io.atomic import replacing, write_atomic
from bmjax.io.safetensors import SharedWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
target = Path(sys.argv[1])
plan = [(f"t{i}", np.dtype(np.float32), (1000,)) for i in range(50)]
try:
    if sys.argv[2] == "writer":
        with replacing(target) as temporary, SharedWriter(temporary, plan) as writer:
            for name, dtype, shape in plan:
                writer.write(name, 0, np.zeros(shape, dtype))
    elif sys.argv[2] == "new file":
        write_atomic(target / "new" / "file", b"x" * 200_000)
    else:
        write_atomic(target / "file", b"x" * 200_000)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["writer", "file", "new file"])
def test_full_disk(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    command = [sys.executable, "-c", FULL, str(target), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(str(target)) and "File too large" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert (target / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in target.iterdir()] == ["file"]


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file.json"
    write_atomic(path, "für")
    assert path.read_text(encoding="utf-8") == "für"
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "sub", "a directory is in the way")


def test_a_replaced_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "out" / "data.jsonl"
    with replacing_file(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), replacing_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["data.jsonl"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"), replacing_file(tmp_path / "file" / "data.jsonl"):
        pass


def test_unknown_schemes_are_refused_and_no_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path.parent / "cache"))
    for url in ("gss://bucket/x", "s4://bucket/x/y", Path("gss://bucket/x")):
        for opened in (replacing, replacing_file, lambda path: held(path, "another")):
            with pytest.raises(UserError, match="no file system has the scheme"), opened(url):
                pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this may do all, so the rights that a directory's mode gives its owner are imitated."""
    plain = os.access

    def access(path: Path, mode: int) -> bool:
        asked = (mode & os.R_OK and 0o400) | (mode & os.W_OK and 0o200) | (mode & os.X_OK and 0o100)
        return plain(path, mode) and os.stat(path).st_mode & asked == asked

    monkeypatch.setattr(os, "access", access)


@pytest.mark.parametrize("closed", ["", "inside", "unreadable"])
def test_what_may_not_be_removed_is_not_replaced(tmp_path: Path, rights: None, closed: str) -> None:
    target = tmp_path / "out"
    (target / "inside").mkdir(parents=True)
    (target / "inside" / "old").write_text("x")
    if closed == "unreadable":
        (target / closed).mkdir()
    (target / closed).chmod(0o300 if closed == "unreadable" else 0o500)
    with pytest.raises(UserError) as error, resuming(target):
        pytest.fail("began to write")
    assert str(error.value) == (
        f"{target}: cannot be replaced: what is in {target / closed} may not be removed; get the right to it, or "
        "choose another place"
    )
    assert names(tmp_path) == ["out"]
    (target / closed).chmod(0o700)
    with resuming(target) as folder:
        (folder / "file").write_text("one")
    assert names(tmp_path) == ["out"] and names(target) == ["file"]


@pytest.mark.parametrize("parents", ["", "deep/deeper"])
def test_a_parent_that_may_not_be_written_to(tmp_path: Path, rights: None, parents: str) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with (
        pytest.raises(UserError, match="may not be written to; get the right to it") as error,
        resuming(tmp_path / "closed" / parents / "out"),
    ):
        pytest.fail("began to write")
    assert f"{tmp_path / 'closed'} may not" in str(error.value) and not names(tmp_path / "closed")


def test_what_cannot_be_removed_after_all_is_told_and_refused_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, aside = tmp_path / "out", tmp_path / ".out.replaced"
    target.mkdir()
    (target / "old").write_text("x")

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted")

    with resuming(target) as folder:
        (folder / "file").write_text("one")
        monkeypatch.setattr("shutil.rmtree", refuse)
    assert names(target) == ["file"] and names(aside) == ["old"]
    said = capsys.readouterr().err
    assert f"is written; what it held before stays in {aside}, remove that yourself: Operation not permitted" in said
    left = r"what it held before is still in .*\.out\.replaced: Operation not permitted"
    with pytest.raises(UserError, match=left), resuming(target):
        pytest.fail("began to write")
    assert names(target) == ["file"]


def test_a_closed_directory_that_an_earlier_run_left_is_named(tmp_path: Path, rights: None) -> None:
    aside = tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "old").write_text("x")
    aside.chmod(0o500)
    (tmp_path / "out").mkdir()
    left = r"is still in .*\.out\.replaced, and .* remove .*\.out\.replaced, or"
    with pytest.raises(UserError, match=left), resuming(tmp_path / "out"):
        pytest.fail("began to write")
