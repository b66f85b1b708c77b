"""Attention on a mesh: batches over data and fsdp, heads over tensor, and rows that are split over context.

Each device runs its kernel on whole rows, or tiles on parts of them, inside `shard_map` (kernels have no start that
differs by device, nor a gradient for the log-sum). Three ways to put a split row together:

- ulysses (arXiv 2309.14509): heads are exchanged for tokens, so that a device has whole rows of fewer heads, and any
  kernel will do. Key/value heads are repeated where there are fewer of them than devices.
- gather: a device keeps its queries and gathers all keys and values (few under grouped-query attention).
- ring (arXiv 2310.01889): keys and values go round; partial results are joined by their log-sums. A row's devices
  wait for the last one, which sees most. For more devices than there are heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bmjax.config import UserError
from bmjax.model.attention import tiles
from bmjax.model.attention.options import Spread
from bmjax.parallel.mesh import fitting_spec, mesh_in_scope

AXIS = "context"
Whole = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]  # q, k, v, segments, window


def spread(
    whole: Whole, how: Spread, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array,
    window: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Attention [B, T, N, H] on the mesh in scope; see `causal_attention`. whole: attention of whole rows."""
    mesh = mesh_in_scope()
    if mesh is None:
        return whole(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)
    batch, length, heads, _ = q_spec = fitting_spec(mesh, ("batch", "length", "heads", None), q_BTNH.shape)
    tensor = mesh.shape["tensor"] if heads else 1
    ways = mesh.shape[AXIS] if length else 1
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    if how == "auto":
        # Repeating a few key/value heads is cheaper than waiting for a ring's slowest device.
        how = "ulysses" if N % (tensor * ways) == 0 else "ring"
    if how == "ulysses" and N % (tensor * ways):
        raise UserError(
            f"context: ulysses gives each of tensor x context = {tensor * ways} devices a share of the heads, and "
            f"there are {N}; change mesh, or use ring or gather"
        )
    least = tensor * ways if how == "ulysses" else tensor
    repeat = math.lcm(K, least) // K
    if repeat > 1:
        k_BTKH, v_BTKH = (jnp.repeat(x, repeat, axis=2) for x in (k_BTKH, v_BTKH))
    limit = () if window is None else (jnp.int32(window),)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *limit: jax.Array) -> jax.Array:
        window = limit[0] if limit else None
        return _WAYS[how](whole, q, k, v, segments, window) if ways > 1 else whole(q, k, v, segments, window)

    segment_spec = PartitionSpec(batch, length)
    run = jax.shard_map(
        local, in_specs=(q_spec, q_spec, q_spec, segment_spec, *[PartitionSpec()] * len(limit)), out_specs=q_spec,
        check_vma=False,
    )  # fmt: skip
    return run(q_BTNH, k_BTKH, v_BTKH, segments_BT, *limit)


def _gathered(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, AXIS, axis=1, tiled=True)


def _ulysses(whole: Whole, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: Any) -> jax.Array:
    q, k, v = (lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    out = whole(q, k, v, _gathered(segments), window)
    return lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)


def _gather(whole: Whole, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: Any) -> jax.Array:
    start = lax.axis_index(AXIS) * q.shape[1]
    return tiles.attention(q, _gathered(k), _gathered(v), segments, _gathered(segments), start, window)[0]


def _ring(whole: Whole, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: Any) -> jax.Array:
    ways, mine = lax.axis_size(AXIS), lax.axis_index(AXIS)
    onward = [(i, (i + 1) % ways) for i in range(ways)]
    length = q.shape[1]

    def seen(turn: jax.Array | int, k: jax.Array, v: jax.Array, k_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What comes from the keys that are here after so many turns: those of the device that many places back."""
        start = (mine - (mine - turn) % ways) * length
        out, lse = tiles.attention(q, k, v, segments, k_segments, start, window)
        return out.astype(jnp.float32), lse

    def go(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        out, lse, here = carry
        here = jax.tree.map(lambda x: lax.ppermute(x, AXIS, onward), here)
        more, more_lse = seen(turn, *here)
        both = jnp.logaddexp(lse, more_lse)
        out = out * jnp.exp(lse - both)[..., None] + more * jnp.exp(more_lse - both)[..., None]
        return (out, both, here), None

    here = (k, v, segments)
    (out, _, _), _ = lax.scan(go, (*seen(0, *here), here), jnp.arange(1, ways))
    return out.astype(q.dtype)


_WAYS = {"ulysses": _ulysses, "gather": _gather, "ring": _ring}
