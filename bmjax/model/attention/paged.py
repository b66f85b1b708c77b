"""Attention of every row's next token by JAX's paged kernels, which read only the pages in use. For TPUs and GPUs.

A slot of the cache is a run of pages, so the table of pages is a count. The engine's decode program calls it where
`choose` names a kernel; cached.py is the same in plain XLA. Off their devices the kernels are interpreted, for tests.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.config import UserError
from bmjax.model.attention.cached import Slots
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, on_each_device

Kernel = Literal["auto", "tpu", "gpu", "xla"]

PAGE = 64  # tokens; a slot's length is a multiple of two of them
AT_ONCE = 8  # pages that a kernel reads together, at most
LANES = 128  # of a TPU's registers


def refuses(name: Kernel, config: ModelConfig, dtype: Any, quantized: bool) -> str | None:
    """Return why a kernel cannot compute a model's attention; None where it can."""
    if config.uses_windows:
        return "knows no sliding window"
    if name == "tpu" and config.head_dim % LANES:
        return f"needs heads of a multiple of {LANES}, not {config.head_dim}"
    if name == "tpu" and jnp.dtype(dtype) != jnp.bfloat16:
        return f"rounds keys and values to bfloat16, and the model computes in {jnp.dtype(dtype).name}"
    if name == "tpu" and quantized:
        return "makes a float32 of every int8's scale, which takes more memory than it saves"
    if name == "gpu" and (config.head_dim < 16 or config.head_dim & (config.head_dim - 1)):
        return f"needs heads of a power of two from 16 on, not {config.head_dim}"
    return None


def choose(name: Kernel, config: ModelConfig, dtype: Any, quantized: bool) -> tuple[Kernel, str | None]:
    """Return the kernel to use on JAX's default device, and why it is not the device's own, where it is not.

    name: auto, or the one that is asked for. UserError where that one cannot compute the model's attention.
    """
    platform = jax.default_backend()
    if name == "xla" or (name == "auto" and platform not in ("tpu", "gpu")):
        return "xla", None
    kernel: Kernel = name if name != "auto" else "tpu" if platform == "tpu" else "gpu"
    reason = refuses(kernel, config, dtype, quantized)
    if reason and name != "auto":
        raise UserError(f"attention: the {name} kernel {reason}; use auto or xla")
    if reason is None and name == "auto":
        # The kernels are experimental, and some cards or releases of JAX refuse them only when they are compiled.
        try:
            q = jax.ShapeDtypeStruct((2, 1, config.num_heads, config.head_dim), dtype)
            kv = jax.ShapeDtypeStruct((config.num_kv_heads, 2, 4 * PAGE, config.head_dim), dtype)
            lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
            attend = jax.jit(lambda q, k, v, lengths: next_tokens(kernel, q, Slots(k, v), lengths))
            attend.lower(q, kv, kv, lengths).compile()
        except Exception as error:
            reason = f"does not compile here ({type(error).__name__})"
    return ("xla", f"the {kernel} kernel {reason}") if reason else (kernel, None)


def next_tokens(kernel: Kernel, q_B1NH: Array, slots: Slots, lengths_B: Array) -> Array:
    """Compute attention [B, 1, N, H] of a token of every row to the first `lengths_B` tokens of its slot."""

    def local(q_B1NH: Array, slots: Slots, lengths_B: Array) -> Array:
        # q [B/(data fsdp), 1, N/tensor, H], slots [K/tensor, B/(data fsdp), S, H], lengths [B/(data fsdp)]
        q_BNH = (q_B1NH[:, 0] * q_B1NH.shape[-1] ** -0.5).astype(q_B1NH.dtype)
        K, B, S, _ = slots.k.shape
        a_row = S // PAGE
        pages = jax.tree.map(lambda x: x.reshape(K, B * a_row, PAGE, x.shape[-1]), slots)
        table = jnp.arange(B * a_row, dtype=jnp.int32).reshape(B, a_row)
        return _KERNELS[kernel](q_BNH, pages, lengths_B, table)[:, None]

    mesh = mesh_in_scope()
    if mesh is None:
        return local(q_B1NH, slots, lengths_B)
    kv_spec = jax.tree.map(lambda x: fitting_spec(mesh, ("kv_heads", "batch", None, None), x.shape), slots)
    # Query heads are split as their key/value heads are.
    q_spec = fitting_spec(mesh, ("batch", None, None, None), q_B1NH.shape)
    q_spec = type(q_spec)(q_spec[0], None, kv_spec.k[0], None)
    rows = fitting_spec(mesh, ("batch",), lengths_B.shape)
    return on_each_device(local, (q_spec, kv_spec, rows), q_spec)(q_B1NH, slots, lengths_B)


def _tpu(q_BNH: Array, pages: Slots, lengths_B: Array, table: Array) -> Array:
    # Not at the top: Pallas takes a fifth of a second to load.
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    at_once = min(AT_ONCE, table.shape[1] & -table.shape[1])
    return paged_attention(q_BNH, pages.k, pages.v, lengths_B, table, pages_per_compute_block=at_once)


def _gpu(q_BNH: Array, pages: Slots, lengths_B: Array, table: Array) -> Array:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    splits = min(16, table.shape[1] & -table.shape[1])
    a_split = table.shape[1] // splits
    scales = [None if x is None else x[..., 0] for x in (pages.k_scales, pages.v_scales)]
    return paged_attention(
        q_BNH, pages.k, pages.v, table, lengths_B, *scales, k_splits=splits,
        pages_per_compute_block=min(AT_ONCE, a_split & -a_split), interpret=jax.default_backend() != "gpu",
    )  # fmt: skip


_KERNELS: dict[str, Any] = {"tpu": _tpu, "gpu": _gpu}
