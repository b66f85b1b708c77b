"""Keeps a process apart with what Linux offers: namespaces, a user without rights, a file system that is read-only.

The supervisor of a job calls `enter`, forks, and its child calls `close_files_off`. The program's own process calls
`drop_rights` last. Each raises OSError where the kernel refuses. Other systems have none of it; there nothing here is
called but `unprivileged_user`.
"""

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

# linux/sched.h, sys/mount.h, linux/prctl.h, linux/capability.h
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_MOUNT = 0x10000000, 0x20000000, 0x40000000, 0x00020000
_NEW_IPC, _NEW_UTS = 0x08000000, 0x04000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _RECURSIVE, _PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY, _ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

FOLDER_BYTES = 64 * 2**20
FOLDER_FILES = 4096
# What a program may not see as it is: others' files, sockets of services, shared memory.
_HIDDEN = ("/tmp", "/dev/shm", "/run", "/var/tmp")
_WRITABLE = ("/tmp", "/dev/shm")

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("spread", ctypes.c_uint64),
                ("user_namespace", ctypes.c_uint64)]  # fmt: skip


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl({option})")


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel to send this process a signal when the thread that forked it ends."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose parent has ended."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """Forbid other processes of the same user to read this one's memory and files."""
    _prctl(_PR_SET_DUMPABLE, 0)


def unprivileged_user(process: int) -> int | None:
    """Return a user id for a run that root starts, distinct for each process id; None where this user is not root.

    No account has such an id. So the program may touch no file that is not everybody's, and the kernel counts its
    processes apart from all others.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        return None
    try:
        lines = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        last = max(int(first) + int(count) for first, _, count in lines)
    except (OSError, ValueError):
        last = 2**16
    return 1_000_000_000 + process if last > 1_000_000_000 + 2**22 else 50_000 + process % 10_000


def python_folders(search_path: Iterable[str]) -> list[str]:
    """Return the topmost folders that Python itself needs, with and without symbolic links followed."""
    folders = [sys.base_prefix, sys.prefix, os.path.dirname(os.path.realpath(sys.executable)), *search_path]
    forms = {form for path in folders if os.path.isdir(path) for form in (path, os.path.realpath(path))}
    return sorted(path for path in forms if not any(other != path and _below(path, other) for other in forms))


def closed_ancestor(path: str) -> str | None:
    """Return the topmost folder on the way to `path` that others may not enter, or None."""
    for folder in [*reversed(Path(path).parents), Path(path)]:
        if not folder.stat().st_mode & stat.S_IXOTH:
            return str(folder)
    return None


def enter() -> None:
    """Move this process's future children into new namespaces: of processes, mounts, network, and IPC.

    Root does so as it is. Any other user needs a user namespace around them, in which the user keeps its id.
    """
    namespaces = _NEW_PID | _NEW_MOUNT | _NEW_NET | _NEW_IPC | _NEW_UTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _checked(_libc.unshare(namespaces), "unshare")
        return
    _checked(_libc.unshare(namespaces | _NEW_USER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def close_files_off(folders: list[str]) -> None:
    """Make all files read-only in this mount namespace, but for /tmp and /dev/shm, which are empty and small.

    folders: what Python needs; those below a hidden or closed folder are shown again. The first process of the new
    process namespace calls this: /proc shows that namespace.
    """
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    closed = {ancestor for path in folders if (ancestor := closed_ancestor(path))} if os.geteuid() == 0 else set()
    hidden = sorted({os.path.realpath(path) for path in _HIDDEN if os.path.isdir(path)} | closed)
    # Opened before anything lies on top of them.
    shown = {path: os.open(path, os.O_PATH) for path in folders if any(_below(path, folder) for folder in hidden)}
    for folder in hidden:
        _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=755")
    for path, descriptor in shown.items():
        os.makedirs(path, mode=0o755, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", path, None, _BIND | _RECURSIVE)
        os.close(descriptor)
    _set_attributes("/", _AT_RECURSIVE, _ATTR_READ_ONLY | _ATTR_NOSUID, 0)
    for folder in _WRITABLE:
        if os.path.isdir(folder):
            _set_attributes(os.path.realpath(folder), 0, 0, _ATTR_READ_ONLY)
            os.chmod(folder, 0o1777)
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)


def drop_rights(user: int | None) -> None:
    """Become `user` where it is given, and give up every capability for good."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        none = (ctypes.c_uint32 * 6)()
        _checked(_libc.capset(header, none), "capset")
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 1)  # a change of user clears it, and /dev/stdin needs it


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() if data is not None else None)
    _checked(result, f"mount {target}")


def _set_attributes(path: str, at: int, attributes: int, cleared: int) -> None:
    change = _MountAttributes(attributes, cleared, 0, 0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), at, ctypes.byref(change), ctypes.c_size_t(ctypes.sizeof(change))
    )
    _checked(result, f"mount_setattr {path}")
