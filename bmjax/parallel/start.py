"""Process settings to make before JAX starts. Each leaves alone what the user has set by an environment variable."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from pathlib import Path

import jax

MOST_CPU_DEVICES = 8
GOOGLE = "0x1ae0"  # the vendor of TPUs on a PCI bus
# mallopt's parameters, glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def _platforms() -> str | None:
    return jax.config.jax_platforms  # type: ignore[attr-defined]


def pass_over_absent_tpu() -> None:
    """Have JAX look for no TPU where libtpu is installed, to plan for one, on a machine without one.

    The search prints ten lines of alarm and takes seconds. JAX_PLATFORMS, where it is set, decides.
    """
    if _platforms() or importlib.util.find_spec("libtpu") is None:
        return
    if any(file.read_text().strip() == GOOGLE for file in Path("/sys/bus/pci/devices").glob("*/vendor")):
        return
    has_gpu = any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd"))
    if not has_gpu:
        jax.config.update("jax_platforms", "cpu")
    elif any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        jax.config.update("jax_platforms", "cuda,cpu")


def use_cpu_cores(keep_memory: bool = True) -> None:
    """Make one CPU device of each core, up to the largest power of two (at most 8).

    Rows spread over devices keep the cores busier than one device whose every operation is cut among threads
    (a fifth faster for small models). Nothing happens where JAX has started. keep_memory: see `_keep_freed_memory`;
    where arrays have many sizes, what lies between them would never be free again.
    """
    pass_over_absent_tpu()
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 1 << (min(cores, MOST_CPU_DEVICES).bit_length() - 1))
        if keep_memory:
            _keep_freed_memory()


def use_gpu_memory() -> None:
    """Give JAX nearly all of a GPU's memory instead of three quarters: a training has the device for itself."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX refuses both at once
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")


def use_own_threads() -> None:
    """Have XLA compute on a CPU in the thread that asks for it, in programs whose threads keep the cores busy."""
    pass_over_absent_tpu()
    os.environ.setdefault("NPROC", "1")  # the size of XLA's thread pool
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _keep_freed_memory()


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs in the user's cache directory for the next process.

    Half of the time of short work is compiling. A program whose entry cannot be read is compiled again. A directory
    that the user has set stays, and JAX_COMPILATION_CACHE_DIR may be empty: no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    # A program is compiled for the processor's abilities, by a version of JAX.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        abilities = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        abilities = platform.processor()
    target = f"{importlib.metadata.version('jaxlib')} {platform.machine()} {abilities}"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "bmjax" / f"compiled-{hashlib.sha256(target.encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or no right to write there
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A killed process may have left an entry half-written; that is no news to the user.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")


def _keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step, unless JAX may use an accelerator.

    XLA on a CPU allocates a step's temporaries anew every step; mapping and clearing those pages takes a fifth of
    a small model's step. One arena, since only the main one can hold blocks above 64 MiB.
    """
    accelerator = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    if accelerator and _platforms() != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
