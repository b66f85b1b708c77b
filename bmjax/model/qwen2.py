"""Qwen2 in Flax linen, used as pure functions over a nested dictionary of parameters.

Shapes, names and initializers come from the parameter table (spec.py), and so does which linear layers have a bias.
Layers are stacked and scanned over, so the program's size does not grow with depth. Generation reads every weight for
every token: it takes the layers one by one (`unstack`), so that none is copied out of its stack.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from bmjax.model import loss, ops, rope, spec
from bmjax.model import remat as checkpointed
from bmjax.model.attention.dispatch import causal_attention
from bmjax.model.attention.options import AttentionOptions, Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.embedding import lookup
from bmjax.model.spec import Param
from bmjax.parallel.mesh import constrain, sharding

Params = dict[str, Any]
NO_WINDOW = 2**30


# Called with the new tokens' q [B, T, N, H], k and v [B, T, K, H], the layer's window (None: none) and its cache.
# Returns the attention [B, T, N, H] and the cache with the tokens in it.
Attend = Callable[[Array, Array, Array, int | None, Any], tuple[Array, Any]]


class Context(NamedTuple):
    """What every layer reads besides the hidden states."""

    cos: Array
    sin: Array
    segment_ids_BT: Array
    attend: Attend | None  # how new tokens attend to a cache; None: rows attend within themselves


@lru_cache(maxsize=64)
def _rows_by_name(config: ModelConfig) -> dict[str, Param]:
    return {row.name: row for row in spec.table(config)}


def _initial(row: Param, config: ModelConfig, key: Array, shape: tuple[int, ...]) -> Array:
    if row.init == "normal":
        return jax.random.normal(key, shape, jnp.float32) * config.initializer_range
    return jnp.zeros(shape, jnp.float32) if row.init == "zeros" else jnp.ones(shape, jnp.float32)


class _Module(nn.Module):
    config: ModelConfig


def _parameter(module: _Module, name: str) -> Array:
    """Return a module's parameter `name`: the table's row of that path, or one layer of a stacked row."""
    row = _rows_by_name(module.config)[_table_name(module, name)]
    shape = row.shape[1:] if row.stacked else row.shape
    return module.param(name, lambda key: _initial(row, module.config, key, shape))


def _table_name(module: _Module, name: str) -> str:
    """Return the name of a parameter in the table, where the layers have no numbers."""
    return re.sub(r"^layers_\d+/", "layers/", "/".join((*module.path, name)))


class RMSNorm(_Module):
    """Root-mean-square normalization (arXiv 1910.07467), computed in float32."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale = _parameter(self, "scale")
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        return scale.astype(x_BTD.dtype) * x.astype(x_BTD.dtype)


class Linear(_Module):
    """x @ kernel, plus a bias where the table has a row for it."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = ops.matmul(x, _parameter(self, "kernel").astype(x.dtype))
        has_bias = _table_name(self, "bias") in _rows_by_name(self.config)
        return y + _parameter(self, "bias").astype(x.dtype) if has_bias else y


class Attention(_Module):
    """Grouped-query attention with rotary positions: within rows, or of new tokens to a cache."""

    attention_options: AttentionOptions

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, window, cache: Any) -> tuple[Array, Any]:
        c = self.config
        B, T, _ = x_BTD.shape

        def project(letter: str, heads: int) -> Array:
            y = Linear(c, name=letter)(x_BTD)
            return constrain(y.reshape(B, T, heads, c.head_dim), "batch", "length", "heads", None)

        q = rope.rotate(project("q", c.num_heads), ctx.cos, ctx.sin)
        k = rope.rotate(project("k", c.num_kv_heads), ctx.cos, ctx.sin)
        v = project("v", c.num_kv_heads)
        if ctx.attend is None:
            out = causal_attention(q, k, v, ctx.segment_ids_BT, window, self.attention_options)
        else:
            out, cache = ctx.attend(q, k, v, window, cache)
        out = out.reshape(B, T, c.num_heads * c.head_dim)
        return Linear(c, name="o")(out), cache


class MLP(_Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        gate = Linear(self.config, name="gate")(x_BTD)
        up = Linear(self.config, name="up")(x_BTD)
        h_BTF = constrain(ops.swiglu(gate, up), "batch", "length", "mlp")
        return Linear(self.config, name="down")(h_BTF)


class Layer(_Module):
    """One layer: attention and MLP, each after a norm and with a residual."""

    attention_options: AttentionOptions

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, window, cache: Any = None) -> tuple[Array, Any]:
        x_BTD = checkpoint_name(x_BTD, checkpointed.LAYER_INPUT)
        normed = RMSNorm(self.config, name="attention_norm")(x_BTD)
        out, cache = Attention(self.config, self.attention_options, name="attention")(normed, ctx, window, cache)
        x_BTD = constrain(x_BTD + out, "batch", "length", None)
        normed = RMSNorm(self.config, name="mlp_norm")(x_BTD)
        return constrain(x_BTD + MLP(self.config, name="mlp")(normed), "batch", "length", None), cache


class Embedding(_Module):
    """The embedding's rows of tokens."""

    @nn.compact
    def __call__(self, tokens_BT: Array) -> Array:
        return lookup(_parameter(self, "embedding"), tokens_BT)


class Qwen2(_Module):
    """Tokens to final hidden states [B, T, D] in `dtype`; `head_weight` turns those into logits.

    segment_ids_BT: int32, 1.. per document, 0 for padding; None: a row is one document. positions_BT: int32; None: they
    count from 0 in every document. caches, attend: a cache for every layer and how new tokens attend to it; the
    parameters are then those of `unstack`, and the caches are returned with the tokens in them. remat: what layers keep
    for the backward pass, see `model.remat`. unroll: layers per scan iteration (a small model on a CPU is faster with
    all of them). Parameters of the head are not looked at.
    """

    dtype: Any = jnp.float32
    remat: Remat = "none"
    unroll: int = 1
    attention_options: AttentionOptions = AttentionOptions()

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        segment_ids_BT: Array | None,
        positions_BT: Array | None,
        caches: Sequence[Any] | None = None,
        attend: Attend | None = None,
    ) -> tuple[Array, list[Any] | None]:
        c = self.config
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = default_positions(segment_ids_BT)
        x_BTD = constrain(Embedding(c, name="embed")(tokens_BT).astype(self.dtype), "batch", "length", None)
        cos, sin = rope.tables(c.rope, c.head_dim, c.max_length, positions_BT)
        ctx = Context(cos, sin, segment_ids_BT, attend)
        if caches is None:
            windows = [NO_WINDOW if w is None else w for w in c.windows]
            stack = nn.scan(
                checkpointed.remat(Layer, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.num_layers,
                in_axes=(nn.broadcast, 0),
                unroll=min(self.unroll, c.num_layers),
            )
            layers = stack(c, self.attention_options, name="layers")
            x_BTD, _ = layers(x_BTD, ctx, jnp.array(windows, jnp.int32) if c.uses_windows else None)
            return RMSNorm(c, name="final_norm")(x_BTD), None
        # Computed once: XLA would compute the cosines again in every head of every layer that reads them.
        cos, sin = jax.lax.optimization_barrier((cos, sin))
        ctx = ctx._replace(cos=cos, sin=sin)
        updated = []
        for i, cache in enumerate(caches):
            layer = Layer(c, self.attention_options, name=f"layers_{i}")
            x_BTD, cache = layer(x_BTD, ctx, c.windows[i] if c.windows else None, cache)
            updated.append(cache)
        return RMSNorm(c, name="final_norm")(x_BTD), updated


def unstack(config: ModelConfig, params: Params, dtype: Any, mesh: Mesh | None = None) -> Params:
    """Return the parameters in `dtype`, every layer's arrays apart as `layers_0`, `layers_1`, ..., on `mesh`."""
    return _unstacking(config, str(jnp.dtype(dtype)), mesh)(params)


@lru_cache(maxsize=64)
def _unstacking(config: ModelConfig, dtype_name: str, mesh: Mesh | None) -> Callable[[Params], Params]:
    shardings = []
    for row in spec.table(config):
        shape, axes = (row.shape[1:], row.axes[1:]) if row.stacked else (row.shape, row.axes)
        target = None if mesh is None else sharding(mesh, axes, shape)
        paths = [(f"layers_{i}", *row.path[1:]) for i in range(config.num_layers)] if row.stacked else [row.path]
        shardings += [(path, target) for path in paths]

    def split(params: Params) -> Params:
        leaves: list[tuple[tuple[str, ...], Array]] = []
        for row in spec.table(config):
            array = spec.get(params, row.path).astype(dtype_name)
            if row.stacked:
                leaves += [((f"layers_{i}", *row.path[1:]), array[i]) for i in range(config.num_layers)]
            else:
                leaves.append((row.path, array))
        return spec.unflatten(leaves)

    return jax.jit(split, out_shardings=None if mesh is None else spec.unflatten(shardings))


def init(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """Draw random float32 parameters as the table says; every leaf is made with its sharding on `mesh`."""
    rows = spec.table(config)

    def build(key: Array) -> list[Array]:
        keys = jax.random.split(key, len(rows))
        return [_initial(row, config, key, row.shape) for row, key in zip(rows, keys, strict=True)]

    shardings = None if mesh is None else [sharding(mesh, row.axes, row.shape) for row in rows]
    leaves = jax.jit(build, out_shardings=shardings)(jax.random.key(seed))
    return spec.unflatten(zip((row.path for row in rows), leaves, strict=True))


def default_positions(segment_ids_BT: Array) -> Array:
    """Count positions 0, 1, 2, ... along each row, int32 [B, T], restarting where the segment id changes."""
    return jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :] - ops.document_starts(segment_ids_BT)


def head_weight(config: ModelConfig, params: Params) -> Array:
    """Return the matrix [D, V] from hidden states to logits: the embedding's transpose when it is tied."""
    return params["embed"]["embedding"].T if config.tied else params["lm_head"]["kernel"]


def logits(model: Qwen2, params: Params, tokens_BT: Array, segments_BT: Any = None, positions_BT: Any = None) -> Array:
    """Compute logits [B, T, V] in float32; arguments as of `Qwen2`."""
    h_BTD, _ = model.apply({"params": params}, tokens_BT, segments_BT, positions_BT)
    w_DV = head_weight(model.config, params).astype(model.dtype)
    return jnp.einsum("btd,dv->btv", h_BTD, w_DV, preferred_element_type=jnp.float32)


def loss_sum(model: Qwen2, params: Params, batch: Batch[Array], positions_BT: Any = None) -> tuple[Array, Array]:
    """Compute the summed next-token loss in nats over a batch's targets, and their number; both float32 scalars."""
    h_BTD, _ = model.apply({"params": params}, batch.tokens, batch.segment_ids, positions_BT)
    labels, mask = loss.next_token_targets(batch)
    w_DV = head_weight(model.config, params).astype(model.dtype)
    return loss.cross_entropy_sum(h_BTD, w_DV, labels, mask), jnp.sum(mask)
