"""Several processes that train as one: how they find each other, agree, stop together, and notice a dead one.

All processes run the same program on the same inputs; JAX's own runtime (`jax.distributed`) joins their devices.
Without several processes every function here costs nothing.
"""

import atexit
import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.config import UserError, first_line

SLACK = 60  # seconds that the runtime's own watch, which ends with a stack trace, lets ours speak first
BEAT = 5.0  # seconds between looks at the others, at most
TOGETHER = 5  # seconds within which processes that fail for one reason have all said so
_REASON = "bmjax/alive/reason"
_AGAIN = "the same command on all of them resumes from the newest checkpoint"
_DEAD = (
    "bmjax: error: process {dead} of {count} has not been heard of for {seconds:.0f} s; see its own log for why. "
    "Stopped; " + _AGAIN
)


@contextlib.contextmanager
def together(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Within it this process is one of the run's; entered before JAX makes its first array.

    coordinator: host:port of process 0, with num_processes and process_id; all None: as the launcher says (Cloud TPU
    and GKE slices, SLURM's srun, Open MPI 4, Kubernetes indexed jobs with the kubernetes package). timeout: seconds
    until a silent process is taken for dead; every process then stops with a line that names it, and at once where
    one leaves by an error. (Where process 0 is killed, the runtime ends the others in its own words, for it is the
    one that they meet at.) Nothing is done where there is no launcher, or where num_processes is 1.
    Raises UserError for settings that do not belong together and for processes that do not come.
    """
    _connect(coordinator, num_processes, process_id, timeout)
    if jax.process_count() == 1:
        yield
        return
    left, beat = threading.Event(), min(BEAT, timeout / 5)
    threading.Thread(target=_watch, args=(timeout, beat, left), name="bmjax-watch", daemon=True).start()
    try:
        yield
        wait_for_all("bmjax/done")
    except SystemExit:
        raise
    except BaseException as error:
        _tell_others(error)
        atexit.register(_leave, 2 if isinstance(error, UserError | jax.errors.JaxRuntimeError) else 1, beat)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise UserError(
                f"process {jax.process_index()} of {jax.process_count()}: a device or another process failed: "
                f"{first_line(error)}; see the other logs; {_AGAIN}"
            ) from error
        raise
    finally:
        left.set()


def _client() -> Any:
    """The runtime's client: a store that process 0 holds, and barriers."""
    from jax._src.distributed import global_state

    return global_state.client


def _tell_others(error: BaseException) -> None:
    """Leaves the reason where the others' watch finds it, and time to find it: without process 0 they could not."""
    said = f"process {jax.process_index()} of {jax.process_count()} stopped: {first_line(error)}"  # type: ignore[arg-type]
    with contextlib.suppress(Exception):
        _client().key_value_set(_REASON, said)


def _leave(code: int, beat: float) -> None:
    """Ends a process that failed without waiting for the others, unless they have failed, too.

    Runs before JAX's own end, which waits for all and aborts where they don't come.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # Process 0 stays until all have looked, for the runtime ends who loses it with a stack trace.
        seconds = TOGETHER if jax.process_index() else TOGETHER + TOGETHER + 2 * beat
        _client().wait_at_barrier("bmjax/left", int(1000 * seconds))
    except Exception:
        os._exit(code)


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and (coordinator is not None or process_id is not None or num_processes not in (None, 1)):
        raise UserError(f"{', '.join(missing)}: missing; coordinator, num_processes and process_id belong together")
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    if missing:
        arguments = _launched()
        if arguments is None:
            return
    else:
        assert coordinator is not None and num_processes is not None and process_id is not None
        if not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"coordinator: '{coordinator}' is not like host:port")
        if not 0 <= process_id < num_processes:
            raise UserError(f"process_id: {process_id} is not one of 0 to {num_processes - 1} (num_processes)")
        arguments = {
            "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=max(timeout, 10),
            heartbeat_timeout_seconds=timeout + SLACK,
            shutdown_timeout_seconds=timeout + SLACK,
        )
    except Exception as error:
        alone = "should be defined" in str(error) or "must be called before" in str(error)
        if missing and alone and jax.process_count() == 1:
            return  # a single TPU host, or one whose program has begun without others
        raise UserError(f"coordinator: the processes did not come together: {first_line(error)}") from None


def _launched() -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs where a launcher started this process beside others; None elsewhere."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        found: dict[str, Any] = {"cluster_detection_method": "slurm"}
        if env.get("SLURM_STEP_NUM_NODES") == env["SLURM_STEP_NUM_TASKS"] and "SLURM_GPUS_ON_NODE" in env:
            # JAX gives a task under SLURM one GPU; a node's only task gets all of them.
            found["local_device_ids"] = list(range(int(env["SLURM_GPUS_ON_NODE"])))
        return found
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {"cluster_detection_method": "ompi"}
    if _on_tpu():
        return {}
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "coordinator: a pod of an indexed Kubernetes job finds the others by the kubernetes package; install "
                "it, give coordinator, num_processes and process_id, or num_processes=1 to train alone"
            )
        return {}
    return None


def _on_tpu() -> bool:
    """Whether this is a host of a TPU slice, whose software JAX may use."""
    if os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return any(path.name[-1].isdigit() for path in [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("*")])


def _watch(timeout: int, beat: float, left: threading.Event) -> None:
    """Ends this process with one line when another one is silent for `timeout` seconds.

    A collective that waits for a dead process never returns, so a thread watches: every process counts up a number of
    its own in the runtime's store, which is process 0's, and reads those of all others. One that fails leaves the
    reason there.
    """
    client = _client()
    mine, count = jax.process_index(), jax.process_count()
    seen = {i: ("", time.monotonic()) for i in range(count) if i != mine}
    number = 0
    while not left.wait(beat):
        number += 1
        try:
            client.key_value_set(f"bmjax/alive/{mine}", str(number), allow_overwrite=True)
            found = dict(client.key_value_dir_get("bmjax/alive"))
        except Exception:
            return  # the store is gone, and process 0 with it: the runtime says so itself
        if (reason := found.get(_REASON)) is not None and not left.wait(TOGETHER):
            print(f"bmjax: error: {reason}; {_AGAIN}", file=sys.stderr, flush=True)
            os._exit(1)
        now = time.monotonic()
        for other, (before, last) in seen.items():
            told = found.get(f"bmjax/alive/{other}", "")
            if told != before:
                seen[other] = (told, now)
            elif now - last > timeout and not left.is_set():
                print(_DEAD.format(dead=other, count=count, seconds=now - last), file=sys.stderr, flush=True)
                if mine == 0:
                    time.sleep(2 * beat)  # for the others to find the same
                os._exit(1)


def is_main() -> bool:
    """Whether this process writes what is written once: logs, metrics, the exported model."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process is here. what: a name, the same for all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def mains(value: bool) -> bool:
    """What process 0 says."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_agreement(values: Mapping[str, str]) -> None:
    """UserError on every process, naming the key, where the processes have different values."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    names = sorted(values)
    own = np.array(
        [np.frombuffer(sha256(values[name].encode()).digest()[:8], np.int32) for name in names], np.int32
    )  # [keys, 2]
    every = np.asarray(multihost_utils.process_allgather(own))
    for process, row in zip(*np.nonzero((every != every[:1]).any(-1)), strict=True):
        raise UserError(
            f"{names[row]}: process {process} has another value or other contents than process 0; "
            "start all processes with the same settings and files"
        )
