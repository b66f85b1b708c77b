"""Devices by their makers' data sheets, a GPU's capability, and topologies of TPU chips that this machine lacks."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from bmjax.config import UserError, first_line
from bmjax.errors import install
from bmjax.parallel.topology import DEVICES_A_CHIP, parse_topology

# Dense bf16 peak of one device, FLOP/s, from the makers' data sheets, by a part of jax's `device_kind`.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "B200": 2250e12,
    "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v5": 459e12, "v6 lite": 918e12, "v6e": 918e12, "v4": 275e12,
    "TPU7x": 1153.5e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Return the FLOP/s of a device, or None where they are not known (a CPU)."""
    kinds = (name for name in PEAK_FLOPS if re.search(rf"\b{name}(?!\d)", device_kind, re.IGNORECASE))
    return PEAK_FLOPS.get(next(kinds, ""))


def gpu_capability(device: Any = None) -> tuple[int, int] | None:
    """Return (major, minor) of a device's CUDA compute capability; None where it is no NVIDIA GPU.

    device: None for the first one.
    """
    device = device or jax.devices()[0]
    match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return None if match is None else (int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Chip:
    """A TPU chip, or what one of its devices has of it where a program sees several; bandwidths in bytes a second."""

    hbm_gib: float  # that XLA's compiler lets a program use
    flops: float  # dense bfloat16 peak a second
    hbm_bandwidth: float
    link_bandwidth: float  # sent over all its links
    slice_bandwidth: float  # its share of what its host sends to other slices
    price: float | None  # US$ an hour on demand, of the whole chip; None where Google publishes none
    devices: int = 1  # of the chip


# cloud.google.com/tpu/docs/system-architecture-tpu-vm, /tpu7x and /pricing; links: jax-ml.github.io/scaling-book/tpus.
CHIPS = {
    "v4": Chip(31.75, PEAK_FLOPS["v4"], 1.23e12, 270e9, 6.25e9, 3.22),
    "v5e": Chip(15.75, PEAK_FLOPS["v5e"], 0.82e12, 180e9, 3.125e9, 1.20),
    "v5p": Chip(95.74, PEAK_FLOPS["v5p"], 2.77e12, 540e9, 6.25e9, 4.20),
    "v6e": Chip(31.25, PEAK_FLOPS["v6e"], 1.64e12, 360e9, 12.5e9, 2.70),
    "tpu7x": Chip(94.75, PEAK_FLOPS["TPU7x"], 3.69e12, 300e9, 6.25e9, None, DEVICES_A_CHIP["tpu7x"]),
}


def topology_devices(name: str) -> tuple[Chip, list[Any]]:
    """Return the chip and the devices to compile for, of a slice by its name, see `parse_topology`."""
    slices, kind, shape = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology: planning for TPUs needs their compiler; {install('tpu')} (no TPU is needed)")
    # libtpu must not look for a TPU here, nor lock this machine's.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-8")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = list(topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **options).devices)
    except Exception as error:
        raise UserError(f"--topology: {name}: {first_line(error)}") from None
    chip = CHIPS[kind]
    if len(devices) != slices * math.prod(map(int, shape.split("x"))) * chip.devices:
        raise UserError(f"--topology: {name}: {len(devices)} devices, expected {chip.devices} a chip")
    return chip, devices
