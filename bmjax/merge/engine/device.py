"""On which device the programs of a merge from files run."""

from collections.abc import Iterable
from typing import Any

import jax

from bmjax.config import UserError

DEVICES = ("auto", "cpu", "gpu", "tpu")
# Methods that take about as long as reading and writing the files. Bringing their tensors to another device and back
# takes longer than the arithmetic.
BOUND_BY_BYTES = frozenset(
    {"karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "slerp", "task_arithmetic"}
)


def choose(name: str, methods: Iterable[str]) -> Any:
    """Return the device for a merge.

    Arguments:
        name: of DEVICES. auto is the CPU where all methods are BOUND_BY_BYTES, else the device that JAX computes on.
        methods: those of the recipe's steps.

    Raises:
        UserError: for a device that JAX does not find.
    """
    if name not in DEVICES:
        raise UserError(f"--device: expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, found '{name}'")
    if name == "auto" and not set(methods) <= BOUND_BY_BYTES:
        return _default()
    platform = "cpu" if name == "auto" else name
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        if name == "auto":  # JAX_PLATFORMS leaves the CPU out
            return _default()
        names = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        way_out = {
            "cpu": f"set JAX_PLATFORMS={names},cpu",
            "gpu": "pip install '.[cuda]' in the clone",
            "tpu": "pip install '.[tpu]' in the clone",
        }
        raise UserError(
            f"--device: JAX finds no {platform} here, only {names}; leave it out, or {way_out[platform]}"
        ) from None


def _default() -> Any:
    """Return the device on which programs with host arrays run in this thread."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def compute_on(device: Any) -> None:
    """Have programs with host arrays run on a device, from now on in this thread, which computes nothing else."""
    jax.default_device(device).__enter__()


def platform() -> str:
    """Return the platform of the device on which programs with host arrays run in this thread."""
    return str(_default().platform)
