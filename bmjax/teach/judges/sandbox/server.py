"""The server of programs: a process that forks a supervisor for every job. `client` starts it and talks to it.

The supervisor enters namespaces of its own, forks the program, watches what it and its descendants use, kills them all
and reports. In a namespace of processes the supervisor is their init, so nothing outlives it. Where the kernel refuses
namespaces, orphans become the supervisor's children, and it kills them one by one.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bmjax.teach.judges.sandbox import isolate, program

DESCRIPTORS = 6  # the job's connection, stdin, stdout, stderr, the report, the token
# What programs usually import. A fork has it at once.
_PRELOADED = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools json "
    "math numbers operator queue random re statistics string threading time traceback types typing"
)
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.004, 0.05  # seconds between two looks at a running program
_UNIT_ROUNDS = 60_000


def serve(path: list[str], namespaces: bool) -> Callable[[], Any]:
    """Fork a supervisor for each job that comes over stdin, a socket. Returns in a program's process, what to run.

    path: the interpreter's own `sys.path`, for programs. namespaces: whether to use them where there are some.
    """
    import gc
    import importlib

    requests = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for name in _PRELOADED.split():
        importlib.import_module(name)
    folders = isolate.python_folders(path)
    reason = _why_no_namespaces(folders) if namespaces else "they are not asked for"
    hello = {"namespaces": not reason, "reason": reason, "unit_seconds": _unit_seconds()}
    requests.sendall(json.dumps(hello).encode() + b"\n")
    gc.collect()
    gc.freeze()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, DESCRIPTORS)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _Supervisor(descriptors, folders, path, apart=not reason).work()
        for descriptor in descriptors:
            os.close(descriptor)


def _why_no_namespaces(folders: list[str]) -> str:
    """Try everything that `isolate` does in a process that ends at once; return what the kernel refuses, or ''."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            isolate.enter()
            if (child := os.fork()) == 0:
                isolate.close_files_off(folders)
                if (user := isolate.unprivileged_user(1)) is not None:
                    isolate.drop_rights(user)
                    os.listdir(sys.base_prefix)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            os.write(writing, b"mounts are refused" if status else b"")
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    reason = os.read(reading, 1000).decode()
    os.close(reading)
    os.wait()
    return reason


def _unit_seconds() -> float:
    """Return the CPU seconds of a fixed piece of Python while every core runs it.

    Cores that share their parts are slower together, as they are when programs are judged.
    """

    def once() -> float:
        begun, total, words = time.process_time(), 0, {}
        for n in range(_UNIT_ROUNDS):
            total = (total * 31 + n) % 1_000_003
            words[total & 255] = total
        return time.process_time() - begun

    reading, writing = os.pipe()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for _ in range(cores):
        if os.fork() == 0:
            os.write(writing, f"{min(once() for _ in range(5))}\n".encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as lines:
        times = sorted(map(float, lines))
    for _ in range(cores):
        os.wait()
    return times[len(times) // 2]


class _Supervisor:
    """Does one job, in a process of its own."""

    def __init__(self, descriptors: list[int], folders: list[str], path: list[str], apart: bool) -> None:
        self.connection, self.streams = socket.socket(fileno=descriptors[0]), descriptors[1:]
        self.folders, self.path, self.apart = folders, path, apart
        self.folder, self.user = "", isolate.unprivileged_user(os.getpid())

    def work(self) -> Callable[[], Any]:
        """Run the job to its end, report and exit. Returns in the program's process only, what to run there."""
        child = None
        try:
            isolate.die_with_parent(signal.SIGKILL)
            with self.connection.makefile("rb") as lines:
                job = json.loads(lines.read())
            if self.apart:
                isolate.enter()
                if (init := os.fork()) != 0:
                    # The connection stays open here too: its end tells the client that the namespace is gone.
                    os.waitpid(init, 0)
                    os._exit(0)
                # From here on this is the first process of the new namespace.
                isolate.die_with_parent(signal.SIGKILL)
                isolate.close_files_off(self.folders)
                self.folder = "/tmp/run"
                os.mkdir(self.folder)
                job["other_tasks"] = 0
            else:
                isolate.adopt_orphans()
                # When bmjax is killed, this process still has to kill what no namespace would end.
                signal.signal(signal.SIGTERM, _raise_ended)
                isolate.die_with_parent(signal.SIGTERM)
                self.folder = tempfile.mkdtemp(prefix="bmjax-run-")
                if self.user is not None and any(isolate.closed_ancestor(path) for path in self.folders):
                    self.user = None  # which could not read Python's own library
                job["other_tasks"] = 0 if self.user is not None else _tasks_of_user()
            if self.user is not None:
                os.chown(self.folder, self.user, self.user)
            # Watched for by `sigtimedwait`: a signal that comes before the wait is kept.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            if (child := os.fork()) == 0:
                self.connection.close()
                return program.prepare(job, self.streams, self.folder, self.user, self.path)
            if sys.platform == "linux":
                isolate.hide_memory()
            outcome = self._watch(child, job)
        except BaseException as error:
            if child == 0:
                _say_and_exit(error)
            outcome = {"error": f"{type(error).__name__}: {error}"}
            self._kill_all(child)
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(outcome).encode())
        if not self.apart and self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)

    def _watch(self, child: int, job: dict[str, Any]) -> dict[str, Any]:
        """Wait until the program ends or is past a limit, kill what is left of it, and return what happened."""
        report, begun = self.streams[3], time.monotonic()
        status, ended_by, pause = None, "exit", _FIRST_PAUSE
        parts, part_cpu, part_begun, cpu, idle = 0, 0.0, begun, 0.0, 0.0
        last = begun
        while True:
            _wait_for_child(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            status = self._reap(child)
            now, before = time.monotonic(), cpu
            # Where nothing can be read, the kernel's limits of each process are left.
            cpu, memory, is_running = self._usage() or (cpu, 0, True)
            # Each part of a job, a test or a call, adds to the report; the limits of time are a part's.
            if (size := os.fstat(report).st_size) != parts:
                parts, part_cpu, part_begun, idle = size, before, now, 0.0
            # Whoever neither computes nor waits for a core waits for nothing that could come.
            idle = 0.0 if cpu > before or is_running else idle + now - last
            last = now
            if status is not None:
                break
            if memory > job["memory_bytes"]:
                ended_by = "memory"
            elif cpu - part_cpu > job["seconds"]:
                ended_by = "cpu"
            elif idle > job["seconds"] + 1:
                ended_by = "idle"
            elif now - part_begun > job["wall_seconds"]:
                ended_by = "wall"
            if ended_by != "exit":
                break
        status = self._kill_all(child, status)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = max(cpu, used.ru_utime + used.ru_stime)
        if ended_by == "exit" and (cpu - part_cpu > job["seconds"] or _signal_of(status) == signal.SIGXCPU):
            ended_by = "cpu"
        return {"ended_by": ended_by, "status": status, "cpu": cpu, "wall": time.monotonic() - begun}

    def _reap(self, child: int) -> int | None:
        """Collect whatever has ended; return the program's wait status once it is among them."""
        status = None
        with contextlib.suppress(ChildProcessError):
            while True:
                process, code = os.waitpid(-1, os.WNOHANG)
                if process == 0:
                    break
                if process == child:
                    status = code
        return status

    def _kill_all(self, child: int | None, status: int | None = None) -> int | None:
        """Kill everything that the program started until nothing is left; return the program's wait status."""
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self.apart:
                    os.kill(-1, signal.SIGKILL)
                elif child and (status is None or sys.platform != "linux"):
                    os.killpg(child, signal.SIGKILL)
            for process in [] if self.apart else self._descendants():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            try:
                process, code = os.waitpid(-1, 0 if self.apart else os.WNOHANG)
            except ChildProcessError:
                return status
            if process and process == child:
                status = code
            elif not process:
                time.sleep(0.002)

    def _descendants(self) -> list[int]:
        """Return the ids of all that descends from this process. Empty where the system does not say."""
        if self.apart:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        processes, unseen = [], [os.getpid()]
        while unseen:
            process = unseen.pop()
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{process}/task"):
                    with open(f"/proc/{process}/task/{thread}/children") as file:
                        children = [int(word) for word in file.read().split()]
                    processes += children
                    unseen += children
        return processes

    def _usage(self) -> tuple[float, int, bool] | None:
        """Return CPU seconds and bytes of all that the program started, and whether any of it wants to compute."""
        if not os.path.exists("/proc/self/stat"):
            return None
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        ticks, pages, is_running = 0, 0, False
        for process in self._descendants():
            with contextlib.suppress(OSError, ValueError, IndexError):
                threads = os.listdir(f"/proc/{process}/task")
                fields = _stat(f"/proc/{process}/stat")
                ticks += sum(map(int, fields[11:15]))
                pages += int(fields[21])
                is_running = is_running or fields[0] in "RD"
                if len(threads) > 1 and not is_running:
                    states = (_stat(f"/proc/{process}/task/{thread}/stat")[0] for thread in threads)
                    is_running = any(state in "RD" for state in states)
        return ended.ru_utime + ended.ru_stime + ticks / _TICKS, pages * _PAGE, is_running


def _stat(path: str) -> list[str]:
    """Return the fields of a `stat` file from the state on; the name before it may hold anything."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _wait_for_child(seconds: float) -> None:
    if sys.platform == "linux":
        signal.sigtimedwait({signal.SIGCHLD}, seconds)
    else:
        time.sleep(seconds)


def _raise_ended(number: int, frame: object) -> None:
    raise SystemExit("the server has ended")


def _signal_of(status: int | None) -> int:
    return os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0


def _tasks_of_user() -> int:
    """Return how many processes and threads the user has: without a user of its own, a program is counted with them."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count + 256 if count else 10_000


def _say_and_exit(error: BaseException) -> None:
    """End a program's process that could not be made ready, in a way that is no verdict."""
    with contextlib.suppress(OSError):
        os.write(2, f"{type(error).__name__}: {error}".encode())
    os._exit(1)
