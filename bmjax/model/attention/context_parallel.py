"""Attention on a mesh: batches over data and fsdp, heads over tensor, and rows that are split over context.

Each device runs its kernel on whole rows, or tiles on parts of them, inside `shard_map` (kernels have no start that
differs by device, nor a gradient for the log-sum). There are three ways to attend over a split row:

- ulysses (arXiv 2309.14509): devices exchange heads for tokens, so that each has whole rows of fewer heads, and any
  kernel will do. Key/value heads are repeated where there are fewer of them than devices.
- gather: a device keeps its queries and gathers all keys and values (few under grouped-query attention).
- ring (arXiv 2310.01889): keys and values go round the devices; partial results are joined by their log-sums. All
  devices of a row wait for the last one, which sees most. It works with more devices than there are heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from bmjax.config import UserError
from bmjax.model.attention import tiles
from bmjax.model.attention.options import Exchange
from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, on_each_device

AXIS = "context"
Kernel = Callable[..., Array]  # attention of whole rows on one device: q, k, v, segments, window


def spread(
    kernel: Kernel, exchange: Exchange, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, window: Any
) -> Array:
    """Compute attention [B, T, N, H] on the mesh in scope; UserError where ulysses cannot share out the heads."""
    mesh = mesh_in_scope()
    if mesh is None:
        return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)

    # Choose the exchange.
    batch, length, heads, _ = q_spec = fitting_spec(mesh, ("batch", "length", "heads", None), q_BTNH.shape)
    tensor = mesh.shape["tensor"] if heads else 1
    context = mesh.shape[AXIS] if length else 1
    shares, N, K = tensor * context, q_BTNH.shape[2], k_BTKH.shape[2]
    if exchange == "auto":
        # Repeating a few key/value heads is cheaper than waiting for a ring's slowest device.
        exchange = "ring" if N % shares else "ulysses"
    elif exchange == "ulysses" and N % shares:
        raise UserError(
            f"context: ulysses gives each of tensor x context = {shares} devices a share of the heads, and there are "
            f"{N}; change mesh, or use ring or gather"
        )

    # Repeat key/value heads until they divide among the devices.
    repeats = math.lcm(K, shares if exchange == "ulysses" else tensor) // K
    if repeats > 1:
        k_BTKH, v_BTKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKH, v_BTKH))
    window = None if window is None else jnp.int32(window)

    def local(q, k, v, segments, window) -> Array:
        # q [B/(data fsdp), T/context, N/tensor, H], k and v [B/(data fsdp), T/context, K/tensor, H]
        # segments [B/(data fsdp), T/context]
        if context == 1:
            return kernel(q, k, v, segments, window)
        return _EXCHANGES[exchange](kernel, q, k, v, segments, window)

    in_specs = (q_spec, q_spec, q_spec, PartitionSpec(batch, length), None if window is None else PartitionSpec())
    return on_each_device(local, in_specs, q_spec)(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)


# Below, local shapes leave out the batch and `tensor`, which split every array alike.


def _all_tokens(x: Array) -> Array:
    return lax.all_gather(x, AXIS, axis=1, tiled=True)  # [B, T/context, ...] -> [B, T, ...]


def _ulysses(kernel: Kernel, q, k, v, segments, window) -> Array:
    # q [B, T/context, N, H] -> [B, T, N/context, H]; k, v likewise
    q, k, v = (lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    out = kernel(q, k, v, _all_tokens(segments), window)  # [B, T, N/context, H]
    return lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)  # [B, T/context, N, H]


def _gather(kernel: Kernel, q, k, v, segments, window) -> Array:
    # q [B, T/context, N, H]; keys and values are gathered to [B, T, K, H]
    start = lax.axis_index(AXIS) * q.shape[1]
    return tiles.attention(q, _all_tokens(k), _all_tokens(v), segments, _all_tokens(segments), start, window)[0]


def _ring(kernel: Kernel, q, k, v, segments, window) -> Array:
    # q, out [B, T/context, N, H]; k, v [B, T/context, K, H]; lse [B, T/context, N]; segments [B, T/context]
    devices, device = lax.axis_size(AXIS), lax.axis_index(AXIS)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]
    length = q.shape[1]

    def attend(turn, k, v, k_segments) -> tuple[Array, Array]:
        # The keys that are here after `turn` turns are those of the device `turn` steps back.
        start = (device - (device - turn) % devices) * length
        out, lse = tiles.attention(q, k, v, segments, k_segments, start, window)
        return out.astype(jnp.float32), lse

    def advance(carry: Any, turn: Array) -> tuple[Any, None]:
        out, lse, block = carry
        # Pass keys and values on, attend to those that came, and join the results by their log-sums.
        block = jax.tree.map(lambda x: lax.ppermute(x, AXIS, to_next), block)
        block_out, block_lse = attend(turn, *block)
        joined_lse = jnp.logaddexp(lse, block_lse)
        out = out * jnp.exp(lse - joined_lse)[..., None] + block_out * jnp.exp(block_lse - joined_lse)[..., None]
        return (out, joined_lse, block), None

    block = (k, v, segments)
    (out, _, _), _ = lax.scan(advance, (*attend(0, *block), block), jnp.arange(1, devices))
    return out.astype(q.dtype)


_EXCHANGES = {"ulysses": _ulysses, "gather": _gather, "ring": _ring}
