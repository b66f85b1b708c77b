"""A training in several processes on this machine, each with a part of eight CPU devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

DEVICES = 8


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    config: Path, processes: int, *overrides: str, timeout: int = 30, caches: Path | None = None
) -> list[subprocess.Popen]:
    """`bmjax train CONFIG` in that many processes; 1: alone. caches: a folder that gives each a cache to itself."""
    address = f"coordinator=127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes), "PYTHONUNBUFFERED": "1"}
    started = []
    for number in range(processes):
        several = [address, f"num_processes={processes}", f"process_id={number}", f"peer_timeout={timeout}"]
        command = [sys.executable, "-m", "bmjax", "train", str(config), *(several if processes > 1 else []), *overrides]
        apart = {} if caches is None else {"BMJAX_CACHE": str(caches / str(number))}
        started.append(subprocess.Popen(command, env=environment | apart, stderr=subprocess.PIPE, text=True))
    return started


def finish(started: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """(exit code, what it wrote to standard error) of each."""
    said = [process.communicate(timeout=seconds)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
