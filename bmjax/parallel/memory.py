"""How much memory a device has, for those who must make something fit: a step's microbatches, a cache of keys."""

import contextlib
import os
from pathlib import Path

import jax


def free_host_memory() -> int:
    """Return the bytes of this machine's memory that are free, as the kernel and the container's limit tell."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux: half of it all
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, most - used))
    return free


def usable_memory(device: jax.Device) -> int:
    """Return the bytes that a program may take on a device: nine tenths of an accelerator's, else a share of what is
    free on this machine."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return int(0.9 * limit) if limit else int(0.8 * free_host_memory()) // jax.local_device_count()
