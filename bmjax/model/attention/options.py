"""Names for how attention is computed and what a layer keeps. Settings read them: this module must not import JAX."""

from typing import Literal, NamedTuple

Backend = Literal["auto", "splash", "cudnn", "tokamax", "xla"]
Remat = Literal["full", "save_attention", "minimal", "offload", "none"]
Exchange = Literal["auto", "ulysses", "gather", "ring"]


class AttentionOptions(NamedTuple):
    """How attention is computed. All choices give the same numbers, at other speeds and on other devices.

    documents: the most documents that a row of the batches holds, padding counted as one. cudnn needs the number, and
    rows with more documents come out wrong. 0: unknown.
    """

    backend: Backend = "auto"  # splash: kernels of TPUs; cudnn, tokamax: of GPUs; xla: any device; see dispatch.py
    context: Exchange = "auto"  # of a row that the mesh axis `context` splits, see context_parallel.py
    platform: str | None = None  # of the devices; None: JAX's default. Kernels of another are interpreted, for tests
    documents: int = 0
