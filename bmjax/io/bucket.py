"""Files in buckets: gs://, s3:// and whatever else fsspec has a file system for. Nothing else asks for them.

What is read is first copied to this machine, into $BMJAX_CACHE/buckets/SCHEME/BUCKET/KEY, and copied again only when it
has changed. What is written is made there, and sent when it is whole. A bucket has no rename, so of a directory the
files of LAST are sent last: a directory that lacks them is not whole. Paths without a scheme pass through unchanged.
"""

import contextlib
import datetime
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bmjax.errors import UserError, first_line
from bmjax.log import Log, write_line
from bmjax.urls import url_of, url_problem

LAST = (
    "config.json",
    "selection.json",
    "scores.json",
    "report.json",
    "result.json",
    "part.json",
)  # say that a directory is whole
UNFINISHED = ".unfinished"  # in a folder while it is being sent; it stays when the sender dies
SENT_SHARE = 0.1  # of the time that a growing file may be sent again and again


def cache_folder(kind: str) -> Path:
    """Return the directory of a kind of caches: in $BMJAX_CACHE, or `bmjax` in the user's cache directory."""
    root = os.environ.get("BMJAX_CACHE")
    return Path(root or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bmjax").expanduser() / kind


def mirror(path: str | Path) -> Path:
    """Return where the copy of a URL lies on this machine; a path without a scheme is returned as it is."""
    url = url_of(path)
    if url is None:
        return Path(path).expanduser()
    scheme, _, rest = url.partition("://")
    parts = [part for part in PurePosixPath(rest).parts if part != "/"]
    if ".." in parts:
        raise UserError(f"{url}: '..' has no meaning in a bucket")
    return cache_folder("buckets").joinpath(scheme, *parts)


def name_of(path: str | Path) -> str:
    """Return the URL that a path in the cache is a copy of; another path is returned as it is."""
    root = cache_folder("buckets")
    if not Path(path).is_relative_to(root):
        return str(path)
    scheme, *rest = Path(path).relative_to(root).parts
    return f"{scheme}://{'/'.join(rest)}"


def join(path: str | Path, *names: str) -> str:
    """Return a path inside a directory of this machine or a bucket."""
    return "/".join([url_of(path) or str(path), *names])


@contextlib.contextmanager
def _talk(url: str) -> Iterator[None]:
    """Turn what a file system raises, which differs from one to the next, into a UserError that names the URL."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such file, or no such bucket") from None
    except FileExistsError:
        raise UserError(f"{url}: exists already") from None
    except NotImplementedError:
        raise UserError(f"{url}: {url.partition(':')[0]}:// can be read, but not written") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not url_of(error.filename):
            raise  # this machine's disk
        raise UserError(f"{url}: {type(error).__name__}: {first_line(error)}; check the bucket and its keys") from None


@cache
def _file_system(scheme: str) -> Any:
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    # What others write must be seen.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def check_scheme(url: str) -> None:
    """Raise UserError for a URL that cannot be used on this machine."""
    if problem := url_problem(url):
        raise UserError(f"{url}: {problem}")


def _open(url: str) -> Any:
    check_scheme(url)
    scheme = url.partition("://")[0]
    if scheme == "gs" and os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google first, for a minute
    with _talk(url):
        return _file_system(scheme)


def _tag(info: Mapping[str, Any]) -> str:
    """Return what changes when a file's content does."""
    keys = ("ETag", "etag", "md5Hash", "generation", "mtime", "updated", "LastModified", "last_modified", "created")
    state = next((str(info[key]) for key in keys if info.get(key)), "")
    if isinstance(created := info.get("created"), datetime.datetime) and state == str(created):
        state = str(created.timestamp())  # as a listing of the same file system has it
    return f"{info.get('size')} {state}"


def _tag_file(copy: Path) -> Path:
    return copy.parent / f".{copy.name}.tag"


def _listing(url: str) -> dict[str, dict[str, Any]]:
    """Return what is known of every file under a URL, by URL: of itself, of a folder's, or of those of a pattern."""
    system, scheme = _open(url), url.partition("://")[0]
    with _talk(url):
        key = system._strip_protocol(url)
        if any(character in key for character in "*?["):
            entries = system.glob(key, detail=True)
        else:
            entries = system.find(key, detail=True)
            if not entries and system.exists(key):
                entries = {key: system.info(key)}
    files = (info for info in entries.values() if info["type"] == "file" and not info["name"].endswith("/"))
    prefix = "" if scheme in ("http", "https") else f"{scheme}://"
    return {f"{prefix}{info['name'].lstrip('/') if prefix else info['name']}": info for info in files}


def exists(path: str | Path) -> bool:
    """Return whether there is a file or a folder with files at a path or URL."""
    url = url_of(path)
    return Path(path).expanduser().exists() if url is None else bool(_listing(url))


def is_folder(path: str | Path) -> bool:
    """Return whether a path or URL is a directory."""
    url = url_of(path)
    return (
        Path(path).expanduser().is_dir() if url is None else any(name.startswith(f"{url}/") for name in _listing(url))
    )


def names_in(path: str | Path) -> list[str]:
    """Return the paths of all files in a folder of a bucket relative to it, sorted."""
    url = url_of(path)
    assert url is not None
    return sorted(name[len(url) + 1 :] for name in _listing(url) if name.startswith(f"{url}/"))


def folders(url: str) -> list[str]:
    """Return the names of the folders directly in a folder of a bucket; none where there is nothing."""
    system = _open(url)
    with _talk(url):
        try:
            entries = system.ls(system._strip_protocol(url), detail=True)
        except FileNotFoundError:
            return []
    return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")


def fetch(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """Copy the files of a URL to this machine, those that are not there yet or have changed.

    Arguments:
        path: of a file, a folder, or a pattern.
        wanted: whether to copy a file of a folder, by its path relative to it.

    Returns:
        Their paths, sorted. Copies of files that are gone from the bucket are removed.

    Raises:
        UserError: when there is none, or it cannot be had.
    """
    url = url_of(path)
    assert url is not None
    there = _listing(url)
    entries = {n: info for n, info in there.items() if not n.startswith(f"{url}/") or wanted(n[len(url) + 1 :])}
    if not entries:
        raise UserError(f"{url}: no such file or folder in the bucket")
    folder = mirror(url)
    with _alone(folder):
        copies = {name: mirror(name) for name in entries}
        missing = [
            name for name, copy in copies.items() if not _is_fresh(copy, entries[name]) and not _is_growing(copy)
        ]
        if missing:
            _download(url, missing, entries, copies)
        for old in folder.rglob("*") if folder.is_dir() else ():
            if _tag_file(old).is_file() and name_of(old) not in there:
                remove_copy(old)
    return sorted(copies.values())


def local(path: str | Path) -> Path:
    """Return where a file or a folder is on this machine: itself, or a copy of what a bucket holds."""
    url = url_of(path)
    if url is None:
        return Path(path).expanduser()
    fetch(url)
    return mirror(url)


def state(file: Path) -> list[Any]:
    """Return [name, bytes, time of the last change] of a file; of a copy, what the bucket says of it."""
    info = file.stat()
    if (tag := _tag_file(file)).is_file() and (name := name_of(file)) != str(file):
        return [name, info.st_size, tag.read_text()]
    return [str(file.resolve()), info.st_size, info.st_mtime_ns]


def states(path: str | Path) -> list[list[Any]]:
    """Return the `state` that the copy of every file under a URL would have, sorted by name; nothing is copied."""
    url = url_of(path)
    assert url is not None
    return [[name, info.get("size"), _tag(info)] for name, info in sorted(_listing(url).items())]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from copying the same folder while the block runs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name[:200]}.fetch", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_fresh(copy: Path, info: Mapping[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        return copy.is_file() and _tag_file(copy).read_text() == _tag(info)
    return False


def _is_growing(copy: Path) -> bool:
    """Return whether a process of this machine appends to a copy, which then holds more than the bucket."""
    try:
        with copy.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _download(
    url: str, names: Sequence[str], entries: Mapping[str, Mapping[str, Any]], copies: Mapping[str, Path]
) -> None:
    size = sum(entries[name].get("size") or 0 for name in names)
    if size > 2**28:
        write_line(f"{url}: copying {len(names)} files, {size / 1e9:.1f} GB, to {cache_folder('buckets')}")
    system = _open(url)
    parts = {name: copies[name].parent / f".{copies[name].name}.{secrets.token_hex(4)}.tmp" for name in names}
    try:
        for name in names:
            copies[name].parent.mkdir(parents=True, exist_ok=True)
        with _talk(url):
            system.get([entries[name]["name"] for name in names], [str(parts[name]) for name in names])
        for name in names:
            expected, actual = entries[name].get("size"), parts[name].stat().st_size
            if expected is not None and actual != expected:
                raise UserError(f"{name}: {actual} bytes came, expected {expected}; it changed meanwhile, try again")
            os.replace(parts[name], copies[name])
            _tag_file(copies[name]).write_text(_tag(entries[name]))
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def send(copy: Path, url: str) -> None:
    """Send a file of this machine to a URL, which holds the old content or the new, never a part."""
    system = _open(url)
    with _talk(url):
        system.put_file(str(copy), system._strip_protocol(url))
        info = system.info(system._strip_protocol(url))
    if copy == mirror(url):
        _tag_file(copy).write_text(_tag(info))


def send_folder(folder: Path, url: str) -> None:
    """Make a URL hold the files of a folder and no others. Those that say that it is whole are gone first, come last.

    UserError when it fails. Until it ends well, `is_unfinished` tells the folder from one that others have filled.
    """
    system, old = _open(url), _listing(url)
    files = {f"{url}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}

    def is_last(name: str) -> bool:
        return PurePosixPath(name).name in LAST

    write(f"{url}/{UNFINISHED}", b"")
    with _talk(url):
        for name in filter(is_last, old):
            system.rm_file(system._strip_protocol(name))
        first = {name: path for name, path in files.items() if not is_last(name)}
        if first:
            system.put([str(path) for path in first.values()], [system._strip_protocol(name) for name in first])
        for name in old:
            if name not in files and not is_last(name) and name != f"{url}/{UNFINISHED}":
                system.rm_file(system._strip_protocol(name))
        for name in sorted(filter(is_last, files), key=lambda name: (-name.count("/"), name)):
            system.put_file(str(files[name]), system._strip_protocol(name))
        system.rm_file(system._strip_protocol(f"{url}/{UNFINISHED}"))


def is_unfinished(path: str | Path) -> bool:
    """Return whether a path is a folder of a bucket that a process died sending, so that it may be written again."""
    names = set(names_in(path)) if url_of(path) else set()
    return UNFINISHED in names and not names.intersection(LAST)


def write(url: str, data: bytes, new: bool = False) -> None:
    """Write a small file at a URL. new: UserError where it exists, decided by the bucket where that can."""
    system = _open(url)
    with _talk(url):
        system.pipe_file(system._strip_protocol(url), data, mode="create" if new else "overwrite")


def read(url: str) -> bytes | None:
    """Read a small file of a bucket as it is now; None where it does not exist."""
    system = _open(url)
    with _talk(url):
        try:
            return system.cat_file(system._strip_protocol(url))
        except FileNotFoundError:
            return None


def remove(url: str) -> None:
    """Remove all files under a URL, many with one request where the bucket takes that."""
    names = [*_listing(url)]
    system = _open(url)
    with _talk(url), contextlib.suppress(FileNotFoundError):  # another process was quicker
        if names:
            system.rm([system._strip_protocol(name) for name in names])


def open_growing(url: str, log: Log = write_line) -> Path:
    """Return the copy of a file that this process is about to append to, which holds all that the bucket has.

    Lines that a killed process wrote here and did not send are still in it. Where another machine has written meanwhile
    they are put aside, in a file that a line names.
    """
    copy, entries = mirror(url), _listing(url)
    copy.parent.mkdir(parents=True, exist_ok=True)
    info = entries.get(url)
    if info is None:
        if copy.exists() and _tag_file(copy).exists():  # it was sent, and removed from the bucket
            copy.unlink()
        _tag_file(copy).unlink(missing_ok=True)
        return copy
    if _is_fresh(copy, info):
        return copy
    if _is_growing(copy):
        return copy  # its lock will be refused
    if not copy.exists():
        fetch(url)
        return copy
    aside = copy.with_name(f"{copy.name}.{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.unsent")
    copy.rename(aside)
    try:
        fetch(url)
    except BaseException:
        aside.rename(copy)
        raise
    if _begins_with(aside, copy):  # a process was killed between sending it and noting that
        aside.replace(copy)
    elif _begins_with(copy, aside):
        aside.unlink()
    else:
        log(f"{url}: another machine has written to it; what this one had not sent is in {aside}")
    return copy


def _begins_with(file: Path, beginning: Path) -> bool:
    """Return whether a file holds all of another one, and perhaps more behind it."""
    with file.open("rb") as whole, beginning.open("rb") as part:
        while chunk := part.read(2**20):
            if whole.read(len(chunk)) != chunk:
                return False
    return True


@contextlib.contextmanager
def sending(copies: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Send growing files of the cache to their buckets while the block runs, and at its end.

    It takes a tenth of the time at most: a file that takes 3 s to send is sent twice a minute. Yields a function that
    sends at once. A failure to send is said, and raised at the end.
    """
    files = list(copies)
    sizes: dict[Path, int] = {}
    lock, ended = threading.Lock(), threading.Event()

    def send_all() -> None:
        with lock:
            for copy in files:
                if copy.exists() and sizes.get(copy) != (size := copy.stat().st_size):
                    send(copy, name_of(copy))
                    sizes[copy] = size

    def run() -> None:
        wait = 2.0
        while not ended.wait(wait):
            began = time.monotonic()
            try:
                send_all()
            except (UserError, OSError) as error:
                write_line(f"{first_line(error)}; tried again later")
            wait = max(2.0, (time.monotonic() - began) * (1 / SENT_SHARE - 1))

    thread = threading.Thread(target=run, name="bmjax-bucket", daemon=True)
    thread.start()
    try:
        yield send_all
    finally:
        ended.set()
        thread.join()
        send_all()


def copies() -> list[Path]:
    """Return the copies of files that buckets hold, too. Files that were not sent whole are not among them."""
    root = cache_folder("buckets")
    files = []
    for tag in root.rglob(".*.tag") if root.is_dir() else ():
        copy = tag.with_name(tag.name[1 : -len(".tag")])
        if copy.is_file() and tag.read_text().partition(" ")[0] == str(copy.stat().st_size):
            files.append(copy)
    return sorted(files)


def remove_copy(copy: Path) -> None:
    """Remove a copy from this machine; the bucket keeps the file."""
    copy.unlink(missing_ok=True)
    _tag_file(copy).unlink(missing_ok=True)
