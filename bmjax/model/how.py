"""How attention is computed and what is kept for the backward pass: names for settings, without JAX."""

from typing import Literal, NamedTuple

Backend = Literal["auto", "splash", "tokamax", "xla"]
Remat = Literal["full", "save_attention", "minimal", "offload", "none"]
Spread = Literal["auto", "ulysses", "gather", "ring"]


class How(NamedTuple):
    """Every choice gives the same values.

    backend: splash (Pallas kernels of TPUs), tokamax (kernels of GPUs), xla (any device), auto: splash on a TPU where
    the rows fit it, else xla.
    context: how a row that is split over the mesh axis `context` is put together, see `model.attention.contexts`.
    platform: of the devices, for auto; None: JAX's own.
    interpret: run kernels without their device, slowly, to test them.
    """

    backend: Backend = "auto"
    context: Spread = "auto"
    platform: str | None = None
    interpret: bool = False
