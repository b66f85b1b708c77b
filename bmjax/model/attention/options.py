"""How attention is computed and what is kept for the backward pass: names for settings, without JAX."""

from typing import Literal, NamedTuple

Backend = Literal["auto", "splash", "cudnn", "tokamax", "xla"]
Remat = Literal["full", "save_attention", "minimal", "offload", "none"]
Spread = Literal["auto", "ulysses", "gather", "ring"]


class How(NamedTuple):
    """Every choice gives the same values.

    backend: splash (Pallas kernels of TPUs), cudnn, tokamax (kernels of GPUs), xla (any device), auto: splash on a TPU
    and cudnn on a GPU where they can, else xla.
    context: how a row that is split over the mesh axis `context` is put together, see `model.attention.contexts`.
    platform: of the devices, for auto; None: JAX's own.
    interpret: run kernels without their device, slowly, to test them.
    documents: the most that a row of the batches holds, padding counted as one, which cudnn has to know; 0: not known.
        Rows with more come out wrong.
    """

    backend: Backend = "auto"
    context: Spread = "auto"
    platform: str | None = None
    interpret: bool = False
    documents: int = 0
