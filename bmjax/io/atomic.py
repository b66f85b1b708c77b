"""Outputs that appear whole or not at all: write beside the target, flush to disk, rename. Locks of writers.

Everything that writes a result calls it. After an error nothing of the output is left, nor a directory made for it.
"""

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
        with _parents(path):
            try:
                with open(temporary, "xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                _sync(path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise write_error(path, error) from None


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the missing parent directories of `path`; remove those that are empty when the block fails."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


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
    """Make an empty directory beside `target` that becomes `target` when the block ends well.

    An existing target is moved aside and deleted after that; with overwrite=False it is a UserError. After an
    error the temporary directory is removed and the target untouched. An OSError (a full disk, no permission)
    becomes a UserError, one line naming the target. What a killed process left beside the target is removed first.
    """
    named, target = Path(target), Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{named}: exists and is not a directory; choose another name")
    if target.exists() and not overwrite:
        raise UserError(f"{named}: exists already; choose another name or remove it")
    stem = f".{target.name}.{secrets.token_hex(4)}"
    temporary, aside = target.parent / f"{stem}.tmp", target.parent / f"{stem}.old"
    try:
        with _parents(target):
            _clear_leftovers(target)
            temporary.mkdir()
            lock = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield temporary
                _rename_into_place(temporary, target, aside)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise write_error(named, error) from None


@contextlib.contextmanager
def resuming(target: str | Path) -> Iterator[Path]:
    """Do as `replacing`, but go on with what a killed or interrupted process wrote.

    The directory is called `.NAME.partial`. After a UserError or an OSError it is removed; after another exception it
    stays, for the next call. UserError when another process is writing it.
    """
    named, target = Path(target), Path(target).resolve()
    partial, aside = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.replaced"
    try:
        with _parents(target):
            _clear_leftovers(target)
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if not _lock_partial(lock, partial):
                    raise UserError(f"{named}: another process is writing it; wait for it, or stop it")
                try:
                    # From here on no other process is between the two renames.
                    if aside.is_dir() and not target.exists():
                        aside.rename(target)
                    shutil.rmtree(aside, ignore_errors=True)
                    yield partial
                    _rename_into_place(partial, target, aside)
                except (UserError, OSError):
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
            finally:
                os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise write_error(named, error) from None


def _lock_partial(lock: int, partial: Path) -> bool:
    """Lock the open directory; return whether this process has it now and it is still called `partial`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had the lock may have renamed or removed the directory meanwhile.
        return os.path.samestat(os.fstat(lock), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):
        return False


def _rename_into_place(temporary: Path, target: Path, aside: Path) -> None:
    """Put `temporary` on disk and rename it to `target`; an old target moves to `aside`."""
    _sync_tree(temporary)
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)


def write_error(target: Path, error: OSError) -> UserError:
    """Return the UserError for an operating system error met while writing `target`."""
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
    """Return whether a living process is writing `directory`: its lock ends with it, however it ends."""
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
        for path in [*(Path(parent) / name for name in files), Path(parent)]:
            _sync(path)


def _sync(path: Path) -> None:
    """Put the contents of a file, or the names in a directory, on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
