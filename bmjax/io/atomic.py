"""Outputs that appear whole or not at all: write beside the target, flush to disk, rename."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from bmjax.config import UserError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file `path` by `data` (text as UTF-8): a reader sees the old content or the new, never a part.

    Makes missing parent directories. UserError, one line naming the file, when it cannot be written.
    """
    with replacing_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write that becomes `path` when the block ends well, and vanishes when it does not.

    Makes missing parent directories. UserError, one line naming the file, when it cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(path, error) from None


@contextlib.contextmanager
def held(path: str | Path, holder: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, so that no second process writes beside it.

    holder: what else holds it, named in the UserError when it is taken ("another run is writing here").
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from None
    with lock:
        lock_file(lock, path.parent, holder)
        yield


def lock_file(file: IO[Any], name: Path, holder: str) -> None:
    """Lock an open file for this process, or raise a UserError that says who holds `name`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{name}: {holder}; wait for it or choose another output") from None


@contextlib.contextmanager
def replacing(target: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """An empty directory beside `target` that takes its place when the block ends well.

    An existing target is moved aside and deleted after that; with overwrite=False it is a UserError. After an
    error the temporary directory is removed and the target untouched. An OSError (a full disk, no permission)
    becomes a UserError of one line that names the target. What a killed process left beside the target is
    cleared away first.
    """
    named, target = Path(target), Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{named}: exists and is not a directory; choose another name")
    if target.exists() and not overwrite:
        raise UserError(f"{named}: exists already; choose another name or remove it")
    stem = f".{target.name}.{secrets.token_hex(4)}"
    temporary, aside = target.parent / f"{stem}.tmp", target.parent / f"{stem}.old"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            _take_place(temporary, target, aside)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise write_error(named, error) from None


@contextlib.contextmanager
def resuming(target: str | Path) -> Iterator[Path]:
    """As `replacing`, but the directory has a name of its own, `.NAME.partial`, and what a killed or interrupted
    process wrote there is still in it. After a UserError or an OSError it is removed, and so are parents that were
    made for it.

    UserError when another process is writing it.
    """
    named, target = Path(target), Path(target).resolve()
    partial, aside = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.replaced"
    try:
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who had it may have renamed or removed it meanwhile.
                mine = os.path.samestat(os.fstat(lock), os.stat(partial))
            except (BlockingIOError, FileNotFoundError):
                mine = False
            if not mine:
                raise UserError(f"{named}: another process is writing it; wait for it, or stop it")
            try:
                # From here on nobody else is between the two renames.
                if aside.is_dir() and not target.exists():
                    aside.rename(target)
                shutil.rmtree(aside, ignore_errors=True)
                yield partial
                _take_place(partial, target, aside)
            except (UserError, OSError):
                shutil.rmtree(partial, ignore_errors=True)
                for parent in made:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
                raise
        finally:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise write_error(named, error) from None


def _take_place(temporary: Path, target: Path, aside: Path) -> None:
    """Puts `temporary` on disk and in the place of `target`, which moves to `aside`."""
    _sync_tree(temporary)
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_directory(target.parent)


def write_error(target: Path, error: OSError) -> UserError:
    """The one line for an operating system error met while writing `target`."""
    return UserError(f"{target}: cannot write: {error.strerror or error}; nothing was changed")


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes left of `target`; put an old target back that one had moved aside."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    stems = {path.stem for path in target.parent.iterdir() if pattern.fullmatch(path.name)}
    for stem in sorted(stems):
        temporary, old = target.parent / f"{stem}.tmp", target.parent / f"{stem}.old"
        if _locked(temporary):
            continue
        if old.is_dir() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _locked(directory: Path) -> bool:
    """Whether a living process is writing `directory`: its lock ends with it, however it ends."""
    if not directory.is_dir():
        return False
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def sync_directory(directory: Path) -> None:
    """Put the names in `directory` on disk."""
    _sync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
