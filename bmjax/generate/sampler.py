"""Batched generation with a key/value cache: greedy, or temperature with nucleus (top-p) sampling.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. A row's random numbers
come from (seed, its number in the call), so its text does not depend on which rows share its batch. The Python
interface and evaluation call `generate`; this module knows token ids only, no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config import UserError
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import sharding

PREFILL = 512  # prompt tokens per pass, which bounds the scores held at once
BUCKET = 32  # prompt lengths are padded up to a multiple, so that few programs are compiled


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 64  # of a prompt
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # only the least set of tokens with this probability is sampled from
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """A prompt's new token ids without the end token, and why they end: 'stop' (end token) or 'length'."""

    tokens: tuple[int, ...]
    finish_reason: str


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch: int = 64,
    dtype: Any = jnp.float32,
) -> list[Generation]:
    """Continue every prompt (token ids), on the mesh in scope; return the generations in order.

    Where prompt and new tokens together reach the model's context, a generation ends there with 'length'. eos_ids: the
    tokens that end a generation. batch: rows at a time. dtype: of the computation. UserError for an empty prompt, one
    that fills the model's context, or a token id that the model lacks.
    """
    for number, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {number}")
    if sampling.max_new_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise UserError("generation: max_new_tokens must be at least 1, temperature at least 0, top_p in (0, 1]")
    results: dict[int, Generation] = {}
    # Prompts of like lengths share a batch.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    mesh = jax.sharding.get_mesh()
    row_shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    for start in range(0, len(order), batch):
        # Pad rows, prompts and new tokens to sizes that many batches share, and the rows to a multiple of the mesh's.
        members = order[start : start + batch]
        rows = min(1 << (len(members) - 1).bit_length(), batch)
        rows = -(-rows // row_shards) * row_shards
        length = _padded_length(max(len(prompts[i]) for i in members))
        room = [min(sampling.max_new_tokens, config.max_length - len(prompts[i])) for i in members]
        new = min(sampling.max_new_tokens, _padded_length(max(room)))
        tokens, pad = np.zeros((rows, length), np.int32), np.full(rows, length - 1, np.int32)
        numbers, limit = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for b, i in enumerate(members):
            pad[b], numbers[b] = length - len(prompts[i]), i
            tokens[b, pad[b] :], limit[b] = prompts[i], room[b]

        # Generate, and cut every row at its first end token.
        greedy, nucleus = sampling.temperature == 0, sampling.top_p < 1
        run = _compiled(config, new, greedy, nucleus, tuple(eos_ids), str(jnp.dtype(dtype)))
        arrays: Any = (tokens, pad, numbers, limit)
        if not mesh.empty:
            arrays = [jax.device_put(x, sharding(mesh, ("batch", None)[: x.ndim], x.shape)) for x in arrays]
        seed, temperature = np.uint32(sampling.seed & 0xFFFFFFFF), np.float32(sampling.temperature)
        out = np.asarray(run(params, *arrays, seed, temperature, np.float32(sampling.top_p)))
        for b, i in enumerate(members):
            ends = np.flatnonzero(np.isin(out[b, : room[b]], list(eos_ids)))
            stop, reason = (ends[0], "stop") if len(ends) else (room[b], "length")
            results[i] = Generation(tuple(int(t) for t in out[b, :stop]), reason)
    return [results[i] for i in range(len(prompts))]


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str) -> None:
    """Raise UserError, naming the prompt, unless the model can read it and has room for an answer."""
    if not len(prompt):
        raise UserError(f"{name}: empty; expected at least one token")
    if len(prompt) >= config.max_length:
        raise UserError(
            f"{name}: {len(prompt)} tokens, the model's context holds {config.max_length} with the answer; shorten it"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
        raise UserError(
            f"{name}: token id {low if low < 0 else high}, the model's vocabulary has 0..{config.vocab_size - 1}; "
            "tokenizer and model do not belong together"
        )


def _padded_length(length: int) -> int:
    step = BUCKET if length <= PREFILL else PREFILL
    return -(-length // step) * step


@lru_cache(maxsize=64)
def _compiled(
    config: ModelConfig, new: int, greedy: bool, nucleus: bool, eos_ids: tuple[int, ...], dtype_name: str
) -> Any:
    """Return the jitted function (params, prompts, ...) -> `new` tokens of every row, int32 [B, new].

    Its arguments: prompts [B, P] padded on the left by pad [B] tokens; numbers [B], the rows' in the call; limit [B],
    how many tokens a row may have; seed, temperature and top_p as scalars.
    """
    dtype = jnp.dtype(dtype_name)
    unroll = config.num_layers if config.num_layers <= 8 else 1
    model = qwen2.Qwen2(config, dtype, unroll=unroll)
    eos = jnp.array(eos_ids or (-1,), jnp.int32)

    @jax.jit
    def run(params: Any, prompts_BP, pad_B, numbers_B, limit_B, seed, temperature, top_p) -> jax.Array:
        B, P = prompts_BP.shape
        params = jax.tree.map(lambda a: a.astype(dtype), params)
        w_DV = qwen2.head_weight(config, params)
        cache = qwen2.empty_cache(config, jnp.arange(P + new)[None, :] >= pad_B[:, None], dtype)
        keys_B = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers_B)

        def forward(tokens_BT: jax.Array, cache: qwen2.Cache) -> tuple[jax.Array, qwen2.Cache]:
            slots = cache.next_slot + jnp.arange(tokens_BT.shape[1])
            positions = jnp.maximum(slots[None, :] - pad_B[:, None], 0)
            segments = jnp.ones_like(tokens_BT)
            out: Any = model.apply({"params": params}, tokens_BT, segments, positions, cache)
            h_BTD, cache = out
            z_BV = jnp.einsum("bd,dv->bv", h_BTD[:, -1], w_DV, preferred_element_type=jnp.float32)
            return z_BV, cache

        # Prefill: the prompts go through the model in pieces, the last of which gives the first logits.
        z_BV = jnp.zeros((B, config.vocab_size), jnp.float32)
        for start in range(0, P, PREFILL):
            z_BV, cache = forward(prompts_BP[:, start : start + PREFILL], cache)

        def choose(z_BV: jax.Array, step: jax.Array) -> jax.Array:
            if greedy:
                return jnp.argmax(z_BV, axis=-1).astype(jnp.int32)
            z_BV = z_BV / temperature
            if nucleus:
                # -inf outside the least set of tokens whose probability reaches top_p (arXiv 1904.09751).
                sorted_BV = jnp.flip(jnp.sort(z_BV, axis=-1), axis=-1)
                p_BV = jax.nn.softmax(sorted_BV, axis=-1)
                inside_BV = jnp.where(jnp.cumsum(p_BV, axis=-1) - p_BV < top_p, sorted_BV, jnp.inf)
                z_BV = jnp.where(z_BV >= jnp.min(inside_BV, axis=-1, keepdims=True), z_BV, -jnp.inf)
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
            return jax.vmap(jax.random.categorical)(step_keys, z_BV).astype(jnp.int32)

        def unfinished(carry: Any) -> jax.Array:
            return (carry[0] < new) & ~jnp.all(carry[3])

        def advance(carry: Any) -> Any:
            step, z_BV, out_BN, done_B, cache = carry
            token_B = jnp.where(done_B, eos[0], choose(z_BV, step))
            out_BN = jax.lax.dynamic_update_slice(out_BN, token_B[:, None], (0, step))
            done_B = done_B | jnp.isin(token_B, eos) | (step + 1 >= limit_B)
            z_BV, cache = forward(jnp.maximum(token_B, 0)[:, None], cache)
            return step + 1, z_BV, out_BN, done_B, cache

        # Decode: a token of every row at a time, until all rows have ended.
        out_BN = jnp.full((B, new), eos[0], jnp.int32)
        return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), z_BV, out_BN, limit_B == 0, cache))[2]

    return run
