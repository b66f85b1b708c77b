"""The parts of a model as functions of their own: embedding, one layer, head. For who holds one layer at a time.

They compute what `qwen2.Qwen2` computes. Parameters are nested dictionaries as the table's, a layer's without the axis
over layers. Part 0 is the embedding, parts 1 to L are the layers, part L + 1 is the final norm with the head.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.model import loss, qwen2, rope, spec
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import EMBEDDING, Param
from bmjax.parallel.mesh import constrain

Tree = dict[str, Any]


def count(config: ModelConfig) -> int:
    """Return the number of parts."""
    return config.num_layers + 2


def name(config: ModelConfig, part: int) -> str:
    """Return a part's name for people."""
    return "embedding" if part == 0 else "head" if part > config.num_layers else f"layer {part - 1}"


def rows(config: ModelConfig, part: int) -> list[Param]:
    """Return the table's rows of a part, a layer's without the axis over layers."""
    table = spec.table(config)
    if 1 <= part <= config.num_layers:
        return [row.of_layer(part - 1) for row in table if row.stacked]
    return [row for row in table if not row.stacked and (row.hf_key == EMBEDDING) == (part == 0)]


class _Embedding(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: Array) -> Array:
        return qwen2.Embedding(self.config, name="embed")(tokens_BT)


class _Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: qwen2.Context, window: Any) -> Array:
        return qwen2.Layer(self.config, AttentionOptions(), name="layers")(x_BTD, ctx, window)[0]


class _FinalNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        return qwen2.RMSNorm(self.config, name="final_norm")(x_BTD)


def embed(config: ModelConfig, params: Tree, tokens_BT: Array, dtype: Any) -> Array:
    """Return the first layer's input [B, T, D] in `dtype`."""
    x: Any = _Embedding(config).apply({"params": params}, tokens_BT)
    return constrain(x.astype(dtype), "batch", "length", None)


def window(config: ModelConfig, part: int) -> Array | None:
    """Return the sliding window of a layer, by its part, as `layer` takes it: None where no layer has one."""
    if not config.uses_windows:
        return None
    size = config.windows[part - 1]
    return jnp.int32(qwen2.NO_WINDOW if size is None else size)


def layer(
    config: ModelConfig,
    params: Tree,
    x_BTD: Array,
    segment_ids_BT: Array,
    window: Array | None,
    inputs: dict[str, Array] | None = None,
) -> Array:
    """Return one layer's output [B, T, D] in the dtype of `x`, which the parameters have, too.

    inputs: gets the input [B, T, ...] of each linear layer, by the name of its module.
    """

    def keep(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if inputs is not None and isinstance(context.module, qwen2.Linear) and context.method_name == "__call__":
            inputs[str(context.module.name)] = args[0]
        return call(*args, **kwargs)

    cos, sin = rope.tables(config.rope, config.head_dim, config.max_length, qwen2.default_positions(segment_ids_BT))
    ctx = qwen2.Context(cos, sin, segment_ids_BT, None)
    with nn.intercept_methods(keep):
        out: Any = _Layer(config).apply({"params": params}, x_BTD, ctx, window)
    return out


def loss_sum(config: ModelConfig, params: Tree, x_BTD: Array, batch: Batch[Array]) -> tuple[Array, Array]:
    """Return the summed next-token loss in nats over a batch's targets, and their number; float32 scalars.

    params: of the final norm and the head, or of the final norm and the embedding where it is the head, too.
    x_BTD: the last layer's output, in the dtype of the parameters.
    """
    labels, mask = loss.next_token_targets(batch)
    return weighted_loss(config, params, x_BTD, labels, mask), jnp.sum(mask)


def losses_by_token(config: ModelConfig, params: Tree, x_BTD: Array, batch: Batch[Array]) -> tuple[Array, Array]:
    """Return the next-token loss in nats at every position, and which positions are judged; both float32 [B, T].

    Arguments as of `loss_sum`; there is no gradient.
    """
    labels, mask = loss.next_token_targets(batch)
    hidden: Any = _FinalNorm(config).apply({"params": {"final_norm": params["final_norm"]}}, x_BTD)
    return loss.cross_entropy_by_token(hidden, qwen2.head_weight(config, params), labels), mask


def weighted_loss(config: ModelConfig, params: Tree, x_BTD: Array, labels_BT: Array, weights_BT: Array) -> Array:
    """Return the sum of weight * loss in nats over a batch's positions, float32; arguments as of `loss_sum`."""
    hidden: Any = _FinalNorm(config).apply({"params": {"final_norm": params["final_norm"]}}, x_BTD)
    return loss.cross_entropy_sum(hidden, qwen2.head_weight(config, params), labels_BT, weights_BT)
