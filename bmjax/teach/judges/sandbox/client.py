"""Runs programs for bmjax: hands jobs to the server process, as many at once as there are cores.

    outcome = run(Job("print(input())", stdin="1"))
    outcome.stdout == "1\\n", outcome.ended_by == "exit", outcome.exit_code == 0

Any thread may call `run`. The server starts with the first job, and again if it has died.
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bmjax.log import write_line
from bmjax.teach.judges.sandbox.program import READY, TOKEN_BYTES
from bmjax.teach.judges.verdict import JudgeError

SECONDS = 6.0  # of CPU for a test, as LiveCodeBench gives
MEMORY_MIB = 2048.0
OUTPUT_BYTES = 16 * 2**20
# CPU seconds that `server._unit_seconds` takes on the machine that limits are stated for: a little slower than a core
# of a 2.4 GHz AMD EPYC, which takes 0.007 under CPython 3.11. A slower machine than that gets more seconds in
# proportion, a faster one not fewer.
REFERENCE_UNIT_SECONDS = 0.0085
# The clock on the wall only ends what no machine so loaded can finish: then nothing is known of the program.
_WALL_FACTOR, _WALL_SECONDS = 10.0, 60.0
_START_SECONDS = 60.0
_LONGEST_ERROR = 4000  # bytes of stderr that are read

_ENVIRONMENT = {
    "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # without which Python may not start
_LAUNCH = """
import sys
path = sys.path[:]
sys.path[:0] = {path!r}
from bmjax.teach.judges.sandbox.server import serve
serve([folder for folder in path if folder], {namespaces})()
"""

Ending = Literal["exit", "cpu", "idle", "memory", "wall"]


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        source: the program.
        kind: "stream" runs it as `__main__` on `stdin`; "asserts" runs `tests` after it; "calls" calls `name` of it
            with every one of `cases`.
        seconds: CPU seconds of a reference machine, for the whole of a stream, for each test and each call.
        memory_mib: of all its processes together.
        output_bytes: the largest file, stdout among them.
        arguments, files: the command line, and texts by name in the folder where it runs.
        preamble, entry_point: what runs before the program, and the expression that `check(candidate)` is called with.
    """

    source: str
    kind: Literal["stream", "asserts", "calls"] = "stream"
    stdin: str = ""
    seconds: float = SECONDS
    memory_mib: float = MEMORY_MIB
    output_bytes: int = OUTPUT_BYTES
    arguments: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    tests: Sequence[str] = ()
    preamble: str = ""
    entry_point: str | None = None
    name: str = ""
    cases: Sequence[Any] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        ended_by: "exit", or the limit at which it was killed: of CPU time, of waiting for nothing, of memory, or the
            clock on the wall, which says nothing of the program.
        exit_code: as a shell has it, negative for a signal; None when it was killed.
        stdout, error: what it printed, and the last line of stderr.
        lines: what the tests or calls reported, in order.
        finished: whether the random token was seen that stands after the last test.
        cpu, wall: seconds.
    """

    ended_by: Ending
    exit_code: int | None
    stdout: str
    error: str
    lines: Sequence[Mapping[str, Any]]
    finished: bool
    cpu: float
    wall: float


def run(job: Job) -> Outcome:
    """Run a job in the sandbox and return its outcome. Raises JudgeError when this machine could not run it."""
    with _slots():
        server = _server()
        try:
            return server.run(job)
        except _ServerDied:
            server.stop()
        try:
            return _server().run(job)
        except _ServerDied as error:
            raise JudgeError(str(error)) from None


def run_program(source: str, stdin: str = "", seconds: float = SECONDS) -> Outcome:
    """Run a program on `stdin` as `__main__`, within `seconds` of CPU time. Raises JudgeError as `run` does."""
    return run(Job(source, stdin=stdin, seconds=seconds))


@functools.cache
def _slots() -> threading.BoundedSemaphore:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threading.BoundedSemaphore(max(1, cores))


class _ServerDied(Exception):
    """The server, or a supervisor of it, went away without an answer."""


class _Server:
    """The server process, and the socket on which it takes jobs.

    namespaces: whether to use them where the kernel gives them.
    """

    def __init__(self, namespaces: bool = True) -> None:
        ours, theirs = socket.socketpair()
        path = [os.path.abspath(folder) for folder in sys.path if folder]
        environment = _ENVIRONMENT | {name: os.environ[name] for name in _INHERITED if name in os.environ}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _LAUNCH.format(path=path, namespaces=namespaces)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.owner, self.socket, self.lock = os.getpid(), ours, threading.Lock()
        ours.settimeout(_START_SECONDS)
        try:
            with ours.makefile("rb") as lines:
                hello = json.loads(lines.readline())
        except (OSError, ValueError):
            self.process.kill()
            errors = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise JudgeError(f"the server of programs did not start: {errors[-1] if errors else ''}") from None
        self.factor = max(1.0, hello["unit_seconds"] / REFERENCE_UNIT_SECONDS)
        if not hello["namespaces"]:
            _warn_once(hello["reason"])

    def run(self, job: Job) -> Outcome:
        """Run one job. Raises _ServerDied when no answer comes."""
        seconds = job.seconds * self.factor
        wall = seconds * _WALL_FACTOR + _WALL_SECONDS
        parts = max(1, len(job.tests), len(job.cases))
        order = {
            "kind": job.kind, "source": job.source, "seconds": seconds, "wall_seconds": wall, "parts": parts,
            "memory_bytes": int(job.memory_mib * 2**20), "output_bytes": job.output_bytes,
            "arguments": list(job.arguments), "files": dict(job.files), "tests": list(job.tests),
            "preamble": job.preamble, "entry_point": job.entry_point, "name": job.name, "cases": list(job.cases),
        }  # fmt: skip
        token = secrets.token_hex(TOKEN_BYTES // 2).encode()
        with contextlib.ExitStack() as stack:
            files = [_memory_file(stack, name) for name in ("stdin", "stdout", "stderr", "report")]
            _write_all(files[0], job.stdin.encode("utf-8", errors="surrogatepass"))
            os.lseek(files[0], 0, os.SEEK_SET)
            token_end = _pipe_with(stack, token)
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs, self.lock:
                try:
                    socket.send_fds(self.socket, [b"j"], [theirs.fileno(), *files, token_end])
                except OSError as error:
                    raise _ServerDied(f"the server of programs has ended: {error}") from None
            ours.settimeout(wall * parts + _START_SECONDS)
            try:
                ours.sendall(json.dumps(order).encode())
                ours.shutdown(socket.SHUT_WR)
                with ours.makefile("rb") as answer:
                    result = json.loads(answer.read())
            except (OSError, ValueError):
                # A supervisor alone may be the victim of its program. Other programs are none of its business.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=0.5)
                problem = "the supervisor of the program gave no answer"
                raise JudgeError(problem) if self.process.poll() is None else _ServerDied(problem) from None
            return _outcome(result, files, token, job.output_bytes)

    def stop(self) -> None:
        """End the server, and with it all that it runs."""
        self.socket.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()


def _outcome(result: dict[str, Any], files: Sequence[int], token: bytes, output_bytes: int) -> Outcome:
    """Read what the program left in its files."""
    stdout, errors, report = (_content(descriptor, output_bytes) for descriptor in files[1:])
    lines = errors[-_LONGEST_ERROR:].decode("utf-8", errors="replace").strip().splitlines()
    error = lines[-1].strip()[:200] if lines else ""
    if "error" in result or not report.startswith(READY):
        raise JudgeError(f"the program could not be started: {result.get('error') or error or 'no reason is known'}")
    reported, finished = [], False
    for line in report[len(READY) :].split(b"\n"):
        finished = line == token
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                reported.append(value)
    code = os.waitstatus_to_exitcode(result["status"]) if result["status"] is not None else None
    return Outcome(
        result["ended_by"], code if result["ended_by"] == "exit" else None, stdout.decode("utf-8", errors="replace"),
        error, reported, finished and result["ended_by"] == "exit", result["cpu"], result["wall"],
    )  # fmt: skip


def _memory_file(stack: contextlib.ExitStack, name: str) -> int:
    """Open an empty file that lies in no folder."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
        stack.callback(os.close, descriptor)
        return descriptor
    return stack.enter_context(tempfile.TemporaryFile()).fileno()


def _pipe_with(stack: contextlib.ExitStack, content: bytes) -> int:
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    os.write(writing, content)
    os.close(writing)
    return reading


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _content(descriptor: int, limit: int) -> bytes:
    return os.pread(descriptor, min(os.fstat(descriptor).st_size, limit), 0)


_starting = threading.Lock()
_current: list[_Server] = []


def _server() -> _Server:
    """Return the running server of this process; start one where there is none."""
    with _starting:
        if _current and (_current[0].owner != os.getpid() or _current[0].process.poll() is not None):
            _current.pop().socket.close()
        if not _current:
            _current.append(_Server())
        return _current[0]


@atexit.register
def _stop() -> None:
    while _current:
        server = _current.pop()
        if server.owner == os.getpid():
            server.stop()


@functools.cache
def _warn_once(reason: str) -> None:
    write_line(
        f"programs: this machine gives no namespaces ({reason}): programs run under limits, but may reach the network "
        "and your files; use a container"
    )
