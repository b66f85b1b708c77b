"""Outputs that appear whole or not at all: write beside the target, flush to disk, rename. Locks of writers.

Everything that writes a result calls it. After an error nothing of the output is left, nor a directory made for it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from bmjax.config import UserError, first_line
from bmjax.errors import disk_problem
from bmjax.io import bucket, bucket_lock
from bmjax.log import write_line
from bmjax.urls import url_of


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file `path` by `data` (text as UTF-8): a reader sees the old content or the new, never a part."""
    with replacing_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write that becomes `path` when the block ends well, and vanishes when it does not.

    path: of this machine, or a URL of a bucket. Makes missing parent directories. UserError, one line naming the file,
    when it cannot be written.
    """
    if url := url_of(path):
        bucket.check_scheme(url)
        with replacing_file(bucket.mirror(url)) as file:
            yield file
        bucket.send(bucket.mirror(url), url)
        return
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    with _parents(path, path):
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


@contextlib.contextmanager
def _parents(path: Path, named: Path) -> Iterator[None]:
    """Make the missing parent directories of `path`; remove those that are empty when the block fails.

    An OSError becomes a UserError that calls the path `named`.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{named}: cannot write: {disk_problem(error)}; nothing was changed") from None
        raise


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {disk_problem(error)}") from None


@contextlib.contextmanager
def held(path: str | Path, holder: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, so that no second process writes beside it.

    holder: what else holds it, named in the UserError when it is taken ("another run is writing here").
    """
    if url := url_of(path):
        bucket.check_scheme(url)
        with held(bucket.mirror(url), holder), bucket_lock.held(url, holder):
            yield
        return
    path = Path(path)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")  # what its last holder wrote into it stays
    with lock:
        lock_file(lock, path.parent, holder)
        try:
            yield
        except BaseException:
            # Nothing is left of a directory that was made for the lock alone.
            if made and [entry.name for entry in path.parent.iterdir()] == [path.name]:
                path.unlink()
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def lock_file(file: IO[Any], name: Path, holder: str) -> None:
    """Lock an open file for this process, or raise a UserError that says who holds `name`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{name}: {holder}; wait for it or choose another output") from None


@contextlib.contextmanager
def replacing(target: str | Path, resume: bool = False) -> Iterator[Path]:
    """Make a directory beside `target`, `.NAME.partial`, that becomes `target` when the block ends well.

    An existing target is moved aside, to `.NAME.replaced`, and deleted after that; a line says so where that fails.
    After an error the directory is removed and the target untouched. An OSError (a full disk, no permission) becomes a
    UserError, one line naming the target. UserError when another process is writing the target, and before anything is
    made where the target's place or what it holds is closed to this process.

    resume: whether to go on with what a killed or interrupted process wrote, else the directory is empty. It then stays
    after an exception that is neither a UserError nor an OSError, for the next call.

    target: of this machine, or a URL of a bucket: then the directory is made here and sent when it is whole.
    """
    if url := url_of(target):
        bucket.check_scheme(url)
        copy = bucket.mirror(url)
        with replacing(copy, resume) as folder:
            yield folder
        write_line(f"{url}: sending ...")
        try:
            bucket.send_folder(copy, url)
        except UserError as error:
            raise UserError(f"{error}; what was to be sent is whole in {copy}") from None
        shutil.rmtree(copy, ignore_errors=True)
        return
    named, target = Path(target), Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{named}: exists and is not a directory; choose another name")
    if problem := replacement_problem(target):
        raise UserError(f"{named}: {problem}")
    folder, aside = target.parent / f".{target.name}.partial", _aside(target)
    with _parents(target, named), contextlib.ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock may have renamed or removed the directory meanwhile.
            locked = os.path.samestat(os.fstat(lock), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            locked = False
        if not locked:
            raise UserError(f"{named}: another process is writing it; wait for it, or stop it")
        try:
            # From here on no other process is between the two renames.
            if aside.is_dir() and not target.exists():
                aside.rename(target)
            try:
                _remove(aside)
            except OSError as error:
                raise UserError(
                    f"{named}: cannot be replaced: what it held before is still in {aside}: {disk_problem(error)}; "
                    "remove that first"
                ) from None
            for path in () if resume else folder.iterdir():
                (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)
            yield folder
            _rename_into_place(folder, target, aside)
        except BaseException as error:
            if not resume or isinstance(error, (UserError, OSError)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            _remove(aside)
        except OSError as error:
            reason = error.strerror or first_line(error)
            write_line(f"{named}: is written; what it held before stays in {aside}, remove that yourself: {reason}")


def replacement_problem(target: Path) -> str | None:
    """Return why `replacing` could not put a directory in the place of `target`, and what helps; None where it could.

    It goes by the rights to directories alone, and by what is there now.
    """
    parent = next(folder for folder in target.parents if os.path.exists(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"cannot write: {parent} may not be written to; get the right to it, or choose another place"
    if closed := _closed_folder(target):
        return (
            f"cannot be replaced: what is in {closed} may not be removed; get the right to it, or choose another place"
        )
    if closed := _closed_folder(aside := _aside(target)):
        return (
            f"cannot be replaced: what it held before an earlier replacement is still in {aside}, and what is in "
            f"{closed} may not be removed; remove {aside}, or choose another place"
        )
    return None


def _closed_folder(directory: Path) -> Path | None:
    """Return a folder of a directory, or itself, out of which nothing may be removed; None where all of it may."""
    for parent, folders, names in os.walk(directory):
        if (folders or names) and not os.access(parent, os.W_OK | os.X_OK):
            return Path(parent)
        for folder in (Path(parent, name) for name in folders):
            if not folder.is_symlink() and not os.access(folder, os.R_OK):  # os.walk passes over it
                return folder
    return None


def _aside(target: Path) -> Path:
    """Return where a directory is kept from the moment when another takes its place until it is removed."""
    return target.parent / f".{target.name}.replaced"


def _remove(directory: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if os.path.lexists(directory):
        shutil.rmtree(directory)


def _rename_into_place(folder: Path, target: Path, aside: Path) -> None:
    """Put `folder` on disk and rename it to `target`; an old target moves to `aside`."""
    for parent, _, files in os.walk(folder):
        for path in [*(Path(parent) / name for name in files), Path(parent)]:
            _sync(path)
    if target.exists():
        target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Put the contents of a file, or the names in a directory, on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
