"""On which device the programs of a merge from files run."""

import contextlib
from collections.abc import Iterable, Iterator
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
        raise UserError(f"device: expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, found '{name}'")
    if name == "auto" and not set(methods) <= BOUND_BY_BYTES:
        return jax.local_devices()[0]
    platform = "cpu" if name == "auto" else name
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        names = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        extra = {"gpu": "cuda", "tpu": "tpu"}[platform]
        way_out = f"leave it out, or pip install '.[{extra}]' in the clone"
        raise UserError(f"device: JAX finds no {platform} here, only {names}; {way_out}") from None


@contextlib.contextmanager
def computing_on(device: Any) -> Iterator[None]:
    """Have the programs of all threads that are given host arrays run on a device."""
    before = jax.config.jax_default_device  # type: ignore[attr-defined]
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)


def platform() -> str:
    """Return the platform of the device that programs with host arrays run on."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else str(device.platform)
