"""The choice of the next token: repetition penalty, temperature, top-k, top-p, min-p, and log-probabilities.

In the order of transformers' processors. Every row of a batch has its own settings, so one compiled program serves all
of them; what no row uses is skipped while it runs. The engine's decode program calls `penalize`, `choose` and `report`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.config import UserError
from bmjax.generate.requests import Sampling

MOST_LIKELIEST = 20  # tokens that are reported in each place, as OpenAI's API has it


class Rows(NamedTuple):
    """Every row's settings, [B] each."""

    temperature: Any  # float32, as top_p, min_p and penalty
    top_p: Any
    min_p: Any
    penalty: Any
    top_k: Any  # int32, as sample and drawn
    sample: Any
    drawn: Any  # tokens of the answer so far
    seed: Any  # uint32


class Used(NamedTuple):
    """What any row uses, bool scalars: the rest is skipped."""

    sampling: Any
    filters: Any  # top_k, top_p or min_p
    logprobs: Any
    penalty: Any


def check(sampling: Sampling, scoring: bool = False) -> None:
    """Raise UserError for settings that mean nothing; scoring: no new token is needed."""
    least = 0 if scoring else 1
    rules = {
        "max_new_tokens": (sampling.max_new_tokens >= least, f"at least {least}"),
        "temperature": (0 <= sampling.temperature < float("inf"), "a number from 0 on"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
        "top_k": (sampling.top_k >= 0, "at least 0 (0: all tokens)"),
        "min_p": (0 <= sampling.min_p <= 1, "in [0, 1]"),
        "repetition_penalty": (0 < sampling.repetition_penalty < float("inf"), "above 0 (1: none)"),
        "logprobs": (
            sampling.logprobs is None or 0 <= sampling.logprobs <= MOST_LIKELIEST, f"in 0..{MOST_LIKELIEST}, or none"
        ),
    }  # fmt: skip
    for name, (fits, expected) in rules.items():
        if not fits:
            raise UserError(f"{name} is {getattr(sampling, name)}; expected {expected}")


def penalize(z_BV: Array, seen_BV: Array, penalty_B: Array) -> Array:
    """Divide the positive logits of tokens that were seen by the penalty, multiply the negative (arXiv 1909.05858)."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(z_BV > 0, z_BV / penalty_B1, z_BV * penalty_B1), z_BV)


def choose(z_BV: Array, rows: Rows, step: Array, used: Used) -> Array:
    """Choose a token of every row, int32 [B], from logits float32 [B, V].

    A row's random numbers come from its seed, its sample's number and how many tokens it has (drawn + step), whoever
    shares the batch: jax.random.fold_in of one after the other, and a Gumbel number for each token.
    """
    likeliest_B = _argmax(z_BV)

    def draw(z_BV: Array) -> Array:
        is_greedy_B = rows.temperature == 0
        z_BV = z_BV / jnp.where(is_greedy_B, 1.0, rows.temperature)[:, None]
        z_BV = jax.lax.cond(used.filters, lambda z: filtered(z, rows), lambda z: z, z_BV)

        def one_row(z_V: Array, seed: Array, sample: Array, drawn: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), drawn + step)
            return z_V + jax.random.gumbel(key, z_V.shape)  # jax.random.categorical's

        drawn_B = _argmax(jax.vmap(one_row)(z_BV, rows.seed, rows.sample, rows.drawn))
        return jnp.where(is_greedy_B, likeliest_B, drawn_B)

    return jax.lax.cond(used.sampling, draw, lambda z: likeliest_B, z_BV)


def _argmax(z_BV: Array) -> Array:
    """Return the first largest element's index, int32 [B]; jnp.argmax takes six times as long on a CPU."""
    largest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    indices_BV = jnp.where(z_BV == largest_B1, jnp.arange(z_BV.shape[1], dtype=jnp.int32), z_BV.shape[1] - 1)
    return jnp.min(indices_BV, axis=-1)


def filtered(z_BV: Array, rows: Rows) -> Array:
    """Put -inf in place of the logits that top_k, top_p and min_p leave out; ties with the last that is kept stay."""
    order_BV = _sortable(z_BV)
    k_B = jnp.where(rows.top_k > 0, rows.top_k, z_BV.shape[1]).astype(jnp.float32)
    kept_BV = order_BV >= _threshold(order_BV, jnp.ones_like(z_BV), k_B)[:, None]
    z_BV = jnp.where(kept_BV, z_BV, -jnp.inf)
    # The least set of tokens whose probability reaches top_p (arXiv 1904.09751).
    p_BV = jax.nn.softmax(z_BV, axis=-1)
    nucleus_BV = order_BV >= _threshold(order_BV, p_BV, rows.top_p)[:, None]
    z_BV = jnp.where(nucleus_BV | (rows.top_p >= 1)[:, None], z_BV, -jnp.inf)
    # At least min_p of the likeliest token's probability (arXiv 2407.01082).
    return jnp.where(p_BV >= jnp.max(p_BV, axis=-1, keepdims=True) * rows.min_p[:, None], z_BV, -jnp.inf)


def _sortable(z: Array) -> Array:
    """Return uint32 numbers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_BV: Array, weight_BV: Array, target_B: Array) -> Array:
    """Return the largest number [B] such that the elements from it on weigh at least the target, or 0.

    Bit by bit from the highest: 32 sums instead of sorting the vocabulary, which is slow on every device.
    """

    def add_bit(i: Array, found_B: Array) -> Array:
        candidate_B = found_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(order_BV >= candidate_B[:, None], weight_BV, 0.0), axis=-1)
        return jnp.where(weight_B >= target_B, candidate_B, found_B)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(order_BV.shape[0], jnp.uint32))


def report(z_BV: Array, token_B: Array) -> tuple[Array, Array, Array]:
    """Return the log-probability of each row's token [B], the likeliest tokens, best first, and theirs, [B, M] each."""
    log_total_B = jax.nn.logsumexp(z_BV, axis=-1)
    best_BM, ids_BM = jax.lax.top_k(z_BV, min(MOST_LIKELIEST, z_BV.shape[1]))
    token_z_B = jnp.take_along_axis(z_BV, token_B[:, None], axis=-1)[:, 0]
    return token_z_B - log_total_B, ids_BM.astype(jnp.int32), best_BM - log_total_B[:, None]
