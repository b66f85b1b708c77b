"""Causal attention in tiles, in plain XLA: for long rows where no kernel of the device is at hand.

FlashAttention (arXiv 2205.14135) as loops over tiles of queries and of keys. Nothing of the size of T x T is ever
built. A pair of tiles is visited only where some query sees some key of it, so packed rows of short documents cost
what their documents cost. The rows of a batch are computed one after another, since their documents differ.
Letters: R = G * t rows of one key/value head's G query heads in a tile, H head size, s keys of a tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bmjax.model import remat

MASKED = -1e30  # finite, so that a query that sees nothing stays free of NaN
QUERIES, KEYS = 256, 256  # of a tile
# Segments of padding: equal to no document's, nor to each other.
NO_QUERY, NO_KEY = -1, -2

einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    start: Array | int = 0,
    window: Array | None = None,
) -> tuple[Array, Array]:
    """Compute attention [B, T, N, H] in the dtype of `q`, and the log of the softmax's sum, float32 [B, T, N].

    A query sees the keys of its int32 segment at or before its position, and within the window. Both results can be
    differentiated; they are 0 and -1e30 for a query that sees nothing. start: position of the first query, counted
    from the first key; it may be negative or traced. window: int32 scalar: how many tokens a query sees, itself
    included; None: all.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    tile, keys = min(QUERIES, T), min(KEYS, S)
    q = _pad((q_BTNH * H**-0.5).astype(q_BTNH.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), 3, tile)
    k, v = (_pad(x.transpose(0, 2, 1, 3), 2, keys) for x in (k_BSKH, v_BSKH))
    q_segments = _pad(q_segments_BT, 1, tile, NO_QUERY)
    k_segments = _pad(k_segments_BS, 1, keys, NO_KEY)
    window = jnp.int32(2**30) if window is None else window
    out, lse = _attention((tile, keys), q, k, v, q_segments, k_segments, jnp.int32(start), window)
    out = out[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out, lse[:, :, :, :T].transpose(0, 3, 1, 2).reshape(B, T, N)


def _pad(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    widths = [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value) if any(after for _, after in widths) else x


def visits(tiles: tuple[int, int], q_segments_BT: Array, k_segments_BS: Array, start, window) -> tuple[Array, Array]:
    """Return the first tile of keys that each tile of queries has to visit, and the last plus one: int32 [B, tiles]."""
    tile, keys = tiles
    q = q_segments_BT.reshape(len(q_segments_BT), -1, 1, tile)
    k = k_segments_BS.reshape(len(k_segments_BS), 1, -1, keys)
    first = start + tile * jnp.arange(q.shape[1])[:, None]
    key = keys * jnp.arange(k.shape[2])
    near = (key < first + tile) & (key + keys > first - window + 1)
    # By their smallest and largest segments: exact where documents lie one after another, never too few otherwise.
    together = (q.min(-1) <= k.max(-1)) & (q.max(-1) >= k.min(-1))
    needed = near & together
    count = k.shape[2]
    low = jnp.argmax(needed, axis=-1)  # 0 where none is needed
    high = count - jnp.argmax(needed[..., ::-1], axis=-1)
    return low.astype(jnp.int32), jnp.where(jnp.any(needed, axis=-1), high, 0).astype(jnp.int32)


def _slice(x: Array, b: Array, start: Array, size: int, axis: int) -> Array:
    """Return row b of x, cut to `size` entries from `start` on along `axis`."""
    starts = [b, *(start if i == axis else jnp.int32(0) for i in range(1, x.ndim))]
    sizes = (1, *(size if i == axis else n for i, n in enumerate(x.shape[1:], 1)))
    return jax.lax.dynamic_slice(x, starts, sizes)[0]


def _rows_of_tiles(x: Array, B: int) -> Array:
    # [B * tiles, K, G, queries, ...] -> [B, K, G, T, ...]
    x = jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _grid(tiles: tuple[int, int], q_segments, k_segments, start, window):
    """Return the tiles of queries of all rows, and a function that computes the masked scores of a pair of tiles.

    A tile of queries: its row, its index there, and the range of tiles of keys that it visits, int32 [rows * tiles].
    """
    queries, keys = tiles
    low, high = visits(tiles, q_segments, k_segments, start, window)
    index, count = jnp.arange(low.size, dtype=jnp.int32), low.shape[1]

    def scores(q_KRH, k_KsH, b, i, j) -> Array:
        # float32 [K, R, s], of query tile i and key tile j of row b
        query = start + i * queries + jnp.arange(queries)[:, None]
        key = j * keys + jnp.arange(keys)[None, :]
        q_ids = _slice(q_segments, b, i * queries, queries, 1)
        k_ids = _slice(k_segments, b, j * keys, keys, 1)
        allowed = (key <= query) & (query - key < window) & (q_ids[:, None] == k_ids[None, :])
        # Computed once for all heads, not in the fused loop of every head: a CPU's vector units are the limit here.
        bias = jax.lax.optimization_barrier(jnp.where(allowed, 0.0, MASKED))
        s = einsum("krh,ksh->krs", q_KRH, k_KsH)
        K, R, _ = s.shape
        return (s.reshape(K, R // queries, queries, keys) + bias).reshape(K, R, keys)

    return (index // count, index % count, low.reshape(-1), high.reshape(-1)), scores


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles, q_BKGTH, k_BKSH, v_BKSH, q_segments, k_segments, start, window):
    return _forward(tiles, q_BKGTH, k_BKSH, v_BKSH, q_segments, k_segments, start, window)[0]


def _forward(tiles, q_BKGTH, k_BKSH, v_BKSH, q_segments, k_segments, start, window):
    B, K, G, T, H = q_BKGTH.shape
    query_tiles, scores = _grid(tiles, q_segments, k_segments, start, window)
    queries, keys = tiles
    R = G * queries

    def tile(_, query_tile):
        b, i, low, high = query_tile
        # q [K, R, H]: the tile's queries; the carry is the largest score [K, R, 1], the sum of exp(score - largest)
        # [K, R, 1], and the values summed with these weights [K, R, H].
        q = _slice(q_BKGTH, b, i * queries, queries, 3).reshape(K, R, H)

        def visit(j, carry):
            largest, total, out = carry
            k, v = (_slice(x, b, j * keys, keys, 2) for x in (k_BKSH, v_BKSH))
            s = scores(q, k, b, i, j)
            new_largest = jnp.maximum(largest, jnp.max(s, axis=-1, keepdims=True))
            p = jnp.exp(s - new_largest)
            scale = jnp.exp(largest - new_largest)
            out = out * scale + einsum("krs,ksh->krh", p.astype(v.dtype), v)
            return new_largest, total * scale + jnp.sum(p, axis=-1, keepdims=True), out

        nothing_seen = (jnp.full((K, R, 1), MASKED), jnp.zeros((K, R, 1)), jnp.zeros((K, R, H)))
        largest, total, out = jax.lax.fori_loop(low, high, visit, nothing_seen)
        # Divide by the sum. Where all keys were masked, sums are meaningless and the result is 0.
        seen = largest > 0.5 * MASKED
        out = jnp.where(seen, out / jnp.where(seen, total, 1.0), 0.0)
        lse = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), MASKED)
        return None, (out.reshape(K, G, queries, H).astype(q.dtype), lse.reshape(K, G, queries))

    # Scan the tiles of queries, and put their results together in the order of the rows.
    _, (out, lse) = jax.lax.scan(tile, None, query_tiles)
    out, lse = (checkpoint_name(_rows_of_tiles(x, B), remat.ATTENTION) for x in (out, lse))
    return (out, lse), (q_BKGTH, k_BKSH, v_BKSH, q_segments, k_segments, start, window, out, lse)


def _backward(tiles, saved, cotangents):
    q_BKGTH, k_BKSH, v_BKSH, q_segments, k_segments, start, window, out_BKGTH, lse_BKGT = saved
    d_out_BKGTH, d_lse_BKGT = cotangents
    B, K, G, T, H = q_BKGTH.shape
    query_tiles, scores = _grid(tiles, q_segments, k_segments, start, window)
    queries, keys = tiles
    R, dtype = G * queries, q_BKGTH.dtype
    # d s = p * (d p - delta), with the cotangent of the log-sum in delta.
    lse_BKGT = jnp.where(lse_BKGT > 0.5 * MASKED, lse_BKGT, 0.0)  # so that a query that sees nothing has a p of 0
    delta_BKGT = jnp.sum(d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1) - d_lse_BKGT

    def tile(carry, query_tile):
        b, i, low, high = query_tile
        q, do = (_slice(x, b, i * queries, queries, 3).reshape(K, R, H) for x in (q_BKGTH, d_out_BKGTH))
        do = do.astype(dtype)
        lse, delta = (_slice(x, b, i * queries, queries, 3).reshape(K, R, 1) for x in (lse_BKGT, delta_BKGT))
        # dq [K, R, H] is summed over the tiles of keys, dk and dv over the tiles of queries, too.

        def visit(j, carry):
            dq, dk_BKHS, dv_BKHS = carry
            k, v = (_slice(x, b, j * keys, keys, 2) for x in (k_BKSH, v_BKSH))
            s = scores(q, k, b, i, j)
            p = jnp.exp(s - lse)
            ds = (p * (einsum("krh,ksh->krs", do, v) - delta)).astype(dtype)
            offsets = (b, jnp.int32(0), jnp.int32(0), j * keys)

            def add_to_tile(sum_BKHS, term_KHs):
                old = jax.lax.dynamic_slice(sum_BKHS, offsets, (1, *term_KHs.shape))
                return jax.lax.dynamic_update_slice(sum_BKHS, old + term_KHs[None], offsets)

            dv_BKHS = add_to_tile(dv_BKHS, einsum("krh,krs->khs", do, p.astype(dtype)))
            dk_BKHS = add_to_tile(dk_BKHS, einsum("krh,krs->khs", q, ds))
            return dq + einsum("krs,ksh->krh", ds, k), dk_BKHS, dv_BKHS

        dq, *sums = jax.lax.fori_loop(low, high, visit, (jnp.zeros((K, R, H)), *carry))
        return tuple(sums), dq.reshape(K, G, queries, H).astype(dtype)

    # Keys are the last axis: a CPU's products then take p and ds untransposed.
    zeros = jnp.zeros((B, K, H, k_BKSH.shape[2]), jnp.float32)
    (dk, dv), dq = jax.lax.scan(tile, (zeros, zeros), query_tiles)
    dk, dv = dk.swapaxes(2, 3).astype(k_BKSH.dtype), dv.swapaxes(2, 3).astype(v_BKSH.dtype)
    return _rows_of_tiles(dq, B), dk, dv, None, None, None, None


_attention.defvjp(_forward, _backward)
