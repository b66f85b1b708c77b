"""Several processes that train as one, on the same inputs: how they meet, agree, stop together, notice a dead one."""

import atexit
import contextlib
import importlib.util
import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from bmjax.config import UserError, first_line

SLACK = 60  # seconds that the runtime's watch, which ends with a stack trace, waits longer than ours
BEAT = 5.0  # seconds between looks at the other processes, at most
TOGETHER = 5  # seconds within which processes that fail for the same reason have all reported it
_LONGEST_WORK = 7 * 24 * 3600  # seconds that a process may work alone while the others wait
_BARRIERS = itertools.count()  # the runtime takes a barrier's name once
_REASON = "bmjax/alive/reason"
_RUNTIME: Any = global_state  # its client: a store that process 0 holds, and barriers
_AGAIN = "the same command on all of them resumes from the newest checkpoint"


@contextlib.contextmanager
def together(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Join this process with the others of a run while the block runs; entered before JAX makes its first array.

    When a process is silent for `timeout` seconds, every other process stops with a line that names it; when a process
    leaves by an error, they stop at once. When process 0 is killed, JAX's runtime ends the others with its own message,
    since they meet at process 0; a line about what to do follows it. coordinator: host:port of process 0. With
    num_processes and process_id all None: as the launcher says (Cloud TPU and GKE slices, SLURM's srun, Open MPI 4,
    Kubernetes indexed jobs with the kubernetes package). Nothing is done without a launcher, or where num_processes is
    1. Raises UserError for settings that do not belong together, and when processes do not come.
    """
    _connect(coordinator, num_processes, process_id, timeout)
    if jax.process_count() == 1:
        yield
        return
    ended, beat = threading.Event(), min(BEAT, timeout / 5)
    process = f"process {jax.process_index()} of {jax.process_count()}"
    epilogue = _Epilogue(process)
    threading.Thread(target=_watch, args=(timeout, beat, ended, epilogue), name="bmjax-watch", daemon=True).start()
    try:
        yield
        wait_for_all("bmjax/done")
    except SystemExit:
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # where the watch of the other processes looks for it
            _RUNTIME.client.key_value_set(_REASON, f"{process} stopped: {first_line(error)}")
        atexit.register(_leave, 2 if isinstance(error, UserError | jax.errors.JaxRuntimeError) else 1, beat)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise UserError(
                f"{process}: a device or another process failed: {first_line(error)}; see the other logs; {_AGAIN}"
            ) from error
        raise
    finally:
        ended.set()
        epilogue.cancel()


class _Epilogue:
    """A shell that writes a line about this process when it is killed, or aborted by JAX's runtime.

    The runtime takes no Python function to call instead of aborting (its binding cannot pass on the status), so only
    another process can speak then. It reads a pipe, whose end without a word means that this process is gone.
    """

    def __init__(self, process: str) -> None:
        cause = "was killed"
        if jax.process_index():
            address = _RUNTIME.coordinator_address
            cause += f", or ended by JAX because process 0 at {address} is gone (JAX's message above says so)"
        line = f"bmjax: error: {process} {cause}; {_AGAIN}"
        script = 'read -r word || printf "%s\\n" "$0" >&2'
        self._shell = subprocess.Popen(["sh", "-c", script, line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def cancel(self) -> None:
        """Say nothing: this process ends by itself, or has said why it ends."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # the shell may be gone before us
            self._shell.communicate(b"ended\n", timeout=5)


def _leave(code: int, beat: float) -> None:
    """End a failed process without waiting for the others, unless they have failed, too.

    It runs before JAX's exit handler, which waits for all processes and aborts where they do not come.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # Process 0 stays until all have looked: the runtime ends a process that loses it with a stack trace.
        seconds = TOGETHER if jax.process_index() else 2 * (TOGETHER + beat)
        _RUNTIME.client.wait_at_barrier("bmjax/left", int(1000 * seconds))
    except Exception:
        os._exit(code)


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    settings = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in settings.items() if value is None]
    if missing and (coordinator is not None or process_id is not None or num_processes not in (None, 1)):
        raise UserError(f"{', '.join(missing)}: missing; coordinator, num_processes and process_id belong together")
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] | None = _launched() if missing else {"cluster_detection_method": "deactivate"}
    if arguments is None:
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"coordinator: '{coordinator}' is not like host:port")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(f"process_id: {process_id} is not one of 0 to {num_processes - 1} (num_processes)")
    arguments["initialization_timeout"] = max(timeout, 10)
    arguments["heartbeat_timeout_seconds"] = arguments["shutdown_timeout_seconds"] = timeout + SLACK
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **arguments)
    except Exception as error:
        no_others = "should be defined" in str(error) or "must be called before" in str(error)
        if missing and no_others and jax.process_count() == 1:
            return  # a single TPU host, or a host whose program began without others
        raise UserError(f"coordinator: the processes did not come together: {first_line(error)}") from None


def _launched() -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` that suit the launcher; None when none started us."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        if env.get("SLURM_STEP_NUM_NODES") != env["SLURM_STEP_NUM_TASKS"] or "SLURM_GPUS_ON_NODE" not in env:
            return {"cluster_detection_method": "slurm"}
        # JAX gives a task under SLURM a single GPU; a node's only task gets all of them.
        gpus = list(range(int(env["SLURM_GPUS_ON_NODE"])))
        return {"cluster_detection_method": "slurm", "local_device_ids": gpus}
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {"cluster_detection_method": "ompi"}
    # A host of a TPU slice whose software JAX may use.
    if env.get("JAX_PLATFORMS", "tpu") in ("", "tpu") and importlib.util.find_spec("libtpu") is not None:
        devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("*")]
        if any(path.name[-1].isdigit() for path in devices):
            return {}
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "coordinator: a pod of an indexed Kubernetes job finds the others by the kubernetes package; install "
                "it, give coordinator, num_processes and process_id, or num_processes=1 to train alone"
            )
        return {}
    return None


def _watch(timeout: int, beat: float, ended: threading.Event, epilogue: _Epilogue) -> None:
    """End this process with a line when another process is silent for `timeout` seconds, or has left a reason.

    A collective that waits for a dead process never returns, so a thread watches. Every process writes the time to the
    runtime's store, which process 0 holds, and looks whether the others' times change.
    """
    client = _RUNTIME.client
    process, count = jax.process_index(), jax.process_count()
    last_change = {i: ("", time.monotonic()) for i in range(count) if i != process}  # what each wrote, and since when
    while not ended.wait(beat):
        try:
            client.key_value_set(f"bmjax/alive/{process}", str(time.monotonic_ns()), allow_overwrite=True)
            store = dict(client.key_value_dir_get("bmjax/alive"))
        except Exception:
            return  # the store is gone, and process 0 with it: the runtime ends this process, and the epilogue speaks
        if (reason := store.get(_REASON)) is not None and not ended.wait(TOGETHER):
            print(f"bmjax: error: {reason}; {_AGAIN}", file=sys.stderr, flush=True)
            epilogue.cancel()
            os._exit(1)
        now = time.monotonic()
        for other, (last_stamp, since) in last_change.items():
            stamp = store.get(f"bmjax/alive/{other}", "")
            if stamp != last_stamp:
                last_change[other] = (stamp, now)
            elif now - since > timeout and not ended.is_set():
                silent = f"process {other} of {count} has not been heard of for {now - since:.0f} s"
                message = f"{silent}; see its own log for why. Stopped; {_AGAIN}"
                print(f"bmjax: error: {message}", file=sys.stderr, flush=True)
                epilogue.cancel()
                if process == 0:
                    time.sleep(2 * beat)  # for the others to see the same
                os._exit(1)


@contextlib.contextmanager
def delayed_sigterm() -> Iterator[Callable[[int], bool]]:
    """Keep SIGTERM, which schedulers send, from ending the process while the block runs.

    Yields a function of the step that says whether to end after it; all processes call it once a step. In a run of
    several processes JAX's runtime passes a SIGTERM of any process to all of them and picks the step.
    """
    if jax.process_count() > 1:  # JAX has set the signal's handler
        yield multihost_utils.reached_preemption_sync_point
        return
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: signalled.set())
    try:
        yield lambda step: signalled.is_set()
    finally:
        if previous is not None:  # None: it was not set from Python
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def stopping_at_once(line: str) -> Iterator[None]:
    """End this process with one line at SIGTERM or an interrupt while the block runs, also within a compiler's code.

    Python runs its own handlers only between its instructions, and a compiler may install one that prints its stack.
    To be entered after its library was loaded. What the block would have cleaned up stays.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if (number := os.read(reader, 1)) != b"\0":
            os.write(2, f"bmjax: {line}\n".encode())
            os._exit(128 + number[0])

    watching = threading.Thread(target=watch, name="signals", daemon=True)
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, lambda *_: None)
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # the system writes each signal's number there
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.write(writer, b"\0")
        watching.join()
        os.close(reader)
        os.close(writer)


def is_main() -> bool:
    """Return whether this is the process that writes logs, metrics and the exported model."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait until every process has made this call, with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def wait_for_work(name: str) -> None:
    """Wait until every process has made this call, for hours if one of them has work to do before it.

    It goes through the runtime's store: a collective would take a device, and on CPUs give up after half a minute.
    """
    if jax.process_count() > 1:
        _RUNTIME.client.wait_at_barrier(f"{name}/{next(_BARRIERS)}", 1000 * _LONGEST_WORK)


def mains(value: bool) -> bool:
    """Return process 0's value in all processes."""
    return bool(mains_number(value))


def mains_number(value: int) -> int:
    """Return process 0's number, below 2^31, in all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def shared_token() -> str:
    """Return 16 random hexadecimal digits, drawn anew by every call, the same in all processes."""
    drawn = np.frombuffer(secrets.token_bytes(8), np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(drawn), np.int32).tobytes().hex()


def check_agreement(values: Mapping[str, str]) -> None:
    """Raise UserError in every process, naming the key, where processes have different values."""
    if jax.process_count() == 1:
        return
    names = sorted(values)
    digests = [np.frombuffer(sha256(values[name].encode()).digest()[:8], np.int32) for name in names]
    gathered = np.asarray(multihost_utils.process_allgather(np.array(digests, np.int32)))  # [processes, keys, 2]
    for process, row in zip(*np.nonzero((gathered != gathered[:1]).any(-1)), strict=True):
        raise UserError(
            f"{names[row]}: process {process} has another value or other contents than process 0; "
            "start all processes with the same settings and files"
        )
