"""What has to be said to JAX before it starts."""

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

MOST_CPU_DEVICES = 8
# mallopt's parameters, glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def use_cpu_cores() -> None:
    """Make one CPU device of each core, up to the largest power of two (at most 8).

    Rows spread over devices keep the cores busier than one device whose every operation is cut among threads
    (a fifth faster for small models). Nothing happens where devices were counted already: by XLA_FLAGS, by
    JAX_NUM_CPU_DEVICES, or because JAX has started. Accelerators are not touched.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_CPU_DEVICES
    )
    try:
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))
    except RuntimeError:
        return
    if not _accelerators():
        keep_freed_memory()


def use_own_threads() -> None:
    """For a program whose own threads keep the cores busy: XLA computes on a CPU in the thread that asks for it.

    To be called before JAX makes its first array. A variable that the user has set stays.
    """
    os.environ.setdefault("NPROC", "1")  # the size of XLA's thread pool
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not _accelerators():
        keep_freed_memory()


def _accelerators() -> bool:
    """Whether an accelerator's JAX plugin is installed and allowed."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step instead of returning them to the kernel.

    XLA on a CPU allocates a step's temporaries anew every step; mapping and clearing those pages takes a fifth of
    a small model's step. One arena, since only the main one can hold blocks above 64 MiB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(parameter, value)
