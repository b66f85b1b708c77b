"""The compiled programs of generation: a prompt's first chunk, a later chunk, several next tokens, a prompt's score.

They are made once for a configuration and compiled by shape. Parameters are arguments: models of one shape share them.
The engine calls them. Letters: B rows of the cache, R rows of a prefill, T tokens of a chunk, W tokens of a call.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.generate import sampling
from bmjax.generate.cache import Cache, append
from bmjax.model import qwen2
from bmjax.model.attention import cached, paged
from bmjax.model.attention.dispatch import causal_attention
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import constrain

PACKED = 16  # prompts that are read together in a row, at most
SCORED = 64  # tokens of a prompt whose logits are held at once


class Programs(NamedTuple):
    """Jitted functions; each one's docstring is below."""

    first_chunk: Any
    next_chunk: Any
    decode: Any
    score: Any


class Drawn(NamedTuple):
    """What a decode call returns of every row: tokens int32 [W, B], log-probabilities [W, B], likeliest [W, B, M]."""

    tokens: Array
    logprobs: Array
    likeliest: Array
    likeliest_logprobs: Array


@lru_cache(maxsize=64)
def programs(
    config: ModelConfig, dtype_name: str, quantized: bool, tokens_per_call: int, kernel: paged.Kernel, columns: bool
) -> Programs:
    """Return the programs of a configuration.

    dtype_name: of the computation. quantized: the cache holds int8. tokens_per_call: the most that `decode` draws.
    kernel: of its attention, see `paged.choose`. columns: how keys lie in the cache, see `Slots`.
    """
    dtype, is_paged = jnp.dtype(dtype_name), kernel != "xla"
    W = tokens_per_call
    model = qwen2.Qwen2(config, dtype, attention_options=AttentionOptions(documents=PACKED + 1))

    def logits(weights: Any, h_XD: Array) -> Array:
        w_DV = qwen2.head_weight(config, weights)
        return jnp.einsum("xd,dv->xv", h_XD, w_DV, preferred_element_type=jnp.float32)

    def run(weights: Any, tokens_BT: Array, positions_BT: Array, caches: list[Any], attend: qwen2.Attend) -> Any:
        """Return hidden states [B, T, D] and the caches that `attend` returns."""
        return model.apply({"params": weights}, tokens_BT, None, positions_BT, caches, attend)

    def first_chunk(weights: Any, tokens_RT: Array, segments_RT: Array, positions_RT: Array) -> tuple[Array, Cache]:
        """Read the beginnings of prompts, packed as documents; returns hidden states [R, T, D], keys and values."""

        def attend(q, k, v, window, _):
            limit = None if window is None else jnp.int32(window)
            out = causal_attention(q, k, v, segments_RT, limit, model.attention_options)
            return out, cached.pack(k, v, dtype, quantized, columns)

        none = [None] * config.num_layers
        return run(weights, tokens_RT, positions_RT, none, attend)

    def next_chunk(weights: Any, row: Cache, tokens_1T: Array, start: Array) -> tuple[Array, Cache]:
        """Read on in one prompt, of which `row` holds the first `start` tokens; returns as `first_chunk`."""

        def attend(q, k, v, window, slots):
            return cached.next_chunk(q, k, v, slots, start, window, columns), cached.pack(
                k, v, dtype, quantized, columns
            )

        positions_1T = start + jnp.arange(tokens_1T.shape[1])[None, :]
        return run(weights, tokens_1T, positions_1T, row, attend)

    def decode(
        weights: Any,
        cache: Cache,
        h_BD: Array,
        lengths_B: Array,
        rows: sampling.Rows,
        seen_BV: Array,
        steps: Array,
        used: sampling.Used,
    ) -> tuple[Cache, Array, Drawn]:
        """Draw the next `steps` tokens of every row, at most W.

        h_BD: the hidden state of every row's last token. lengths_B: how many tokens of each are in the cache. seen_BV:
        the tokens in each row so far, looked at where a row has a repetition penalty. Returns the cache with the
        tokens in it, the new hidden states and what was drawn; for rows that are not in use, nonsense.
        """
        B, V = h_BD.shape[0], config.vocab_size
        M = min(sampling.MOST_LIKELIEST, V)
        lengths_B = constrain(lengths_B, "batch")
        rows = jax.tree.map(lambda x: constrain(x, "batch"), rows)
        drawn = Drawn(
            jnp.zeros((W, B), jnp.int32), jnp.zeros((W, B)), jnp.zeros((W, B, M), jnp.int32), jnp.zeros((W, B, M))
        )

        def advance(step: Array, carry: Any) -> Any:
            h_BD, caches, seen_BV, drawn = carry
            # Choose a token from the logits of the last one.
            z_BV = logits(weights, h_BD)
            penalized_BV = jax.lax.cond(
                used.penalty, lambda z, seen: sampling.penalize(z, seen, rows.penalty), lambda z, _: z, z_BV, seen_BV
            )
            token_B = sampling.choose(penalized_BV, rows, step, used)
            seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
            nothing = (jnp.zeros(B), jnp.zeros((B, M), jnp.int32), jnp.zeros((B, M)))
            reported = jax.lax.cond(used.logprobs, sampling.report, lambda *_: nothing, z_BV, token_B)
            put = jax.lax.dynamic_update_index_in_dim
            drawn = Drawn(*(put(old, x, step, 0) for old, x in zip(drawn, (token_B, *reported), strict=True)))

            # Run it through the model.
            def attend(q, k, v, window, layer_cache):
                new = cached.pack(k, v, dtype, quantized, columns)
                if is_paged:
                    slots = append(layer_cache, new, lengths_B + step, columns)
                    return paged.next_tokens(kernel, q, slots, lengths_B + step + 1), slots
                slots, recent = layer_cache
                recent = cached.each(
                    lambda axis, x, n: jax.lax.dynamic_update_slice_in_dim(x, n, step, axis), columns, recent, new
                )
                return cached.next_tokens(q, slots, recent, lengths_B, step, window, columns), (slots, recent)

            positions_B1 = (lengths_B + step)[:, None]
            h_B1D, caches = run(weights, token_B[:, None], positions_B1, caches, attend)
            return h_B1D[:, 0], caches, seen_BV, drawn

        # A kernel reads the cache alone. The plain form reads the tokens of this call apart; they are appended last.
        caches: list[Any] = cache
        if not is_paged:
            zeros = jnp.zeros((B, W, config.num_kv_heads, config.head_dim), dtype)
            empty = cached.on_mesh(cached.pack(zeros, zeros, dtype, quantized, columns))
            caches = [(slots, empty) for slots in cache]
        h_BD, caches, _, drawn = jax.lax.fori_loop(0, steps, advance, (h_BD, caches, seen_BV, drawn))
        if not is_paged:
            caches = [append(slots, recent, lengths_B, columns) for slots, recent in caches]
        return caches, constrain(h_BD, "batch", None), drawn

    def score(weights: Any, h_RTD: Array, row: Array, targets_T: Array) -> tuple[Array, Array, Array]:
        """Return of one row's targets the log-probability [T], the likeliest tokens [T, M] and theirs [T, M].

        SCORED tokens' logits at a time.
        """
        h_TD = jax.lax.dynamic_index_in_dim(h_RTD, row, keepdims=False)
        size = min(SCORED, h_TD.shape[0])
        parts = (h_TD.reshape(-1, size, h_TD.shape[1]), targets_T.reshape(-1, size))
        out = jax.lax.map(lambda part: sampling.report(logits(weights, part[0]), part[1]), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return Programs(jax.jit(first_chunk), jax.jit(next_chunk), jax.jit(decode, donate_argnums=(1, 2)), jax.jit(score))
